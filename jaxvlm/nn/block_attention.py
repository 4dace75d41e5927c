"""Grouped-query attention by blocks: memory linear in length, empty ones free.

The softmax is online over blocks of keys (Milakov and Gimelshein 2018), and the
backward pass computes each block's weights again (Dao et al. 2022), so no
[T T] array exists. Which blocks of keys a block of queries reads is data, not
shape: packed trees, padded prompts and the windows of a vision tower all run
the same program, and cost what they see.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxvlm import sharding
from jaxvlm.nn.layers import KEPT
from jaxvlm.nn.softmax_blocks import NEVER
from jaxvlm.types import record

# Attention of query, keys and values [B T N H], told who sees whom.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Columns of a block: a window of the vision tower, which is also what two cores
# like best; accelerators want larger products.
BLOCK = {"cpu": 64, "gpu": 128, "tpu": 256}
# Of segments that are whole pictures, which fill larger ones.
WIDE = {"cpu": 400, "gpu": 128, "tpu": 256}
_BRANCHES = 1 << 15  # of a segment


@record
class Tokens:
  """Where the tokens of some columns stand.

  A query sees a key of its own segment that has no higher rank and lies in
  branch 0 or in the query's own branch.
  """

  segments: Int[Array, "..."]  # -1: padding, which neither sees nor is seen
  branches: Int[Array, "..."]
  ranks: Int[Array, "..."]

  def see(self, keys: "Tokens") -> Bool[Array, "... b b"]:
    """Which of the keys each of these queries sees."""
    return sees(
      jax.tree.map(lambda x: x[..., :, None], self),
      jax.tree.map(lambda x: x[..., None, :], keys),
    )


def tokens_of(records: Sequence[jax.Array]) -> Tokens:
  """Of segments, branches and ranks."""
  segments, branches, ranks = records
  return Tokens(segments=segments, branches=branches, ranks=ranks)


def sees(query: Tokens, key: Tokens) -> Bool[Array, "..."]:
  """Whether the one sees the other."""
  same = (query.segments == key.segments) & (query.segments >= 0)
  near = (key.branches == 0) | (key.branches == query.branches)
  return same & near & (key.ranks <= query.ranks)


@record
class Visibility:
  """What a row's queries see, and the blocks of columns where they find it.

  n blocks of b columns; lists of blocks end in -1.
  """

  tokens: Tokens  # [B n b]
  keys: Int[Array, "B n n"]  # blocks that a block of queries reads
  num_keys: Int[Array, " n"]  # how many of them, in the row with most
  queries: Int[Array, "B n n"]  # blocks that read a block of keys
  num_queries: Int[Array, " n"]


def of_trees(
  tree_ids: Int[Array, "B T"], branch_ids: Int[Array, "B T"]
) -> Visibility:
  """Packed trees: one's own prompt (0), and of its completions one's own.

  Keys that are later are hidden. Padding is -1. Blocks are skipped where trees,
  and the branches of each, rise.
  """
  columns = jnp.arange(branch_ids.shape[1], dtype=jnp.int32)
  return _visibility(
    Tokens(
      segments=tree_ids,
      branches=jnp.maximum(branch_ids, 0),
      ranks=jnp.broadcast_to(columns, branch_ids.shape),
    )
  )


def of_segments(
  segments: Int[Array, "B T"], block: Mapping[str, int] = BLOCK
) -> Visibility:
  """All of one's own segment. Blocks are skipped where segments rise."""
  zeros = jnp.zeros_like(segments)
  tokens = Tokens(segments=segments, branches=zeros, ranks=zeros)
  return _visibility(tokens, block)


def _visibility(tokens: Tokens, block: Mapping[str, int] = BLOCK) -> Visibility:
  length, most = tokens.segments.shape[1], block[sharding.backend()]
  if sharding.backend() == "cpu":  # equal blocks: the last one is full too
    size = -(-length // -(-length // most) // 8) * 8
  else:  # powers of two from 16 on are what a GPU's kernels take
    size = min(most, max(16, 1 << (length - 1).bit_length()))
  tokens = Tokens(
    **{
      name: _blocks(getattr(tokens, name), size, fill)
      for name, fill in (("segments", -1), ("branches", 0), ("ranks", 0))
    }
  )
  meet = _meet(tokens)
  count = meet.shape[-1]

  def lists(meet: Bool[Array, "B n n"]) -> tuple[jax.Array, jax.Array]:
    places = jax.lax.broadcasted_iota(jnp.int32, meet.shape, 2)
    first = jnp.sort(jnp.where(meet, places, count), axis=-1)
    counts = meet.sum(-1, dtype=jnp.int32)
    return jnp.where(first < count, first, -1), counts.max(0)

  keys, num_keys = lists(meet)
  queries, num_queries = lists(meet.swapaxes(1, 2))
  return Visibility(
    tokens=tokens,
    keys=keys,
    num_keys=num_keys,
    queries=queries,
    num_queries=num_queries,
  )


def _blocks(x: Int[Array, "B T"], size: int, fill: int) -> Int[Array, "B n b"]:
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)
  return rearrange(x, "B (n b) -> B n b", b=size)


