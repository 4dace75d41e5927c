"""block_attention's sums as one kernel a pass, for GPUs and TPUs.

The same blocks, lists and float32 softmax, but a block's scores never leave the
chip. The kernels are our own because cuDNN's attention knows lengths, windows and
causal order: of trees it would want the mask, an array [T T].
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxvlm import sharding
from jaxvlm.nn.block_attention import Visibility
from jaxvlm.nn.layers import KEPT

BACKENDS = ("gpu", "tpu")

# Rows go by data, heads by tensor; where kv heads do not divide, all stay whole.
_HEADS = ("question", None, "kv_heads", None)
_ROWS = ("question", "kv_heads", None)
_TOKENS = ("question", None, None, None)
_READS = (("question", None, None), ("question", None))


def attend(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  visibility: Visibility,
  *,
  backend: str | None = None,  # None: that of this process
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """As block_attention.attend.

  Args:
    query: of every token.
    keys: likewise.
    values: likewise.
    visibility: what they see.
    backend: "gpu" or "tpu", whose kernels to run.
    interpret: whether to run them as plain operations, anywhere.
  """
  length = query.shape[1]
  padding = ((0, 0), (0, -length % visibility.tokens.segments.shape[-1]))
  padded = [
    jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (query, keys, values)
  ]
  run = _Kernels(
    backend or sharding.backend(), interpret, sharding.mesh_in_use()
  )
  return _attend(*padded, visibility, run)[:, :length]


@dataclasses.dataclass(frozen=True)
class _Kernels:
  """How to run them; the mesh is kept for a backward pass traced elsewhere."""

  backend: str
  interpret: bool
  mesh: Mesh | None

  def __call__(self, name: str, *, arrays: Any, axes: Any, out: Any) -> Any:
    # Imported where it is used: Pallas takes a third of a second.
    module = importlib.import_module(f"jaxvlm.nn.attention_{self.backend}")
    kernel = functools.partial(getattr(module, name), interpret=self.interpret)
    return sharding.by_device(kernel, self.mesh, arrays, axes, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
  query: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  visibility: Visibility,
  run: _Kernels,
) -> jax.Array:
  return _forward(query, keys, values, visibility, run)[0]


def _forward(
  query: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  visibility: Visibility,
  run: _Kernels,
) -> tuple[jax.Array, Any]:
  out, normaliser = run(
    "forward",
    arrays=(
      *(query, keys, values),
      *(_records(visibility), *_reads(visibility.keys)),
    ),
    axes=(_HEADS, _HEADS, _HEADS, _TOKENS, *_READS),
    out=(_HEADS, _ROWS),
  )
  out, normaliser = (checkpoint_name(x, KEPT) for x in (out, normaliser))
  return out, (query, keys, values, visibility, out, normaliser)


def _backward(run: _Kernels, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
  query, keys, values, visibility, out, normaliser = kept
  paid = jnp.sum(
    out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1
  ).swapaxes(1, 2)
  found = run(
    "backward",
    arrays=(
      *(query, keys, values, gradient, normaliser, paid),
      *(_records(visibility), *_reads(visibility.keys)),
      *_reads(visibility.queries),
    ),
    axes=(*4 * (_HEADS,), _ROWS, _ROWS, _TOKENS, *_READS, *_READS),
    out=(_HEADS, _HEADS, _HEADS),
  )
  return (*found, None)


_attend.defvjp(_forward, _backward)


def _records(visibility: Visibility) -> Int[Array, "B 3 n b"]:
  """Segments, branches and ranks of Tokens."""
  tokens = visibility.tokens
  return jnp.stack([tokens.segments, tokens.branches, tokens.ranks], axis=1)


def _reads(
  lists: Int[Array, "B n n"],
) -> tuple[Int[Array, "B n n"], Int[Array, "B n"]]:
  """Lists that end in their last block over and over, and their lengths."""
  last = jnp.broadcast_to(lists.max(-1, keepdims=True), lists.shape)
  filled = jnp.maximum(jnp.where(lists >= 0, lists, last), 0)
  return filled, jnp.sum(lists >= 0, axis=-1, dtype=jnp.int32)
