"""Keys and values that later queries read: heads before columns.

So decoding's products read them as they lie. With heads beside each other in a
column, a CPU would turn every cache around in memory in each step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxvlm import types
from jaxvlm.sharding import constrain


@types.record
class KVCache:
  """Keys (rotated) and values of one layer.

  Prompts: [Q K P H], once per question. Completions: [Q K G C H], each from
  column 0 of its own buffer, so that all rows write the same column.
  """

  keys: Float[Array, "..."]
  values: Float[Array, "..."]


def empty(shape: tuple[int, ...], dtype: Any) -> KVCache:
  """A buffer of zeros."""
  return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def laid(cache: KVCache) -> KVCache:
  """It, on the mesh as its questions and heads are: [Q K ... H]."""

  def one(x: jax.Array) -> jax.Array:
    between = (None,) * (x.ndim - 3)
    return constrain(x, "question", "kv_heads", *between, "head_dim")

  return jax.tree.map(one, cache)


def heads_first(new: KVCache) -> KVCache:
  """K and V as a layer projects them, [Q T K H], as a cache has them."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), new)


def write(cache: KVCache, new: KVCache, column: Int[Array, ""]) -> KVCache:
  """Puts the K and V of one token of every row, [Q G K H], at `column`."""

  def put(buffer: jax.Array, x: jax.Array) -> jax.Array:
    x = jnp.expand_dims(x, 3).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, x, column, axis=3)

  return laid(jax.tree.map(put, cache, heads_first(new)))
