"""Fused attention's kernels for GPUs, through Triton.

A program takes a tile of queries (or of keys) of one query head and loops over
the tiles of the blocks that its own block lists. Arrays stay as the model has
them, [B T N H].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxvlm.nn.block_attention import Tokens, sees, tokens_of
from jaxvlm.nn.softmax_blocks import NEVER, product, settle, slope, weigh

# Columns of a tile times an element's bytes: 64 of bfloat16, 32 of float32. The
# backward pass then takes 75 KB and 83 KB of shared memory at a head of 128, 100
# KB on Hopper; a small GPU has 99 KB, and an H100 227.
TILE = 128


def forward(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  records: Int[Array, "B 3 n b"],
  lists: Int[Array, "B n n"],
  counts: Int[Array, "B n"],
  *,
  interpret: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """The output, and each query's normaliser of its softmax."""
  rows = jax.ShapeDtypeStruct(
    query.shape[:1] + query.shape[2:0:-1], jnp.float32
  )
  return _run(
    _forward,
    own=(query,),
    read=(keys, values),
    lists=(records, lists, counts),
    out=(jax.ShapeDtypeStruct(query.shape, query.dtype), rows),
    interpret=interpret,
  )


def backward(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  gradient: Float[Array, "B T N H"],
  normaliser: Float[Array, "B N T"],
  paid: Float[Array, "B N T"],
  records: Int[Array, "B 3 n b"],
  key_lists: Int[Array, "B n n"],
  key_counts: Int[Array, "B n"],
  query_lists: Int[Array, "B n n"],
  query_counts: Int[Array, "B n"],
  *,
  interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of query, keys and values."""
  asks = (query, gradient, normaliser, paid)
  (of_query,) = _run(
    _backward_query,
    own=asks,
    read=(keys, values),
    lists=(records, key_lists, key_counts),
    out=(jax.ShapeDtypeStruct(query.shape, query.dtype),),
    interpret=interpret,
  )
  # Of each query head, whose sums are the kv head's.
  part = jax.ShapeDtypeStruct(query.shape, jnp.float32)
  parts = _run(
    _backward_keys,
    own=(keys, values),
    read=asks,
    lists=(records, query_lists, query_counts),
    out=(part, part),
    interpret=interpret,
  )
  B, T, K, H = keys.shape
  of_keys, of_values = (
    x.reshape(B, T, K, -1, H).sum(3).astype(keys.dtype) for x in parts
  )
  return of_query, of_keys, of_values


def _run(
  kernel: Callable[..., None],
  *,
  own: Sequence[jax.Array],
  read: Sequence[jax.Array],
  lists: tuple[jax.Array, jax.Array, jax.Array],
  out: Sequence[jax.ShapeDtypeStruct],
  interpret: bool,
) -> Any:
  """A program for each tile, head and row.

  It gets tiles of its `own` arrays and of `out`, and all columns of what it may
  `read`, of its row and head.
  """
  records, *reads = lists
  B, _, n, b = records.shape
  tile = min(TILE // own[0].dtype.itemsize, b)
  heads, size = out[0].shape[2:]

  def spec(x: Any, columns: int) -> pl.BlockSpec:
    at = (lambda i: i) if columns == tile else (lambda i: 0)
    if x.ndim == 3:
      return pl.BlockSpec((None, None, columns), lambda i, h, r: (r, h, at(i)))
    share = heads // x.shape[2]
    return pl.BlockSpec(
      (None, columns, None, pl.next_power_of_2(size)),
      lambda i, h, r: (r, at(i), jax.lax.div(h, share), 0),
    )

  def row(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(
      (None, *x.shape[1:]), lambda i, h, r: (r, *(x.ndim - 1) * (0,))
    )

  records = records.reshape(B, 3, n * b)
  whole = (records, *reads)
  return pl.pallas_call(
    functools.partial(kernel, size=size, parts=b // tile),
    out,
    grid=(n * b // tile, heads, B),
    in_specs=[
      *(spec(x, tile) for x in own),
      *(spec(x, n * b) for x in read),
      *(row(x) for x in whole),
    ],
    out_specs=[spec(x, tile) for x in out],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
  )(*own, *read, *whole)


def _forward(
  query: Any,
  keys: Any,
  values: Any,
  records: Any,
  lists: Any,
  counts: Any,
  out: Any,
  normaliser: Any,
  *,
  size: int,
  parts: int,
) -> None:
  own = _load(query, size)
  standing = _own_tokens(records, len(own), axis=1)

  def add(columns: Any, state: Any) -> Any:
    top, total, found = state
    key, value = (_load(x.at[columns], size) for x in (keys, values))
    scores = product(own, key, (1, 1)) * size**-0.5
    seen = sees(standing, _tokens(records, columns, axis=0))
    top, total, weights, shrink = weigh(top, total, scores, seen, axis=1)
    share = product(weights.astype(value.dtype), value, (1, 0))
    return top, total, found * shrink + share

  none = jnp.zeros((len(own), 1), jnp.float32)
  start = (none + NEVER, none, jnp.zeros(own.shape, jnp.float32))
  top, total, found = _over(lists, counts, add, start, len(own), parts)
  some, logarithm = settle(top, total)
  _store(out, found / some, size)
  normaliser[...] = logarithm.reshape(-1)


def _backward_query(
  query: Any,
  gradient: Any,
  normaliser: Any,
  paid: Any,
  keys: Any,
  values: Any,
  records: Any,
  lists: Any,
  counts: Any,
  out: Any,
  *,
  size: int,
  parts: int,
) -> None:
  own, wanted = _load(query, size), _load(gradient, size)
  standing = _own_tokens(records, len(own), axis=1)
  sums = [x[...][:, None] for x in (normaliser, paid)]

  def add(columns: Any, found: jax.Array) -> jax.Array:
    key, value = (_load(x.at[columns], size) for x in (keys, values))
    scores = product(own, key, (1, 1)) * size**-0.5
    asked = product(wanted, value, (1, 1))
    seen = sees(standing, _tokens(records, columns, axis=0))
    _, steep = slope(scores, asked, seen, *sums)
    return found + product(steep.astype(key.dtype), key, (1, 0))

  start = jnp.zeros(own.shape, jnp.float32)
  found = _over(lists, counts, add, start, len(own), parts)
  _store(out, found * size**-0.5, size)


def _backward_keys(
  keys: Any,
  values: Any,
  query: Any,
  gradient: Any,
  normaliser: Any,
  paid: Any,
  records: Any,
  lists: Any,
  counts: Any,
  out_keys: Any,
  out_values: Any,
  *,
  size: int,
  parts: int,
) -> None:
  key, value = _load(keys, size), _load(values, size)
  standing = _own_tokens(records, len(key), axis=1)

  def add(columns: Any, found: Any) -> Any:
    asks, wanted = (_load(x.at[columns], size) for x in (query, gradient))
    scores = product(key, asks, (1, 1)) * size**-0.5
    asked = product(value, wanted, (1, 1))
    seen = sees(_tokens(records, columns, axis=0), standing)
    sums = [x[columns][None] for x in (normaliser, paid)]
    weights, steep = slope(scores, asked, seen, *sums)
    return (
      found[0] + product(steep.astype(asks.dtype), asks, (1, 0)),
      found[1] + product(weights.astype(asks.dtype), wanted, (1, 0)),
    )

  zeros = jnp.zeros(key.shape, jnp.float32)
  found = _over(lists, counts, add, (zeros, zeros), len(key), parts)
  _store(out_keys, found[0] * size**-0.5, size)
  _store(out_values, found[1], size)


def _over(
  lists: Any,
  counts: Any,
  add: Callable[[Any, Any], Any],
  start: Any,
  tile: int,
  parts: int,
) -> Any:
  """Folds `add` over the tiles, `parts` a block, that this one's block lists."""
  block = jax.lax.div(pl.program_id(0), parts)

  def step(j: jax.Array, state: Any) -> Any:
    place = lists[block, jax.lax.div(j, parts)] * parts + jax.lax.rem(j, parts)
    return add(pl.ds(place * tile, tile), state)

  return jax.lax.fori_loop(0, counts[block] * parts, step, start)


def _own_tokens(records: Any, tile: int, *, axis: int) -> Tokens:
  return _tokens(records, pl.ds(pl.program_id(0) * tile, tile), axis=axis)


def _tokens(records: Any, columns: Any, *, axis: int) -> Tokens:
  """Where these columns stand, with an axis of 1 there."""
  return tokens_of(
    [jnp.expand_dims(records[i, columns], axis) for i in range(3)]
  )


# Triton's arrays have powers of two for sizes: heads are read and written with
# zeros at their end.


def _load(tile: Any, size: int) -> jax.Array:
  if tile.shape[-1] == size:
    return tile[...]
  return triton.load(tile, mask=_real(tile, size), other=0.0)


def _store(tile: Any, value: jax.Array, size: int) -> None:
  value = value.astype(tile.dtype)
  mask = None if tile.shape[-1] == size else _real(tile, size)
  triton.store(tile, value, mask=mask)


def _real(tile: Any, size: int) -> jax.Array:
  return jnp.arange(tile.shape[-1])[None] < size
