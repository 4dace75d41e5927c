"""What a rollout costs under each way to deal with rows that end early.

  python tools/bench_schedule.py [--questions 8 --group 8 --longest 64]

Nothing is decoded: lengths are drawn (lognormal, the median a sixth of the
longest), and a step of R rows, whose caches have C columns, is said to cost
`--step` + R * (`--row` + C * `--read`) milliseconds. The defaults were fitted to
two CPU cores and the model of `configs/staged.py`, where completions are short
and reading costs nothing; measure your own with `tools/bench.py`.

  wait      all rows decode until the longest has ended
  eighths   when an eighth of the rows is left, they go on in fewer blocks
  quarters  likewise a quarter: what the sampler does
  halves    likewise a half
  whole     quarters, from caches of all columns that a completion may have; in
            all others they double as their columns are written
  ideal     every row costs its own tokens and reads them, the longest its steps

With `--slots` fewer rows decode at once:

  waves     when all of these have ended, the next questions begin; each time
            rows go on in fewer blocks as in quarters
  refill    the next take the place of questions that have ended. It costs less
            than waves where a step's own cost, of reading the weights, is
            most, and more where that of rows is; the sampler does it where
            full caches would be less than the weights
"""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from jaxvlm.rollout.schedule import cache_columns, in_flight, ladder

Lengths = Int[np.ndarray, "Q G"]
Shapes = set[tuple[int, int]]  # rows, columns; a program decodes each
QUARTERS = 4
SHRINK = {"wait": 0, "eighths": 8, "quarters": QUARTERS, "halves": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """Milliseconds."""

  step: float  # of the loop, whatever it decodes
  row: float  # of a row in it
  shape: float  # of going on in another shape
  read: float = 0.0  # of a column of a row's cache

  def of(self, rows: int, columns: int) -> float:
    return self.step + rows * (self.row + columns * self.read)


def draw_lengths(
  questions: int, group: int, longest: int, seed: int
) -> Lengths:
  """Lognormal with median longest / 6 and sigma 1; one row is the longest."""
  random = np.random.default_rng(seed)
  drawn = random.lognormal(np.log(longest / 6), 1.0, (questions, group))
  lengths = np.clip(np.round(drawn), 1, longest).astype(int)
  lengths.flat[lengths.argmax()] = longest
  return lengths


def ideal(lengths: Lengths, cost: Cost) -> float:
  read = (lengths * (lengths + 1) // 2).sum()
  rows = cost.row * lengths.sum() + cost.read * read
  return cost.step * lengths.max() + rows


def columns_at(step: int, sizes: Sequence[int]) -> int:
  """Of caches that double when they are full, up to the last of the sizes."""
  return next((size for size in sizes if step < size), sizes[-1])


def shrinking(
  lengths: Lengths,
  cost: Cost,
  shrink: int,
  sizes: Sequence[int],
  clock: int = 0,
  each: int = 0,
) -> tuple[float, Shapes]:
  """Milliseconds, and the shapes that decode.

  Args:
    lengths: tokens that are left of each row.
    cost: of a step.
    shrink: how many times fewer rows the next shape has; 0: none follows.
    sizes: columns of caches, one after the other.
    clock: steps that these have seen.
    each: questions in all; 0: these.
  """
  questions, group = lengths.shape
  shapes = []
  if shrink:
    shapes = list(
      ladder(each or questions, (questions, group), shrink=shrink, fewest=1)
    )
  total, rows, found = 0.0, questions * group, set()
  for step in range(lengths.max()):
    live = (lengths > step).sum(1)
    while shapes and -(-live // shapes[0][1]).sum() <= shapes[0][0]:
      blocks, width = shapes.pop(0)
      if rows != blocks * width:
        rows, total = blocks * width, total + cost.shape
    columns = columns_at(clock + step, sizes)
    found.add((rows, columns))
    total += cost.of(rows, columns)
  return total, found


def waves(
  lengths: Lengths, cost: Cost, at_once: int, sizes: Sequence[int]
) -> tuple[float, Shapes]:
  """Milliseconds, and the shapes that decode; questions begin in their order."""
  runs = [
    shrinking(
      *(lengths[i : i + at_once], cost, QUARTERS, sizes), each=len(lengths)
    )
    for i in range(0, len(lengths), at_once)
  ]
  return sum(total for total, _ in runs), set().union(*(s for _, s in runs))


def refill(
  lengths: Lengths, cost: Cost, at_once: int, sizes: Sequence[int]
) -> tuple[float, Shapes]:
  """Likewise."""
  rows, fresh = at_once * lengths.shape[1], max(at_once // 4, 1)
  left, waiting = lengths[:at_once].copy(), lengths[at_once:]
  total, clock, found = 0.0, 0, set()
  while len(waiting):
    free = np.flatnonzero((left <= 0).all(1))[:fresh]
    if len(free) == fresh:
      free = free[: len(waiting)]
      left[free], waiting = waiting[: len(free)], waiting[len(free) :]
    else:
      columns = columns_at(clock, sizes)
      found.add((rows, columns))
      total += cost.of(rows, columns)
      left, clock = left - 1, clock + 1
  tail, shapes = shrinking(
    *(np.maximum(left, 0), cost, QUARTERS, sizes),
    clock=clock,
    each=len(lengths),
  )
  return total + tail, found | shapes


def compare(
  batches: Sequence[Lengths],
  cost: Cost,
  slots: int,
  narrowest: int,
) -> dict[str, tuple[float, float]]:
  """Mean milliseconds and number of shapes of each schedule."""
  longest = int(max(x.max() for x in batches))
  sizes = list(cache_columns(longest, narrowest=narrowest))
  found = {
    name: [shrinking(x, cost, shrink, sizes) for x in batches]
    for name, shrink in SHRINK.items()
  }
  found["whole"] = [shrinking(x, cost, QUARTERS, [longest]) for x in batches]
  if slots:
    questions, group = batches[0].shape
    at_once, _ = in_flight(slots, shards=1, each=questions, group=group)
    found["waves"] = [waves(x, cost, at_once, sizes) for x in batches]
    found["refill"] = [refill(x, cost, at_once, sizes) for x in batches]
  means = {
    name: (
      float(np.mean([total for total, _ in runs])),
      float(np.mean([len(shapes) for _, shapes in runs])),
    )
    for name, runs in found.items()
  }
  return means | {"ideal": (np.mean([ideal(x, cost) for x in batches]), 0)}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--questions", type=int, default=8)
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--longest", type=int, default=64, help="tokens")
  parser.add_argument("--batches", type=int, default=20)
  parser.add_argument("--narrowest", type=int, default=64, help="columns")
  parser.add_argument("--step", type=float, default=0.4, help="milliseconds")
  parser.add_argument("--row", type=float, default=0.05, help="milliseconds")
  parser.add_argument("--read", type=float, default=0.0, help="milliseconds")
  parser.add_argument("--shape", type=float, default=1.0, help="milliseconds")
  parser.add_argument("--slots", type=int, default=0, help="rows at once")
  given = parser.parse_args(arguments)
  batches = [
    draw_lengths(given.questions, given.group, given.longest, seed)
    for seed in range(given.batches)
  ]
  cost = Cost(
    step=given.step, row=given.row, shape=given.shape, read=given.read
  )
  found = compare(batches, cost, given.slots, given.narrowest)
  table = Table("schedule", "ms", "times faster", "programs")
  for name, (total, programs) in found.items():
    gain = found["wait"][0] / total
    table.add_row(name, f"{total:.1f}", f"{gain:.2f}", f"{programs:.1f}")
  Console().print(table)


if __name__ == "__main__":
  main()
