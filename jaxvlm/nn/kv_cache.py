"""Keys and values that later queries read."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxvlm import types
from jaxvlm.sharding import constrain


@types.record
class KVCache:
  """Keys (rotated) and values of one layer.

  Prompts: [Q P K H], once per question. Completions: [Q G C K H], each from
  column 0 of its own buffer, so that all rows write the same column.
  """

  keys: Float[Array, "..."]
  values: Float[Array, "..."]


def empty(shape: tuple[int, ...], dtype: Any) -> KVCache:
  """A buffer of zeros of shape [... K H]."""
  return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def write(cache: KVCache, new: KVCache, column: Int[Array, ""]) -> KVCache:
  """Puts the K and V of one token of every row, [Q G K H], at `column`."""

  def put(buffer: jax.Array, x: jax.Array) -> jax.Array:
    x = jnp.expand_dims(x, 2).astype(buffer.dtype)
    found = jax.lax.dynamic_update_slice_in_dim(buffer, x, column, axis=2)
    return constrain(found, "question", None, None, "kv_heads", "head_dim")

  return jax.tree.map(put, cache, new)
