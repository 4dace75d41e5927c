"""The sampler: prompts once per question, and ended rows make room."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key

from jaxvlm import compiling, sharding
from jaxvlm.data.vision_layout import Layout
from jaxvlm.encoder import Encoder
from jaxvlm.filling import UNKNOWN, Known
from jaxvlm.metrics import Metrics, add
from jaxvlm.models import Network
from jaxvlm.rollout import prompts, schedule
from jaxvlm.rollout import slots as programs
from jaxvlm.rollout.slots import Draws, Program
from jaxvlm.types import Params, Question, Rollout, record

__all__ = ["Draws", "Sampler", "Weights"]


@record
class Weights:
  """What `Sampler.weights` makes of a policy's."""

  prefill: Params
  decode: Params  # no tower, and each layer's cut out of its stack


class Sampler:
  """Samples groups of completions from the trainer's own weights.

  Attributes:
    encoder: sees the pictures of questions that have no features yet.
    padding: columns of prompts, places of them in caches and patches of lanes
      so far that mean nothing, and all.
  """

  def __init__(
    self,
    *,
    network: Network,
    mesh: Mesh,
    eos_ids: tuple[int, ...],
    pad_id: int,
    banned: np.ndarray,
    layout: Layout,
    known: Known = UNKNOWN,
    slots: int = 0,  # completions that decode at once; 0: all
  ):
    self.network = network
    self.mesh = mesh
    self.eos_ids = eos_ids
    self.pad_id = pad_id
    self.banned = jnp.asarray(banned)
    self.layout = layout
    self.encoder = Encoder(
      network=network, mesh=mesh, layout=layout, known=known
    )
    self.slots = slots
    self.buckets = prompts.choose(known)
    self._columns: Metrics = {}

  @property
  def padding(self) -> Metrics:
    return self._columns | self.encoder.padding

  def pack(
    self,
    questions: Sequence[Question],
    real: Bool[np.ndarray, " Q"],
    bucket: prompts.Bucket,
  ) -> prompts.Packed:
    """Prompts of this host in rows; their padding is counted."""
    packed = prompts.pack(
      questions,
      real,
      shards=sharding.host_shards(self.mesh),
      bucket=bucket,
      layout=self.layout,
    )
    places = packed.prompts.columns
    counts: Metrics = {
      "padding/prompts": packed.padding,
      "padding/cache": (float((places < 0).sum()), float(places.size)),
    }
    self._columns = add(self._columns, counts)
    return packed

  def weights(self, params: Params) -> Weights:
    """The policy's weights as sampling reads them.

    Decoding reads a copy that is cast and gathered over fsdp; prefill and tower
    read the policy's own, as the update does, which costs them a gather of each
    layer for each row of prompts and saves a second copy.
    """
    with sharding.use(self.mesh):
      decode = programs.unstack(self.network, self.mesh, params)
    return Weights(prefill=params, decode=decode)

  def sample(
    self,
    weights: Weights,
    questions: Sequence[Question],
    *,
    key: Key[Array, ""],
    draws: Draws,
    limits: Int[np.ndarray, "Q G"] | None = None,
  ) -> Rollout:
    """G completions of each question of this host, as host arrays.

    Args:
      weights: of `weights`.
      questions: Q / hosts of them, a multiple of this host's data shards.
      key: of this seed, stage and step; question, completion and position are
        folded in, so that neither the batch's layout nor the order in which
        rows decode matters.
      draws: see there.
      limits: tokens that each completion may have at most, from 1; None: what
        draws says, for all.
    """
    return self.start(weights, questions, key=key, draws=draws, limits=limits)()

  def start(
    self,
    weights: Weights,
    questions: Sequence[Question],
    *,
    key: Key[Array, ""],
    draws: Draws,
    limits: Int[np.ndarray, "Q G"] | None = None,
  ) -> Callable[[], Rollout]:
    """`sample`, not waited for: the device works while the host is free.

    It does until rows have to be sorted or caches to grow, and then waits.

    Returns:
      What goes on, waits for the completions and gives them.
    """
    if limits is None:
      shape = (len(questions), draws.num_completions)
      limits = np.full(shape, draws.max_completion_length, np.int32)
    questions = self.encoder(weights.prefill, questions)
    decoding = _Decoding(self, weights, questions, key, draws, limits)
    return decoding.finish


