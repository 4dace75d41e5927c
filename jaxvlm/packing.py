"""Host side of the update: groups of completions become packed-tree rows."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from jaxvlm import filling, sharding
from jaxvlm.data.vision_layout import (
  Layout,
  alike,
  capacity,
  pack_vision,
  patch_capacity,
  token_places,
)
from jaxvlm.types import Question, Tree

# Columns that a row has at least, where there is so much to fill it: several
# short groups share it. Two cores like rows beside one another more than long
# ones, for attention goes along a row block by block.
_ROW = 512


class Packed:
  """Groups of this host in packed rows, a microbatch after the other.

  A microbatch is made as it is asked for, so that the host can make the next
  one while the device works.
  """

  def __init__(
    self,
    questions: Sequence[Question],
    completion_ids: np.ndarray,
    completion_mask: np.ndarray,
    *,
    tokens: int,
    mesh: Mesh,
    layout: Layout,
    largest: int = 0,
    patch_cost: float = 0.0,
  ):
    """Plans the rows.

    Args:
      questions: Q prepared questions.
      completion_ids: int32 [Q G C].
      completion_mask: bool [Q G C], a prefix of True in every row.
      tokens: columns of a data shard in a microbatch, as in `plan`.
      mesh: where the rows go.
      layout: how the model lays out pictures.
      largest: patches of the question with most in all data; 0: not known.
      patch_cost: as in `plan`.
    """
    self._groups = questions, completion_ids, completion_mask
    self._mesh, self._layout = mesh, layout
    self.plan = plan(
      questions,
      completion_mask,
      tokens=tokens,
      shards=sharding.host_shards(mesh),
      layout=layout,
      largest=largest,
      patch_cost=patch_cost,
    )

  def __len__(self) -> int:
    """Microbatches."""
    return len(self.plan.groups)

  def tree(self, u: int) -> Tree:
    """The rows of the u-th microbatch, as global arrays."""
    local = pack(self.plan, u, *self._groups, layout=self._layout)
    return sharding.place(self._mesh, local)

  def place(self, x: np.ndarray | None, u: int) -> Any:
    """[Q ...] of the questions -> a global [R*K ...] of the u-th microbatch."""
    if x is None:
      return None
    return sharding.place(self._mesh, self.plan.spread(x, u))

  def collect(self, parts: Sequence[jax.Array]) -> np.ndarray:
    """A global [R*K ...] of each microbatch -> [Q ...] of the questions."""
    return self.plan.collect([sharding.to_host(part) for part in parts])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Which groups stand in which row of which microbatch, on this host."""

  groups: Int[np.ndarray, "U R K"]  # the question; -1: none
  pictures: Int[np.ndarray, " Q"]  # the question whose pictures are shown
  columns: int  # T
  patches: int  # L, of a row's lane; 0: text alone
  used_columns: int
  used_patches: int

  def spread(self, x: np.ndarray, u: int) -> np.ndarray:
    """[Q ...] of the questions -> [R*K ...] of a microbatch; 0 where none is."""
    places = self.groups[u].reshape(-1)
    taken = np.zeros((places.size, *x.shape[1:]), x.dtype)
    taken[places >= 0] = x[places[places >= 0]]
    return taken

  def collect(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """[R*K ...] of every microbatch -> [Q ...] of the questions."""
    places = self.groups.reshape(-1)
    values = np.concatenate(parts)
    found = np.empty((places.max() + 1, *values.shape[1:]), values.dtype)
    found[places[places >= 0]] = values[places >= 0]
    return found

  def shown(self, row: Int[np.ndarray, " K"]) -> list[int]:
    """The questions of whose pictures the lane of such a row is made."""
    return list(dict.fromkeys(self.pictures[row].tolist()))

  def cost(self, patch: float) -> float:
    """Columns of all rows, a patch counting as so many; alike on all hosts."""
    rows = self.groups.shape[0] * self.groups.shape[1]
    return rows * (self.columns + patch * self.patches)

  @property
  def padding(self) -> dict[str, tuple[float, float]]:
    """Columns and patches that mean nothing, and all, by name."""
    rows = self.groups.shape[0] * self.groups.shape[1]
    sizes = {
      "columns": (self.used_columns, rows * self.columns),
      "patches": (self.used_patches, rows * self.patches),
    }
    return {name: (size - own, size) for name, (own, size) in sizes.items()}


def plan(
  questions: Sequence[Question],
  completion_mask: np.ndarray,
  *,
  tokens: int,
  shards: int,
  layout: Layout,
  largest: int = 0,
  patch_cost: float = 0.0,
) -> Plan:
  """Rows of equal shape that hold all groups with little padding.

  Sizes are the same on all hosts, and few: a row's width follows `tokens` and
  the longest group alone, unless one row holds everything. Groups that show the
  same pictures stand in one row, which has them once, as many as it holds; rows
  are wider, up to `tokens`, where this spares more encoding than it costs.

  Args:
    questions: Q prepared questions of this host.
    completion_mask: bool [Q G C].
    tokens: columns of a data shard in a microbatch; more where one group is
      longer.
    shards: data shards of this host; a microbatch has as many rows of each.
    layout: how the model lays out pictures.
    largest: patches of the question with most in all data; 0: not known.
    patch_cost: columns that cost as much as encoding a patch; 0: nothing is
      encoded, or rows are not to grow for it.
  """
  lengths = completion_mask.sum((-2, -1))
  lengths = lengths + [len(q.prompt_ids) for q in questions]
  longest = int(sharding.agree_max(lengths.max()))
  width = capacity(max(longest, min(tokens, _ROW)), 32)
  pictures = alike(questions)

  def rows(limit: int) -> Plan:
    return _rows(
      questions,
      lengths,
      pictures,
      width=width,
      limit=limit,
      tokens=tokens,
      shards=shards,
      lane=functools.partial(_lane, largest=largest, layout=layout),
    )

  plans = [rows(width)]
  if patch_cost and questions[0].features is None:
    shares = len(set(pictures.tolist())) < len(questions)
    if int(sharding.agree_max(shares)) and tokens > width:
      plans.append(rows(tokens))
  return min(plans, key=lambda found: found.cost(patch_cost))


def _rows(
  questions: Sequence[Question],
  lengths: Int[np.ndarray, " Q"],
  pictures: Int[np.ndarray, " Q"],
  *,
  width: int,
  limit: int,
  tokens: int,
  shards: int,
  lane: Callable[[int], int],
) -> Plan:
  """Rows of this width, or more where groups of the same pictures want it.

  Args:
    questions: Q of them.
    lengths: columns of their groups.
    pictures: the question whose pictures each shows.
    width: of a row, at least.
    limit: columns that groups of the same pictures take in one row, at most.
    tokens: as in `plan`.
    shards: as in `plan`.
    lane: patches of the lane that holds so many.
  """
  patches = np.array([len(q.pixel_values) for q in questions])
  items = _side_by_side(pictures, lengths, limit)
  sizes = np.array([lengths[item].sum() for item in items])
  widest = int(sharding.agree_max(sizes.max()))
  while width < widest:  # each width is another program
    width = min(2 * width, limit)
  rows, together, fullest = filling.fill(
    sizes,
    np.array([patches[item[0]] for item in items]),
    width=width,
    shards=shards,
    together=max(tokens // width, 1),
    even=True,
  )
  rows = [sorted(q for item in row for q in items[item]) for row in rows]
  if len(rows) == shards:
    width = min(2 ** math.ceil(math.log2(fullest)), width)
  shown = [int(patches[np.unique(pictures[row])].sum()) for row in rows]
  most = [max(len(row) for row in rows), max(shown)]
  places, most_patches = (int(size) for size in sharding.agree_max(most))
  # Each size is another program: few, where they cost as little as these.
  room = 4 ** math.ceil(math.log(places, 4))
  groups = np.full((len(rows), room), -1, np.int32)
  for taken, row in zip(groups, rows, strict=True):
    taken[: len(row)] = row
  return Plan(
    groups=groups.reshape(-1, together, room),
    pictures=pictures,
    columns=width,
    patches=lane(most_patches),
    used_columns=int(lengths.sum()),
    used_patches=sum(shown),
  )


def _side_by_side(
  pictures: Int[np.ndarray, " Q"], lengths: Int[np.ndarray, " Q"], limit: int
) -> list[list[int]]:
  """The questions that show the same pictures, to so many columns together."""
  items: list[list[int]] = []
  last: dict[int, list[int]] = {}
  for q, shown in enumerate(pictures.tolist()):
    item = last.get(shown)
    if item is None or lengths[item].sum() + lengths[q] > limit:
      item = last[shown] = []
      items.append(item)
    item.append(q)
  return items


def _lane(patches: int, largest: int, layout: Layout) -> int:
  """The lane that holds so many; where pictures are alike, to the patch."""
  lane = patch_capacity(patches, layout)
  if not largest:
    return lane
  return min(lane, largest * capacity(math.ceil(patches / largest)))


def pack(
  plan: Plan,
  u: int,
  questions: Sequence[Question],
  completion_ids: np.ndarray,
  completion_mask: np.ndarray,
  *,
  layout: Layout,
) -> Tree:
  """The rows of the u-th microbatch.

  Args:
    plan: of these questions.
    u: which microbatch.
    questions: Q prepared questions of this host.
    completion_ids: int32 [Q G C].
    completion_mask: bool [Q G C], a prefix of True in every row.
    layout: as in `plan`.
  """
  rows, room = plan.groups.shape[1:]
  shape = (rows, plan.columns)
  tree = Tree(
    ids=np.zeros(shape, np.int32),
    position_ids=np.zeros((3, *shape), np.int32),
    tree_ids=np.full(shape, -1, np.int32),
    branch_ids=np.full(shape, -1, np.int32),
    vision_index=np.full(shape, -1, np.int32),
    vision=pack_vision(
      [
        [questions[q] for q in plan.shown(row[row >= 0])]
        for row in plan.groups[u]
      ],
      layout=layout,
      patches=plan.patches,
      like=questions[0],
    ),
    predictors=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    counts=np.zeros(rows, np.int32),
    slots=np.full((rows * room, *completion_ids.shape[1:]), -1, np.int32),
  )
  slots = tree.slots.reshape(rows, room, *tree.slots.shape[1:])
  for r, members in enumerate(plan.groups[u]):
    row, own = _Row(tree, r, layout), members[members >= 0]
    at, lane = 0, {}
    for q in plan.shown(own):
      lane[q] = at
      at += len(questions[q].pixel_values) // layout.patches_per_token
    for place, q in enumerate(own):
      row.add(
        questions[q],
        completion_ids[q],
        completion_mask[q],
        slots[r, place],
        first_visual=lane[plan.pictures[q]],
      )
    tree.counts[r] = row.targets
  return tree


@dataclasses.dataclass
class _Row:
  """A row that is being filled, and how much of it is taken."""

  tree: Tree
  row: int
  layout: Layout
  trees: int = 0
  columns: int = 0
  targets: int = 0

  def add(
    self,
    question: Question,
    ids: Int[np.ndarray, "G C"],
    mask: Bool[np.ndarray, "G C"],
    slots: Int[np.ndarray, "G C"],
    *,
    first_visual: int,
  ) -> None:
    """Puts a prompt behind what is there, and its completions behind it.

    Args:
      question: whose prompt it is.
      ids: of the completions.
      mask: which of them are tokens.
      slots: written: the target that each token is.
      first_visual: where the visual tokens of its pictures begin in the lane.
    """
    tree, row = self.tree, self.row
    g, c = np.nonzero(mask)
    first = self.columns + len(question.prompt_ids)
    prompt = slice(self.columns, first)
    whole = slice(self.columns, first + g.size)
    column = first + np.arange(g.size)
    target = self.targets + np.arange(g.size)

    tree.ids[row, prompt] = question.prompt_ids
    tree.ids[row, column] = ids[g, c]
    tree.tree_ids[row, whole] = self.trees
    tree.branch_ids[row, prompt] = 0
    tree.branch_ids[row, column] = g + 1
    tree.position_ids[:, row, prompt] = question.position_ids
    tree.position_ids[:, row, column] = question.position_ids[:, -1:] + 1 + c
    shown = np.flatnonzero(question.prompt_ids == self.layout.image_token_id)
    places = token_places(question.image_grid_thw, self.layout)
    tree.vision_index[row, self.columns + shown] = first_visual + places
    tree.targets[row, target] = ids[g, c]
    # The last prompt column predicts every completion's first token.
    tree.predictors[row, target] = np.where(c == 0, first, column) - 1
    slots[g, c] = target

    self.trees += 1
    self.columns = whole.stop
    self.targets += g.size
