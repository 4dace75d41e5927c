"""The sampler's programs: prefill, decode until enough rows ended, regroup.

Completions decode in B blocks of W slots; those of a block answer one question
and read one copy of its prompt. All write the same column of a ring of C
columns, whenever they began, so that no write is a scatter. Caches have fewer
columns, c, until as many are written, and are no ring before they have C: a
step reads them whole.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from jaxvlm.models import Network
from jaxvlm.nn import kv_cache
from jaxvlm.nn.kv_cache import KVCache
from jaxvlm.nn.rope import Turns
from jaxvlm.rl.logprobs import token_logits
from jaxvlm.rollout.sampling import draw, draw_keys
from jaxvlm.sharding import RULES, pin, sharding
from jaxvlm.types import Features, Params, Prompts, record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
  """How completions are drawn; compiled into the programs."""

  num_completions: int
  max_completion_length: int
  temperature: float  # 0: the most likely token
  top_k: int  # 0: all
  top_p: float  # 1: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """All that is static in sampling."""

  network: Network
  draws: Draws
  eos_ids: tuple[int, ...]
  pad_id: int
  shards: int  # S, into which the blocks of a batch are split


@record
class Slots:
  """What decoding changes, and what it reads of the prompts."""

  question: Int[Array, " B"]  # of those of its data shard, from 0
  begun: Int[Array, " B"]  # clock of the first token
  following: Int[Array, "B 3"]  # position of the first token
  prompt_mask: Bool[Array, "B P"]
  prompts: list[KVCache]  # [B K P H] a layer
  keys: Key[Array, "B W"]
  limits: Int[Array, "B W"]  # tokens that a completion may have
  ended: Bool[Array, "B W"]
  truncated: Bool[Array, "B W"]  # so far no EOS
  lengths: Int[Array, "B W"]  # tokens so far
  last: Int[Array, "B W"]  # id
  ids: Int[Array, "B W C"]  # a ring: the first token at begun % C
  logprobs: Float[Array, "B W C"]


def unstack(network: Network, mesh: Mesh, params: Params) -> Params:
  """Weights as `decode` reads them: cut out of their stacks, cast, gathered.

  One layer at a time: a TPU gathers into a program's own memory and copies its
  outputs from there, so that one program for all would hold them twice.
  """
  around = unstack_part(network, mesh, params, None)
  number = network.config.text_config.num_hidden_layers
  layers = [unstack_part(network, mesh, params, i) for i in range(number)]
  return network.join(around, layers)


@functools.partial(jax.jit, static_argnums=(0, 1))
def unstack_part(
  network: Network, mesh: Mesh, params: Params, i: Int[ArrayLike, ""] | None
) -> Params:
  """Of layer i; None: of all but the layers."""

  def place(x: Array, axes: tuple[str | None, ...]) -> Array:
    placed = gathered(mesh, axes, x.shape)
    return jax.lax.with_sharding_constraint(x.astype(network.dtype), placed)

  return jax.tree.map(place, network.cut(params, i), network.cut_axes(i))


def gathered(
  mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
  """How a weight lies for `decode`: as elsewhere, but whole over fsdp."""
  local = tuple(None if RULES.get(a or "") == "fsdp" else a for a in axes)
  return sharding(mesh, local, shape)


@functools.partial(jax.jit, static_argnums=0)
def prefill(
  program: Program,
  weights: Params,
  banned: Bool[Array, " V"],
  prompts: Prompts,
  reads: Int[Array, ""],
  question: Int[Array, " B"],
  limits: Int[Array, "B W"],
  key: Key[Array, ""],
  clock: Int[Array, ""],
) -> Slots:
  """Reads B prompts once and draws the first token of W completions of each.

  Args:
    program: what is static.
    weights: of the policy.
    banned: ids that cannot be drawn.
    prompts: in packed rows, their pictures encoded.
    reads: so many of the U rows of each data shard hold something.
    question: which of its data shard each prompt is.
    limits: tokens that each completion may have.
    key: of this rollout.
    clock: of the first token.
  """
  network, draws = program.network, program.draws
  hidden, caches = _read(program, weights, prompts, reads)
  rows = limits.shape
  columns = (*rows, draws.max_completion_length)
  slots = Slots(
    question=question,
    begun=jnp.broadcast_to(clock, question.shape),
    following=prompts.following,
    prompt_mask=prompts.columns >= 0,
    prompts=caches,
    keys=draw_keys(key, prompts.question_id, rows[1]),
    limits=limits,
    ended=jnp.zeros(rows, bool),
    truncated=jnp.ones(rows, bool),
    lengths=jnp.zeros(rows, jnp.int32),
    last=jnp.zeros(rows, jnp.int32),
    ids=jnp.full(columns, program.pad_id, jnp.int32),
    logprobs=jnp.zeros(columns, jnp.float32),
  )
  first = jnp.broadcast_to(hidden[:, None], (*rows, hidden.shape[-1]))
  head = network.head(weights)
  return _laid(_write(program, slots, head, banned, first, clock))


def _read(
  program: Program, weights: Params, prompts: Prompts, reads: Int[Array, ""]
) -> tuple[Float[Array, "B D"], list[KVCache]]:
  """Hidden state of each prompt's last token, and its K and V, [B K P H]."""
  network = program.network
  rows, room, width = prompts.ids.shape
  columns = prompts.columns.reshape(rows, -1, prompts.columns.shape[1])
  last = columns.max(-1)

  def pick(x: Array, u: Array, axis: int = 1) -> Array:
    return jax.lax.dynamic_index_in_dim(x, u, axis, keepdims=False)

  def features(u: Array) -> Features | None:
    if (vision := prompts.vision) is None:
      return None
    levels = None if vision.levels is None else pick(vision.levels, u, 2)
    return Features(tokens=pick(vision.tokens, u), levels=levels)

  def read(u: Array, state: Any) -> Any:
    hidden, caches = state
    embeds = network.embed(
      *(weights, pick(prompts.ids, u), pick(prompts.vision_index, u)),
      features(u),
    )
    x, new = network.read(
      *(weights, embeds, pick(prompts.position_ids, u, 2)),
      pick(prompts.tree_ids, u),
    )
    caches = jax.tree.map(
      lambda cache, own: jax.lax.dynamic_update_index_in_dim(
        cache, own, u, axis=2
      ),
      caches,
      new,
    )
    at = last - u * width
    ends = jnp.take_along_axis(x, jnp.clip(at, 0, width - 1)[..., None], axis=1)
    here = (at >= 0) & (at < width)
    return jnp.where(here[..., None], ends, hidden), caches

  like = jax.eval_shape(lambda: network.embed(weights, last, last, None).tokens)
  start = (
    jnp.zeros(like.shape, like.dtype),
    network.init_cache(rows, room, width),
  )
  hidden, caches = jax.lax.fori_loop(0, reads, read, start)

  def gather(cache: Array) -> Array:
    flat = cache.reshape(*cache.shape[:2], room * width, -1)
    of_row = jax.vmap(lambda x, i: x[:, i], (None, 0))
    found = jax.vmap(of_row)(flat, jnp.maximum(columns, 0))
    return found.reshape(-1, *found.shape[2:])

  return hidden.reshape(-1, hidden.shape[-1]), jax.tree.map(gather, caches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def empty_caches(
  program: Program, shape: tuple[int, int, int]
) -> list[KVCache]:
  """For completions of B blocks of W slots, c columns: [B K W c H] a layer."""
  return program.network.init_cache(*shape)


def grow(caches: list[KVCache], columns: int) -> list[KVCache]:
  """The caches with more columns; used up, one layer at a time as in `regroup`.

  Args:
    caches: in which every column is written, and none for a second time.
    columns: to have.
  """
  for i in range(len(caches)):
    caches[i] = jax.block_until_ready(grow_layer(caches[i], columns))
  return caches


@functools.partial(jax.jit, static_argnums=1)
def grow_layer(completion: KVCache, columns: int) -> KVCache:
  """Keys and values of one layer, [B K W c H], with more columns."""

  def widen(x: Array) -> Array:
    wider = jnp.zeros((*x.shape[:3], columns, x.shape[4]), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(wider, x, 0, axis=3)

  return kv_cache.laid(jax.tree.map(widen, completion))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def decode(
  program: Program,
  questions: int,
  columns: int,
  weights: Params,
  banned: Bool[Array, " V"],
  slots: Slots,
  caches: list[KVCache],
  clock: Int[Array, ""],
  width: Int[Array, ""],
  enough: Int[Array, ""],
) -> tuple[Slots, list[KVCache], Int[Array, ""]]:
  """Decodes until the live rows fit in fewer blocks, or the caches are full.

  Args:
    program: what is static.
    questions: of a data shard, in all.
    columns: c, of the caches. With all C they are a ring, and never full.
    weights: of `unstack`.
    banned: ids that cannot be drawn.
    slots: donated.
    caches: K and V of the completions; donated.
    clock: of the token that is fed next.
    width: slots of the blocks that one would like to go on with.
    enough: how many such blocks a data shard would have.

  Returns:
    The slots, caches and clock to go on with.
  """
  network = program.network
  head = network.head(weights)
  ring = columns == program.draws.max_completion_length
  owner = slots.question.reshape(program.shards, -1, 1) == jnp.broadcast_to(
    jnp.arange(questions), (program.shards, 1, questions)
  )

  def go_on(state: Any) -> Bool[Array, ""]:
    live = (~state[0].ended).sum(-1).reshape(program.shards, -1, 1)
    counts = jnp.where(owner, live, 0).sum(1)  # of each question
    blocks = (-(-counts // width)).sum(-1).max()
    return (blocks > enough) & (ring | (state[2] < columns))

  def turn(slots: Slots, clock: jax.Array) -> Turns:
    age = clock - slots.begun  # tokens before the one that is fed
    return network.turns((slots.following.T + age[None])[:, :, None])

  def step(state: Any) -> Any:
    slots, caches, clock, turns = state
    age = clock - slots.begun
    column = clock % columns
    since = (clock - jnp.arange(columns)[None]) % columns
    written = jnp.broadcast_to(since, (age.size, columns)) <= age[:, None]
    hidden, caches = network.decode(
      weights,
      slots.last,
      turns,
      slots.prompts,
      slots.prompt_mask,
      caches,
      written,
      column,
    )
    clock += 1
    slots = _write(program, slots, head, banned, hidden, clock)
    # Those of the next step: here XLA would take cos and sin in each layer.
    return slots, caches, clock, turn(slots, clock)

  start = (slots, caches, clock, turn(slots, clock))
  slots, caches, clock, _ = jax.lax.while_loop(go_on, step, start)
  return _laid(slots), _laid_caches(caches), clock


def _write(
  program: Program,
  slots: Slots,
  head: Float[Array, "D V"],
  banned: Bool[Array, " V"],
  hidden: Float[Array, "B W D"],
  clock: Int[Array, ""],
) -> Slots:
  """Draws a token of each row and puts it in its column; ended rows get none."""
  draws = program.draws
  logits = token_logits(
    hidden, head, temperature=draws.temperature or 1.0, banned=banned
  )
  ids, logprobs = draw(
    logits,
    slots.keys,
    clock - slots.begun,
    greedy=draws.temperature == 0,
    top_k=draws.top_k,
    top_p=draws.top_p,
  )
  live = ~slots.ended
  column = clock % draws.max_completion_length

  def put(buffer: Array, value: Array) -> Array:
    """Where a row has ended its ring may turn; what it holds must stay."""
    old = jax.lax.dynamic_index_in_dim(buffer, column, axis=2, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(
      buffer, jnp.where(live, value, old), column, axis=2
    )

  said_all = live & jnp.isin(ids, jnp.asarray(program.eos_ids, jnp.int32))
  lengths = slots.lengths + live
  return dataclasses.replace(
    slots,
    ended=slots.ended | said_all | (lengths >= slots.limits),
    truncated=slots.truncated & ~said_all,
    lengths=lengths,
    last=ids,
    ids=put(slots.ids, ids),
    logprobs=put(slots.logprobs, logprobs),
  )


def regroup(
  program: Program,
  slots: Slots,
  caches: list[KVCache],
  blocks: Int[Array, " b"],
  rows: Int[Array, "b w"],
) -> tuple[Slots, list[KVCache]]:
  """The rows that go on, in fewer blocks.

  One layer at a time, and the old one is given up before the next: caches are
  most of what a chip holds, and in one program the old and new of all would be
  there at once.

  Args:
    program: what is static.
    slots: B blocks of W; their prompts are used up.
    caches: of their completions; used up.
    blocks: for each new block one of its data shard's old ones, of the same
      question.
    rows: for each new slot an old row b W + w of its data shard; -1: none.
  """
  prompts = slots.prompts
  for i in range(len(caches)):
    prompts[i], caches[i] = jax.block_until_ready(
      regroup_layer(program, prompts[i], caches[i], blocks, rows)
    )
  rest = dataclasses.replace(slots, prompts=[])
  rest = regroup_rest(program, rest, blocks, rows)
  return dataclasses.replace(rest, prompts=prompts), caches


@functools.partial(jax.jit, static_argnums=0)
def regroup_layer(
  program: Program,
  prompt: KVCache,
  completion: KVCache,
  blocks: Int[Array, " b"],
  rows: Int[Array, "b w"],
) -> tuple[KVCache, KVCache]:
  """Keys and values of one layer: [B K P H] and [B K W c H]."""

  def of_rows(x: Array) -> Array:
    width = x.shape[2]

    def own(x: Array, rows: Array) -> Array:
      return x[rows // width, :, rows % width]  # [b w K c H]

    taken = jax.vmap(own)(_split(program, x), _split(program, rows))
    return jnp.swapaxes(taken.reshape(*rows.shape, -1, *x.shape[3:]), 1, 2)

  prompt = jax.tree.map(functools.partial(_take, program, blocks), prompt)
  return kv_cache.laid(prompt), kv_cache.laid(jax.tree.map(of_rows, completion))


@functools.partial(jax.jit, static_argnums=0)
def regroup_rest(
  program: Program,
  slots: Slots,
  blocks: Int[Array, " b"],
  rows: Int[Array, "b w"],
) -> Slots:
  """All but the caches."""
  of_blocks = functools.partial(_take, program, blocks)

  def of_rows(x: Array) -> Array:
    flat = x.reshape(-1, *x.shape[2:])
    taken = _take(program, rows.reshape(-1), flat)
    return taken.reshape(*rows.shape, *x.shape[2:])

  return _laid(
    dataclasses.replace(
      slots,
      question=of_blocks(slots.question),
      begun=of_blocks(slots.begun),
      following=of_blocks(slots.following),
      prompt_mask=of_blocks(slots.prompt_mask),
      keys=of_rows(slots.keys),
      limits=of_rows(slots.limits),
      ended=of_rows(slots.ended) | (rows < 0),
      truncated=of_rows(slots.truncated),
      lengths=of_rows(slots.lengths),
      last=of_rows(slots.last),
      ids=of_rows(slots.ids),
      logprobs=of_rows(slots.logprobs),
    )
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def admit(
  program: Program, slots: Slots, blocks: Int[Array, " b"], fresh: Slots
) -> Slots:
  """Puts fresh blocks in the place of ended ones of their data shard.

  Args:
    program: what is static.
    slots: donated.
    blocks: for each fresh block the place, within its data shard, that it takes.
    fresh: of `prefill`, begun at the clock of `slots`.
  """

  def put(old: Array, new: Array) -> Array:
    found = jax.vmap(lambda x, i, y: x.at[i].set(y))(
      *(_split(program, x) for x in (old, blocks, new))
    )
    return found.reshape(old.shape)

  return _laid(jax.tree.map(put, slots, fresh))


def _laid(slots: Slots) -> Slots:
  """Slots that lie on the mesh as their questions do."""
  rest = pin(dataclasses.replace(slots, prompts=[]))
  return dataclasses.replace(rest, prompts=_laid_caches(slots.prompts))


def _laid_caches(caches: list[KVCache]) -> list[KVCache]:
  return [kv_cache.laid(cache) for cache in caches]


def _take(program: Program, places: Array, x: Array) -> Array:
  """Of [B ...] these places, each within its data shard."""
  found = jax.vmap(lambda x, i: x[i])(
    _split(program, x), _split(program, places)
  )
  return found.reshape(-1, *x.shape[1:])


def _split(program: Program, x: Array) -> Array:
  """[B ...] -> [S B/S ...], a data shard's own together."""
  return x.reshape(program.shards, -1, *x.shape[1:])