class _Decoding:
  """One rollout under way: which row is whose, and what goes on in its place.

  Questions that wait take the place of those that have ended, or begin when all
  have, with caches of few columns; see `schedule.refills`. When none is to come and few
  rows are left, those go on in fewer blocks. The host hears of the rows only
  then, and where the caches have to grow.
  """

  _slots: Any
  _caches: Any

  def __init__(
    self,
    sampler: Sampler,
    weights: Weights,
    questions: Sequence[Question],
    key: Key[Array, ""],
    draws: Draws,
    limits: Int[np.ndarray, "Q G"],
  ):
    self._sampler, self._weights, self._key = sampler, weights, key
    self._questions, self._limits = questions, limits
    shards = sharding.data_shards(sampler.mesh)
    self._program = Program(
      network=sampler.network,
      draws=draws,
      eos_ids=sampler.eos_ids,
      pad_id=sampler.pad_id,
      shards=shards,
    )
    self._shards = shards // jax.process_count()  # of this host
    each, group = len(questions) // self._shards, draws.num_completions
    at_once, self._fresh = schedule.in_flight(
      sampler.slots, shards=shards, each=each, group=group
    )
    self._each, self._at_once = each, at_once
    longest = max(len(q.prompt_ids) for q in questions)
    longest = int(sharding.agree_max(longest))
    self._bucket = prompts.find(sampler.buckets, longest)
    length = draws.max_completion_length
    rows = (len(questions), group)
    self._rollout = Rollout(
      completion_ids=np.full((*rows, length), sampler.pad_id, np.int32),
      completion_mask=np.zeros((*rows, length), bool),
      truncated=np.ones(rows, bool),
      sampler_logprobs=np.zeros((*rows, length), np.float32),
    )
    self._waiting = 0  # first question of a shard that was not admitted
    with sharding.use(sampler.mesh):
      self._begin()
      self._refill = schedule.refills(
        draws, weights.decode, self._slots.prompts
      )
      self._decode()

  def _begin(self) -> None:
    """Questions that wait begin from empty caches, as many as there may be."""
    self._slots = self._caches = None  # no longer held
    blocks, group = self._at_once, self._program.draws.num_completions
    self._shape = (blocks, group)  # blocks of a data shard, slots
    self._ladder = list(schedule.ladder(self._each, self._shape))
    self._larger = list(
      schedule.cache_columns(self._program.draws.max_completion_length)
    )
    self._columns = self._larger.pop(0)  # of the caches
    # The question of each block, of this host's, and the completion of each
    # slot; -1: nobody's.
    self._owner = np.full((self._shards, blocks), -1)
    self._member = np.tile(np.arange(group), (self._shards, blocks, 1))
    self._clock = jnp.int32(0)
    self._slots = self._prefill(np.tile(np.arange(blocks), (self._shards, 1)))
    shape = (blocks * self._program.shards, group)
    with self._compiles(f"caches, {self._columns} columns", shape):
      self._caches = programs.empty_caches(
        self._program, (*shape, self._columns)
      )

  def finish(self) -> Rollout:
    """Decodes to the end."""
    with sharding.use(self._sampler.mesh):
      while True:
        ended = self._split(sharding.to_host(self._slots.ended))
        if self._fit(~ended, self._goal):
          self._collect(ended)
          left = (~ended).sum((1, 2)).max()
          if self._admits:
            self._admit(ended)
          elif int(sharding.agree_max(left)):
            self._regroup(ended)
          elif self._waiting < self._each:
            self._begin()
          else:
            return self._rollout
        if self._larger and int(self._clock) == self._columns:
          self._grow()
        self._decode()

  def _split(self, x: np.ndarray) -> np.ndarray:
    """[B ...] -> [S B/S ...] of this host."""
    return x.reshape(self._shards, -1, *x.shape[1:])

  @property
  def _admits(self) -> bool:
    """Whether ended blocks make room for questions that wait."""
    return self._refill and self._waiting < self._each

  @property
  def _goal(self) -> tuple[int, int]:
    """Blocks and slots that hold the live rows once decoding is to stop.

    Then there is room to admit, or few enough are left for fewer blocks.
    """
    if self._admits:
      return self._shape[0] - self._fresh, self._shape[1]
    return self._ladder[0] if self._ladder else (0, 1)

  def _decode(self) -> None:
    """To the goal, or until the caches are full."""
    enough, width = self._goal
    shape = self._slots.ended.shape
    with self._compiles(f"decode, {self._columns} columns", shape):
      self._slots, self._caches, self._clock = programs.decode(
        self._program,
        self._each,
        self._columns,
        self._weights.decode,
        self._sampler.banned,
        self._slots,
        self._caches,
        self._clock,
        jnp.int32(width),
        jnp.int32(enough),
      )

  def _compiles(
    self, name: str, shape: tuple[int, ...], **sizes: int
  ) -> contextlib.AbstractContextManager[None]:
    """Counts shapes; of what has caches, by their columns, which are few."""
    blocks, slots = shape
    return compiling.program(
      name,
      blocks=blocks,
      slots=slots,
      prompt=self._bucket.prompt,
      completion=self._program.draws.max_completion_length,
      **sizes,
    )

  def _place(self, x: np.ndarray) -> Array:
    """[S b ...] of this host as a global array [B ...]."""
    return sharding.place(self._sampler.mesh, x.reshape(-1, *x.shape[2:]))

  def _prefill(self, blocks: Int[np.ndarray, "S b"]) -> programs.Slots:
    """Reads the questions that wait next into these blocks."""
    start, count = self._waiting, blocks.shape[1]
    own = np.minimum(start + np.arange(count), self._each - 1)
    there = start + np.arange(count) < self._each
    index = np.arange(self._shards)[:, None] * self._each + own  # [S b]
    np.put_along_axis(self._owner, blocks, np.where(there, index, -1), axis=1)
    self._waiting += count
    limits = np.where(there[:, None], self._limits[index], 0)
    packed = self._sampler.pack(
      [self._questions[q] for q in index.flat],
      np.tile(there, self._shards),
      self._bucket,
    )
    rows, vision = packed.prompts.ids.shape, packed.prompts.vision
    with self._compiles(
      "prefill",
      (limits.shape[0] * count, limits.shape[2]),
      rows=rows[1],
      columns=rows[2],
      lane=0 if vision is None else vision.tokens.shape[2],
    ):
      return programs.prefill(
        self._program,
        self._weights.prefill,
        self._sampler.banned,
        sharding.place(self._sampler.mesh, packed.prompts),
        jnp.int32(packed.reads),
        self._place(np.tile(own.astype(np.int32), (self._shards, 1))),
        self._place(limits.astype(np.int32)),
        self._key,
        self._clock,
      )

  def _grow(self) -> None:
    """The caches get the next size."""
    columns = self._larger.pop(0)
    shape = self._slots.ended.shape
    with self._compiles(f"grow, {self._columns} columns", shape):
      self._caches = programs.grow(self._caches, columns)
    self._columns = columns

  def _admit(self, ended: np.ndarray) -> None:
    """Fresh questions take the place of blocks that have ended."""
    order = np.argsort(~ended.all(-1), axis=1, kind="stable")
    blocks = order[:, : self._fresh].astype(np.int32)
    fresh = self._prefill(blocks)
    with self._compiles(
      "admit", self._slots.ended.shape, fresh=fresh.ended.shape[0]
    ):
      self._slots = programs.admit(
        self._program, self._slots, self._place(blocks), fresh
      )

  def _regroup(self, ended: np.ndarray) -> None:
    """The rows that are left go on in the smallest shape that holds them."""
    live = ~ended
    shape = self._shape
    while self._ladder and self._fit(live, self._ladder[0]):
      shape = self._ladder.pop(0)
    blocks = np.zeros((self._shards, shape[0]), np.int32)
    rows = np.full((self._shards, *shape), -1, np.int32)
    owner = np.full((self._shards, shape[0]), -1)
    member = np.full((self._shards, *shape), -1)
    for s in range(self._shards):
      at = 0
      for question in np.unique(self._owner[s][live[s].any(-1)]):
        mine = live[s] & (self._owner[s] == question)[:, None]
        for part in _chunks(np.flatnonzero(mine), shape[1]):
          block, slot = np.divmod(part, live.shape[2])
          blocks[s, at], owner[s, at] = block[0], question
          rows[s, at, : part.size] = part
          member[s, at, : part.size] = self._member[s, block, slot]
          at += 1
    self._shape, self._owner, self._member = shape, owner, member
    with self._compiles(
      f"regroup, {self._columns} columns",
      self._slots.ended.shape,
      to_blocks=self._program.shards * shape[0],
      to_slots=shape[1],
    ):
      self._slots, self._caches = programs.regroup(
        self._program,
        self._slots,
        self._caches,
        self._place(blocks),
        self._place(rows),
      )

  def _fit(self, live: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether the live rows fit in a shape, on all hosts."""
    most = 0
    for s in range(self._shards):
      counts = np.bincount(
        np.maximum(self._owner[s], 0), weights=live[s].sum(-1)
      )
      most = max(most, int(np.ceil(counts / shape[1]).sum()))
    return int(sharding.agree_max(most)) <= shape[0]

  def _collect(self, ended: np.ndarray) -> None:
    """Takes down what ended rows said."""
    slots = self._slots
    own = self._owner[:, :, None]
    done = ended & (own >= 0) & (self._member >= 0)
    if not done.any():
      return
    member = self._member[done]
    question = np.broadcast_to(own, ended.shape)[done]
    lengths, truncated, begun, ids, logprobs = (
      self._split(sharding.to_host(x))
      for x in (
        *(slots.lengths, slots.truncated, slots.begun),
        *(slots.ids, slots.logprobs),
      )
    )
    size = ids.shape[-1]
    turn = np.broadcast_to(begun[:, :, None], ended.shape)[done]
    ring = (turn[:, None] + np.arange(size)) % size
    said = np.arange(size) < lengths[done][:, None]
    out, at = self._rollout, (question, member)
    out.completion_mask[at] = said
    out.truncated[at] = truncated[done]
    for whole, part in (
      (out.completion_ids, ids),
      (out.sampler_logprobs, logprobs),
    ):
      turned = np.take_along_axis(part[done], ring, axis=1)
      whole[at] = np.where(said, turned, whole[at])


def _chunks(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
  return (x[i : i + size] for i in range(0, len(x), size))
