"""Prompts padded to one length, a row each: what packed rows must equal."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxvlm.data.vision_layout import (
  Layout,
  capacity,
  pack_vision,
  patch_capacity,
  token_places,
)
from jaxvlm.types import Question, record


@record
class Dense:
  """Right-padded prompts [Q P], and the pictures of each slice of them."""

  prompt_ids: Any
  prompt_mask: Any
  position_ids: Any  # [3 Q P]
  vision_index: Any
  vision: Any


def slices_of(
  questions: Sequence[Question], lanes: int
) -> list[Sequence[Question]]:
  """The equal, consecutive slices that the lanes hold."""
  size = len(questions) // lanes
  return [questions[i * size : (i + 1) * size] for i in range(lanes)]


def needed(
  questions: Sequence[Question], *, lanes: int, layout: Layout
) -> tuple[int, int]:
  """Capacities (prompt_length, patches) of these questions."""
  longest = max(len(q.prompt_ids) for q in questions)
  patches = max(
    sum(len(q.pixel_values) for q in part)
    for part in slices_of(questions, lanes)
  )
  return capacity(longest, 16), patch_capacity(patches, layout)


def collate(
  questions: Sequence[Question],
  *,
  lanes: int,
  layout: Layout,
  prompt_length: int | None = None,
  patches: int | None = None,
) -> Dense:
  """Right-pads Q questions into one batch.

  Args:
    questions: Q of them; the s-th of `lanes` equal slices is shown the
      pictures of lane s.
    lanes: S, the data shards of this host.
    layout: of the checkpoint.
    prompt_length: P. None: the capacity of the longest prompt.
    patches: L, as in `pack_vision`.
  """
  slices = slices_of(questions, lanes)
  if prompt_length is None:
    prompt_length = needed(questions, lanes=lanes, layout=layout)[0]
  ids = np.zeros((len(questions), prompt_length), np.int32)
  mask = np.zeros(ids.shape, bool)
  positions = np.zeros((3, *ids.shape), np.int32)
  index = np.full(ids.shape, -1, np.int32)
  row = 0
  for part in slices:
    seen = 0  # visual tokens of this lane so far
    for question in part:
      n = len(question.prompt_ids)
      ids[row, :n] = question.prompt_ids
      mask[row, :n] = True
      positions[:, row, :n] = question.position_ids
      shown = np.flatnonzero(question.prompt_ids == layout.image_token_id)
      index[row, shown] = seen + token_places(question.image_grid_thw, layout)
      seen += len(shown)
      row += 1
  return Dense(
    prompt_ids=ids,
    prompt_mask=mask,
    position_ids=positions,
    vision_index=index,
    vision=pack_vision(slices, layout=layout, patches=patches),
  )
