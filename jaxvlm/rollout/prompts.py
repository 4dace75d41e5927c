"""Host side of prefill: prompts in packed rows, of few sizes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxvlm import filling, sharding
from jaxvlm.data.vision_layout import (
  Layout,
  capacity,
  pack_vision,
  token_places,
)
from jaxvlm.types import Features, Prompts, Question

# Columns of a row, at least: several short prompts share it.
_ROW = {"cpu": 256, "gpu": 2048, "tpu": 2048}
_ROW_STEP = {"cpu": 16, "gpu": 128, "tpu": 128}  # in which rows are wider
_PROMPT_STEP = {"cpu": 1, "gpu": 64, "tpu": 64}  # and a prompt's places more
_BUCKETS = 3  # each is another prefill and other decode programs


class Bucket(NamedTuple):
  """Sizes of a batch whose longest prompt has so many tokens."""

  prompt: int  # P
  row: int  # T


def choose(known: filling.Known) -> tuple[Bucket, ...]:
  """Few buckets, rising, that pad the batches tried little; none known: ()."""
  if not known.batches:
    return ()
  step = _PROMPT_STEP[sharding.backend()]
  lengths = [batch[:, 0] for batch in known.batches]
  longest = np.array([-(-own.max() // step) * step for own in lengths])
  # None of those tried may have the prompt with most.
  most = -(-max(known.tokens, int(longest.max())) // step) * step

  def chosen(options: tuple[int, ...]) -> np.ndarray:
    return np.array(options)[np.searchsorted(options, longest)]

  smaller = sorted(set(longest.tolist()) - {most})
  best = min(
    (
      (*some, most)
      for count in range(_BUCKETS)
      for some in itertools.combinations(smaller, count)
    ),
    key=lambda options: chosen(options).sum(),
  )
  found = []
  for prompt in best:
    own = np.flatnonzero(chosen(best) == prompt)
    tried = [lengths[i] for i in (own if own.size else range(len(lengths)))]
    found.append(Bucket(prompt, _row(tried, prompt)))
  return tuple(found)


def find(buckets: Sequence[Bucket], longest: int) -> Bucket:
  """The smallest that holds the longest prompt; one of its own if none does."""
  for bucket in buckets:
    if longest <= bucket.prompt:
      return bucket
  return Bucket(capacity(longest, 16), _least(longest))


def _least(prompt: int) -> int:
  return capacity(max(prompt, _ROW[sharding.backend()]))


def _row(batches: Sequence[Int[np.ndarray, " N"]], prompt: int) -> int:
  """The width, of those to twice the least, that such prompts fill best."""
  least = _least(prompt)
  widths = range(least, 2 * least + 1, _ROW_STEP[sharding.backend()])

  def waste(width: int) -> float:
    """Shares of the rows read that mean nothing, summed."""
    return sum(
      1 - lengths.sum() / (len(filling.first_fit(lengths, width)) * width)
      for lengths in batches
    )

  return min(widths, key=waste)


class Packed(NamedTuple):
  """Prompts of this host in rows."""

  prompts: Prompts
  reads: int  # rows, of the U of each data shard, that hold something
  padding: tuple[int, int]  # columns of those that mean nothing, and all


def pack(
  questions: Sequence[Question],
  real: Bool[np.ndarray, " Q"],
  *,
  shards: int,
  bucket: Bucket,
  layout: Layout,
) -> Packed:
  """Rows of each data shard's own questions, alike on all hosts.

  Args:
    questions: of this host, as many of each data shard, their pictures
      encoded.
    real: those that are read; a place of the others has no columns.
    shards: data shards of this host.
    bucket: P and T; no prompt is longer than P.
    layout: of the checkpoint.
  """
  each = len(questions) // shards
  lengths = np.array([len(q.prompt_ids) for q in questions]) * real
  rows = filling.fill_apart(lengths.reshape(shards, each), width=bucket.row)
  reads = len(rows[0])
  # As many for any batch of such prompts that share rows well.
  room = -(-each * bucket.prompt // bucket.row)
  if reads > room:
    room = capacity(reads)
  members = {
    (s, u): [s * each + q for q in row]
    for s, shard in enumerate(rows)
    for u, row in enumerate(shard)
  }
  shape = (shards, room, bucket.row)
  prompts = Prompts(
    ids=np.zeros(shape, np.int32),
    position_ids=np.zeros((3, *shape), np.int32),
    tree_ids=np.full(shape, -1, np.int32),
    vision_index=np.full(shape, -1, np.int32),
    vision=_lanes(questions, members, shape, layout),
    columns=np.full((len(questions), bucket.prompt), -1, np.int32),
    following=np.zeros((len(questions), 3), np.int32),
    question_id=np.array([q.question_id for q in questions], np.uint32),
  )
  for (s, u), row in members.items():
    column, visual = 0, 0
    for place, q in enumerate(row):
      question = questions[q]
      own = np.arange(lengths[q]) + column
      prompts.ids[s, u, own] = question.prompt_ids
      prompts.position_ids[:, s, u, own] = question.position_ids
      prompts.tree_ids[s, u, own] = place
      prompts.columns[q, : len(own)] = u * bucket.row + own
      prompts.following[q] = question.position_ids[:, -1] + 1
      column += len(own)
      shown = own[question.prompt_ids == layout.image_token_id]
      places = token_places(question.image_grid_thw, layout)
      prompts.vision_index[s, u, shown] = visual + places
      visual += len(shown)
  columns = shards * reads * bucket.row
  return Packed(prompts, reads, (columns - int(lengths.sum()), columns))


def _lanes(
  questions: Sequence[Question],
  members: Mapping[tuple[int, int], Sequence[int]],
  shape: tuple[int, int, int],
  layout: Layout,
) -> Features | None:
  """What the tower saw, a lane [M D] for each of R U rows; None: all text."""
  if questions[0].features is None:
    return None
  lanes = [
    [questions[q] for q in members.get(place, ())]
    for place in np.ndindex(shape[:2])
  ]
  patches = max(sum(len(q.pixel_values) for q in lane) for lane in lanes)
  most = int(sharding.agree_max(patches)) // layout.patches_per_token
  if not most:
    return None
  # Few sizes, for each is another program.
  room = next(m for m in (shape[2] // 16, shape[2] // 4, shape[2]) if m >= most)
  packed = pack_vision(
    lanes,
    layout=layout,
    patches=room * layout.patches_per_token,
    like=questions[0],
  )
  return jax.tree.map(
    lambda x: x.reshape(*x.shape[:-3], *shape[:2], *x.shape[-2:]), packed
  )
