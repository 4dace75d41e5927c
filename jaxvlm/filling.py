"""Which items share a row: few rows of one width, each about as full."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxvlm import sharding
from jaxvlm.data.vision_layout import capacity


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
  none = np.zeros(sizes.shape[1], np.int64)
  whole = int(sharding.agree_max(sizes.sum(1).max()))
  needed = max(-(-whole // width), 1)
  while True:
    rows = [balanced(own, none, needed) for own in sizes]
    fullest = max(map(_fullest, sizes, rows))
    if int(sharding.agree_max(fullest)) <= width:
      return rows
    needed += 1


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


def _fullest(sizes: np.ndarray, members: list[list[int]]) -> int:
  return max(int(sizes[row].sum()) for row in members)
