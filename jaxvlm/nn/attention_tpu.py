"""Fused attention's kernels for TPUs, through Mosaic.

A step of the grid takes one block of queries and one of keys, of one kv head
and all that read it; the lists say which, so that the next are fetched while
these are worked at. Scores stand [keys queries] and outputs [H queries]: what
there is one of a query is a row, in registers as in memory.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jaxtyping import Array, Float, Int

from jaxvlm.nn.block_attention import sees, tokens_of
from jaxvlm.nn.softmax_blocks import NEVER, product, settle, slope, weigh

# [B K n ...], a block's own axes last, so that a block is whole in all of them:
_QUERY = "B (n b) (K R) H -> B K n R b H"
_KEYS = "B (n b) K H -> B K n b H"
_SUMS = "B (K R) (n b) -> B K n R b"
_OUT = "B K n R H b -> B (n b) (K R) H"
# Where a block's queries stand, and its keys.
_ASKING = "B c n b -> B 1 n c b"
_ASKED = "B c n b -> B 1 n b c"


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
  K, b = keys.shape[2], records.shape[-1]
  asks = rearrange(query, _QUERY, K=K, b=b)
  B, K, n, R, b, H = asks.shape
  out, normaliser = _run(
    _forward,
    _settle,
    own=(asks, rearrange(records, _ASKING)),
    read=_with_tokens(keys, values, records),
    lists=(lists, counts),
    out=(
      jax.ShapeDtypeStruct((B, K, n, R, H, b), query.dtype),
      jax.ShapeDtypeStruct((B, K, n, R, b), jnp.float32),
    ),
    sums=(((R, b), NEVER), ((R, b), 0.0), ((R, H, b), 0.0)),
    interpret=interpret,
  )
  return (
    rearrange(out, _OUT),
    rearrange(normaliser, "B K n R b -> B (K R) (n b)"),
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
  K, b = keys.shape[2], records.shape[-1]
  asks = (
    *(rearrange(x, _QUERY, K=K, b=b) for x in (query, gradient)),
    *(rearrange(x, _SUMS, K=K, b=b) for x in (normaliser, paid)),
    rearrange(records, _ASKING),
  )
  stands = _with_tokens(keys, values, records)
  B, K, n, R, b, H = asks[0].shape
  (of_query,) = _run(
    _backward_query,
    _write,
    own=asks,
    read=stands,
    lists=(key_lists, key_counts),
    out=(jax.ShapeDtypeStruct((B, K, n, R, H, b), query.dtype),),
    sums=(((R, H, b), 0.0),),
    interpret=interpret,
  )
  of_keys = _run(
    _backward_keys,
    _write,
    own=stands,
    read=asks,
    lists=(query_lists, query_counts),
    out=2 * (jax.ShapeDtypeStruct((B, K, n, b, H), keys.dtype),),
    sums=2 * (((b, H), 0.0),),
    interpret=interpret,
  )
  back = "B K n b H -> B (n b) K H"
  return rearrange(of_query, _OUT), *(rearrange(x, back) for x in of_keys)


def _with_tokens(
  keys: jax.Array, values: jax.Array, records: jax.Array
) -> tuple[jax.Array, ...]:
  b = records.shape[-1]
  blocks = (rearrange(x, _KEYS, b=b) for x in (keys, values))
  return *blocks, rearrange(records, _ASKED)


def _run(
  add: Callable[..., None],
  finish: Callable[..., None],
  *,
  own: Sequence[jax.Array],
  read: Sequence[jax.Array],
  lists: tuple[jax.Array, jax.Array],
  out: Sequence[jax.ShapeDtypeStruct],
  sums: Sequence[tuple[tuple[int, ...], float]],
  interpret: bool,
) -> Any:
  """Blocks of `out`, each from a block of `own` and those it lists of `read`.

  `add(own, read, sums)` works in each of the latter, and `finish(out, sums)`
  writes what came of all. Sums are float32, of these shapes and first values.
  """
  places, counts = lists
  B, K, n = out[0].shape[:3]

  def kernel(places: Any, counts: Any, *refs: Any) -> None:
    rest = iter(refs)
    mine, theirs, found, totals = (
      list(itertools.islice(rest, len(part))) for part in (own, read, out, sums)
    )
    r, i, j = (pl.program_id(axis) for axis in (0, 2, 3))

    @pl.when(j == 0)
    def _() -> None:
      for ref, (_, first) in zip(totals, sums, strict=True):
        ref[...] = jnp.full(ref.shape, first, ref.dtype)

    @pl.when(j < counts[r * n + i])
    def _() -> None:
      add(mine, theirs, totals)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
      finish(found, totals)

  def spec(x: Any, at: Callable[..., Any]) -> pl.BlockSpec:
    own_axes = x.shape[3:]

    def index(r: Any, k: Any, *step: Any) -> Any:
      head = k if x.shape[1] == K else 0
      return r, head, at(r, *step), *len(own_axes) * (0,)

    return pl.BlockSpec((None, None, None, *own_axes), index)

  here = lambda r, i, j, places, counts: i
  listed = lambda r, i, j, places, counts: places[(r * n + i) * n + j]
  return pl.pallas_call(
    kernel,
    out,
    grid_spec=tpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      # No longer than the longest list.
      grid=(B, K, n, jnp.maximum(counts.max(), 1)),
      in_specs=[
        *(spec(x, here) for x in own),
        *(spec(x, listed) for x in read),
      ],
      out_specs=[spec(x, here) for x in out],
      scratch_shapes=[tpu.VMEM(shape, jnp.float32) for shape, _ in sums],
    ),
    compiler_params=tpu.CompilerParams(
      dimension_semantics=(*3 * ("parallel",), "arbitrary")
    ),
    interpret=interpret,
  )(places.reshape(-1), counts.reshape(-1), *own, *read)


def _forward(own: Any, read: Any, sums: Any) -> None:
  (query, asking), (keys, values, asked) = own, read
  key, value, seen = keys[...], values[...], _sees(asking, asked)
  tops, totals, out = sums
  for head in range(query.shape[0]):
    row = pl.ds(head, 1)
    scores = _scores(key, query[head])
    tops[row], totals[row], weights, shrink = weigh(
      tops[row], totals[row], scores, seen, axis=0
    )
    share = product(value, weights.astype(value.dtype), (0, 0))
    out[head] = out[head] * shrink + share


def _settle(out: Any, sums: Any) -> None:
  tops, totals, found = sums
  some, out[1][...] = settle(tops[...], totals[...])
  for head in range(found.shape[0]):
    mean = found[head] / some[head : head + 1]
    out[0][head] = mean.astype(out[0].dtype)


def _backward_query(own: Any, read: Any, sums: Any) -> None:
  *asks, asking = own
  keys, values, asked = read
  key, value, seen = keys[...], values[...], _sees(asking, asked)
  for head in range(asks[0].shape[0]):
    _, steep, *_ = _slope(asks, head, key, value, seen)
    sums[0][head] += product(key, steep, (0, 0))


def _backward_keys(own: Any, read: Any, sums: Any) -> None:
  keys, values, asked = own
  *asks, asking = read
  key, value, seen = keys[...], values[...], _sees(asking, asked)
  for head in range(asks[0].shape[0]):
    weights, steep, query, gradient = _slope(asks, head, key, value, seen)
    sums[0][...] += product(steep, query, (1, 0))
    sums[1][...] += product(weights, gradient, (1, 0))


def _write(out: Any, sums: Any) -> None:
  for ref, found in zip(out, sums, strict=True):
    ref[...] = found[...].astype(ref.dtype)


def _slope(
  asks: Any, head: int, key: jax.Array, value: jax.Array, seen: jax.Array
) -> tuple[jax.Array, ...]:
  """Weights and slope of a block, and the query and gradient of their head."""
  query, gradient = (x[head] for x in asks[:2])
  sums = [x[pl.ds(head, 1)] for x in asks[2:]]
  scores = _scores(key, query)
  asked = product(value, gradient, (1, 1))
  weights, steep = slope(scores, asked, seen, *sums)
  steep *= query.shape[-1] ** -0.5
  return weights.astype(query.dtype), steep.astype(query.dtype), query, gradient


def _scores(key: jax.Array, query: jax.Array) -> jax.Array:
  return product(key, query, (1, 1)) * query.shape[-1] ** -0.5


def _sees(asking: Any, asked: Any) -> jax.Array:
  """[keys queries], of tokens' records [3 b] and [b 3]."""
  return sees(
    tokens_of([asking[pl.ds(i, 1)] for i in range(3)]),
    tokens_of([asked[:, pl.ds(i, 1)] for i in range(3)]),
  )
