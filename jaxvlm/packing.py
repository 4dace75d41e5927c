"""Host side of the update: groups of completions become packed-tree rows."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxvlm.data.vision_layout import Layout, capacity, collate, needed
from jaxvlm.sharding import agree_max
from jaxvlm.types import Prompts, Question, Tree


def pack(
  questions: Sequence[Question],
  completion_ids: np.ndarray,
  completion_mask: np.ndarray,
  *,
  microbatches: int,
  layout: Layout,
) -> Tree:
  """Packed rows of this host, every leaf with a leading microbatch axis [U].

  Microbatch u holds the u-th of U equal slices of the questions. Widths come
  from the capacity ladder and are the same for all microbatches and hosts.

  Args:
    questions: Q prepared questions.
    completion_ids: int32 [Q G C].
    completion_mask: bool [Q G C], a prefix of True in every row.
    microbatches: U, divides Q.
    layout: how the model lays out pictures.
  """
  size = len(questions) // microbatches
  groups = [questions[u * size : (u + 1) * size] for u in range(microbatches)]
  scored = completion_mask.sum((-2, -1))  # [Q]
  rows = scored + [len(q.prompt_ids) for q in questions]
  prompts = [needed(g, lanes=size, layout=layout) for g in groups]
  prompt_length, patches, row_width, scored_width = agree_max(
    [*np.max(prompts, axis=0), rows.max(), scored.max()]
  )
  trees = []
  for u, group in enumerate(groups):
    own = slice(u * size, (u + 1) * size)
    batch = collate(
      group,
      lanes=size,
      layout=layout,
      prompt_length=int(prompt_length),
      patches=int(patches),
    )
    trees.append(
      _tree(
        batch,
        completion_ids[own],
        completion_mask[own],
        width=capacity(int(row_width), 32),
        scored=capacity(int(scored_width), 16),
      )
    )
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _tree(
  prompts: Prompts,
  completion_ids: np.ndarray,
  completion_mask: np.ndarray,
  *,
  width: int,
  scored: int,
) -> Tree:
  """Rows [prompt | completions] of `width` columns, `scored` of them targets."""
  count, capacity_of_prompts = prompts.prompt_ids.shape
  own = slice(0, capacity_of_prompts)
  ids = np.zeros((count, width), np.int32)
  position_ids = np.zeros((3, count, width), np.int32)
  branch_ids = np.full((count, width), -1, np.int32)
  vision_index = np.full((count, width), -1, np.int32)
  predictors = np.zeros((count, scored), np.int32)
  targets = np.zeros((count, scored), np.int32)
  slots = np.full(completion_ids.shape, -1, np.int32)
  ids[:, own] = prompts.prompt_ids
  position_ids[:, :, own] = prompts.position_ids
  branch_ids[:, own] = np.where(prompts.prompt_mask, 0, -1)
  vision_index[:, own] = prompts.vision_index

  lengths = completion_mask.sum(-1)
  before = np.cumsum(lengths, -1) - lengths  # completion tokens left of (q, g)
  prompt = np.asarray(prompts.prompt_mask).sum(-1)
  last = prompts.position_ids[:, np.arange(count), prompt - 1]  # [3 Q]
  q, g, c = np.nonzero(completion_mask)
  n = before[q, g] + c
  column = prompt[q] + n
  ids[q, column] = targets[q, n] = completion_ids[q, g, c]
  position_ids[:, q, column] = last[:, q] + 1 + c
  branch_ids[q, column] = g + 1
  # The last prompt column predicts every completion's first token.
  predictors[q, n] = np.where(c == 0, prompt[q] - 1, column - 1)
  slots[q, g, c] = n
  return Tree(
    ids=ids,
    position_ids=position_ids,
    branch_ids=branch_ids,
    vision_index=vision_index,
    vision=prompts.vision,
    predictors=predictors,
    targets=targets,
    slots=slots,
  )


def unbatch(values: np.ndarray, microbatches: int) -> np.ndarray:
  """[Q ...] -> [U Q/U ...], in the order in which `pack` slices questions."""
  return values.reshape(microbatches, -1, *values.shape[1:])