def _meet(tokens: Tokens) -> Bool[Array, "B n n"]:
  """Whether a block of queries may see something in a block of keys.

  By the ranges of both: exact for segments and branches that rise along the
  row, never too few.
  """
  real = tokens.segments >= 0
  ids = tokens.segments * _BRANCHES + tokens.branches

  def span(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    top = jnp.iinfo(x.dtype).max
    low = jnp.min(jnp.where(where, x, top), axis=-1)
    return low, jnp.max(jnp.where(where, x, -1), axis=-1)

  def overlap(queries: Any, keys: Any) -> jax.Array:
    (first, last), (low, high) = queries, keys
    return (low[:, None, :] <= last[:, :, None]) & (
      first[:, :, None] <= high[:, None, :]
    )

  trunk = span(tokens.segments, real & (tokens.branches == 0))
  near = overlap(span(ids, real), span(ids, real)) | overlap(
    span(tokens.segments, real), trunk
  )
  lowest, highest = span(tokens.ranks, real)
  return near & (lowest[:, None, :] <= highest[:, :, None])


def attend(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  visibility: Visibility,
) -> Float[Array, "B T N H"]:
  """softmax(q k / sqrt(H)) v; query head n reads kv head n // (N / K).

  Scores, softmax and sums are float32. A query that sees nothing gets 0.
  """
  length, size = query.shape[1], visibility.tokens.segments.shape[-1]
  padding = ((0, 0), (0, -length % size), (0, 0), (0, 0))
  heads = keys.shape[2]
  folded = [
    rearrange(
      jnp.pad(x, padding), "B (n b) (K R) H -> B n K (R b) H", b=size, K=heads
    )
    for x in (query, keys, values)
  ]
  out = _attend(*folded, visibility)
  out = rearrange(out, "B n K (R b) H -> B (n b) (K R) H", b=size)
  return out[:, :length]


# Here and below rows of a block are r = R b: the queries of all R heads that
# read one kv head.


@jax.custom_vjp
def _attend(
  query: Float[Array, "B n K r H"],
  keys: Float[Array, "B n K b H"],
  values: Float[Array, "B n K b H"],
  visibility: Visibility,
) -> Float[Array, "B n K r H"]:
  return _forward(query, keys, values, visibility)[0]


def _forward(
  query: jax.Array, keys: jax.Array, values: jax.Array, visibility: Visibility
) -> tuple[jax.Array, Any]:
  tokens = visibility.tokens

  def block(own: jax.Array, standing: Tokens, reads: Any) -> Any:
    def add(state: Any, place: jax.Array) -> Any:
      top, total, out = state
      key, value = _pick((keys, values), place)
      seen = standing.see(_tokens(tokens, place))
      scores = _scores(own, key, seen)
      higher = jnp.maximum(top, scores.max(-1))
      weights = jnp.exp(scores - higher[..., None])
      shrink = jnp.exp(top - higher)
      return (
        higher,
        total * shrink + weights.sum(-1),
        out * shrink[..., None]
        + _product("bkrs,bksh->bkrh", weights.astype(value.dtype), value),
      )

    zeros = jnp.zeros(own.shape, jnp.float32)
    # Above NEVER: what is hidden weighs nothing beside what is hidden too.
    start = (zeros[..., 0] + NEVER / 2, zeros[..., 0], zeros)
    top, total, out = _over(reads, add, start)
    some = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    # exp(scores - normaliser) is 0 in a row that sees nothing.
    normaliser = jnp.where(total > 0, top + jnp.log(some), -NEVER)
    return (out / some[..., None]).astype(own.dtype), normaliser

  reads = (visibility.keys, visibility.num_keys)
  out, normaliser = (
    checkpoint_name(x, KEPT) for x in _each(block, (query, tokens), reads)
  )
  return out, (query, keys, values, visibility, out, normaliser)


def _backward(kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
  query, keys, values, visibility, out, normaliser = kept
  tokens = visibility.tokens
  paid = gradient.astype(jnp.float32) * out.astype(jnp.float32)
  queries = (query, gradient, normaliser, paid.sum(-1))

  def slope(
    asks: Any, key: jax.Array, value: jax.Array, seen: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Weights, and the gradient of the products of queries and keys."""
    own, gradient, normaliser, paid = asks
    weights = jnp.exp(_scores(own, key, seen) - normaliser[..., None])
    asked = _product("bkrh,bksh->bkrs", gradient, value) - paid[..., None]
    return weights.astype(gradient.dtype), (
      weights * asked * own.shape[-1] ** -0.5
    ).astype(own.dtype)

  def of_key(total: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
    """Gradients of a block of keys and values, and its share of the queries'."""
    (key, value), standing, list_ = _at(((keys, values), tokens, lists), i)

    def add(totals: Any, place: jax.Array) -> Any:
      asks = _pick(queries, place)
      seen = _tokens(tokens, place).see(standing)
      weights, found = slope(asks, key, value, seen)
      return (
        put(totals[0], place, _product("bkrs,bksh->bkrh", found, key)),
        totals[1] + _product("bkrs,bkrh->bksh", found, asks[0]),
        totals[2] + _product("bkrs,bkrh->bksh", weights, asks[1]),
      )

    zeros = jnp.zeros(key.shape, jnp.float32)
    total, *own = _over((list_, counts[i]), add, (total, zeros, zeros))
    return total, (own[0].astype(key.dtype), own[1].astype(value.dtype))

  lists, counts = visibility.queries, visibility.num_queries
  put = jax.vmap(lambda total, place, share: total.at[place].add(share))
  total, found = jax.lax.scan(
    of_key, jnp.zeros(query.shape, jnp.float32), jnp.arange(keys.shape[1])
  )
  moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
  return (total.astype(query.dtype), *moved, None)


_attend.defvjp(_forward, _backward)


def _each(
  call: Callable[..., Any], blocks: tuple[Any, Tokens], reads: Any
) -> Any:
  """`call` of every block [B n ...] in turn, with what it reads."""
  lists, counts = reads
  count = lists.shape[1]

  def one(_: None, i: jax.Array) -> tuple[None, Any]:
    own, standing, list_ = _at((*blocks, lists), i)
    return None, call(own, standing, (list_, counts[i]))

  _, out = jax.lax.scan(one, None, jnp.arange(count))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)


def _at(blocks: Any, i: jax.Array) -> Any:
  """The i-th of [B n ...]."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), blocks
  )


def _over(
  reads: tuple[Int[Array, "B n"], Int[Array, ""]],
  add: Callable[[Any, Int[Array, " B"]], Any],
  start: Any,
) -> Any:
  """Folds `add` over a list of each row's blocks."""
  places, count = reads
  return jax.lax.fori_loop(
    0,
    count,
    lambda j, state: add(
      state, jax.lax.dynamic_index_in_dim(places, j, axis=1, keepdims=False)
    ),
    start,
  )


def _pick(blocks: Any, place: Int[Array, " B"]) -> Any:
  """Each row's block of [B n ...]; the last one at -1."""

  def row(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False)

  return jax.tree.map(lambda x: jax.vmap(row)(x, place), blocks)


def _tokens(tokens: Tokens, place: Int[Array, " B"]) -> Tokens:
  """Those of each row's block; none at -1."""
  found = _pick(tokens, place)
  there = jnp.expand_dims(place >= 0, 1)
  return Tokens(
    segments=jnp.where(there, found.segments, -1),
    branches=found.branches,
    ranks=found.ranks,
  )


def _scores(
  query: Float[Array, "B K r H"],
  keys: Float[Array, "B K b H"],
  seen: Bool[Array, "B q b"],
) -> Float[Array, "B K r b"]:
  scores = scale_product("bkrh,bksh->bkrs", query, keys)
  return jnp.where(_by_head(seen, scores), scores, NEVER)


def _by_head(
  seen: Bool[Array, "B q b"], like: Float[Array, "B K r b"]
) -> Bool[Array, "B #K r b"]:
  return jnp.tile(seen, (1, like.shape[2] // seen.shape[1], 1))[:, None]


def scale_product(
  equation: str, query: Float[Array, "..."], keys: Float[Array, "..."]
) -> Float[Array, "..."]:
  """q k / sqrt(H), float32."""
  return _product(equation, query, keys) * query.shape[-1] ** -0.5


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
