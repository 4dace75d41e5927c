"""Which items share a row: few rows of one width, each about as full."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Int

from jaxvlm import sharding
from jaxvlm.data.vision_layout import capacity
from jaxvlm.types import Question


class Known(NamedTuple):
  """What is known of the questions to come, where all data were read."""

  tokens: int = 0  # of the prompt with most; 0: not known
  patches: int = 0  # likewise
  # Tokens and patches of what a data shard may be asked at once, tried.
  batches: Sequence[Int[np.ndarray, "N 2"]] = ()

  @classmethod
  def of(cls, sizes: Int[np.ndarray, "N 2"]) -> Self:
    """That no others are asked than a batch of these."""
    tokens, patches = sizes.max(0).tolist()
    return cls(tokens, patches, (sizes,))


UNKNOWN = Known()


class Rows(NamedTuple):
  """The items of each row, and how many rows are worked at together."""

  members: list[list[int]]
  together: int  # rows of one call of this host; they divide the rows
  fullest: int  # size of the fullest row of any host


def fill(
  sizes: Int[np.ndarray, " N"],
  others: Int[np.ndarray, " N"],
  *,
  width: int,
  shards: int,
  together: int,
  even: bool,
) -> Rows:
  """Few rows that hold all items, as many on each host.

  Args:
    sizes: of this host's items, none above the width.
    others: a second size, which is spread evenly and has no bound.
    width: of a row.
    shards: data shards of this host; each has as many rows.
    together: rows of a shard in one call.
    even: fewer, where calls then hold more nearly as much; else all have that
      number, whatever the items.
  """
  whole = int(sharding.agree_max(sizes.sum()))
  needed = max(-(-whole // (shards * width)), 1)
  while True:
    calls = -(-needed // together)
    own = min(together, capacity(-(-needed // calls))) if even else together
    members = balanced(sizes, others, calls * own * shards)
    fullest = int(sharding.agree_max(_fullest(sizes, members)))
    if fullest <= width:
      return Rows(members, own * shards, fullest)
    needed += 1


def fill_apart(
  sizes: Int[np.ndarray, "S N"], *, width: int
) -> list[list[list[int]]]:
  """For each data shard few rows that hold its own items, as many of each."""
  rows = [first_fit(own, width) for own in sizes]
  needed = int(sharding.agree_max(max(map(len, rows))))
  return [own + [[] for _ in range(needed - len(own))] for own in rows]


def first_fit(sizes: Int[np.ndarray, " N"], width: int) -> list[list[int]]:
  """Rows of items, the largest first, each where it first fits.

  Items of no size are in no row; without any there is one, empty.
  """
  members: list[list[int]] = [[]]
  free = np.full(len(sizes) + 1, width)
  order = np.argsort(-sizes, kind="stable")
  for item in order[sizes[order] > 0].tolist():
    row = int(np.argmax(free >= sizes[item]))
    free[row] -= sizes[item]
    if row == len(members):
      members.append([])
    members[row].append(item)
  return [sorted(row) for row in members]


def balanced(
  sizes: Int[np.ndarray, " N"], others: Int[np.ndarray, " N"], rows: int
) -> list[list[int]]:
  """Items in so many rows, each about as large in both sizes.

  Those that have the second size first, the longest of them first, to where
  both are least; then the others, the longest first, to where the first is.
  Items of no size are in no row.
  """
  shown = others > 0
  worth = sizes[shown].mean() / others[shown].mean() if shown.any() else 0.0
  members: list[list[int]] = [[] for _ in range(rows)]
  taken, beside = np.zeros(rows), np.zeros(rows)
  order = np.lexsort((-sizes, ~shown))
  for item in order[sizes[order] > 0].tolist():
    row = int(np.argmin(taken + worth * shown[item] * beside))
    members[row].append(item)
    taken[row] += sizes[item]
    beside[row] += others[item]
  return [sorted(row) for row in members]


def sizes_of(questions: Sequence[Question]) -> Int[np.ndarray, "N 2"]:
  """Tokens of each prompt, and patches."""
  found = [(len(q.prompt_ids), len(q.pixel_values)) for q in questions]
  return np.array(found, int).reshape(-1, 2)


def _fullest(sizes: np.ndarray, members: list[list[int]]) -> int:
  return max(int(sizes[row].sum()) for row in members)
