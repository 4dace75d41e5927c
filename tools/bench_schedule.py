"""What a rollout costs under each way to deal with rows that end early.

  python tools/bench_schedule.py [--questions 8 --group 8 --longest 64]

Nothing is decoded: lengths are drawn (lognormal, the median a sixth of the
longest), and a column of R rows is said to cost
`--column` + R * `--row` milliseconds. The defaults were fitted to two CPU cores
and the model of `configs/staged.py`; measure your own with `tools/bench.py`.

  wait      all rows decode until the longest has ended
  eighths   when an eighth of the rows is left, they go on in fewer blocks
  quarters  likewise a quarter: what the sampler does
  halves    likewise a half
  ideal     every row costs its own tokens, the longest its columns

With `--slots` fewer rows decode at once:

  waves     the next questions begin when the last row of these has ended
  refill    they take the place of questions that have ended: what the sampler
            does
"""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from jaxvlm.rollout.sampler import ladder

Lengths = Int[np.ndarray, "Q G"]
SHRINK = {"wait": 0, "eighths": 8, "quarters": 4, "halves": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """Milliseconds."""

  column: float  # of a step of the loop, whatever it decodes
  row: float  # of a row in it
  shape: float  # of going on in another shape

  def of(self, rows: int) -> float:
    return self.column + rows * self.row


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
  return cost.column * lengths.max() + cost.row * lengths.sum()


def shrinking(lengths: Lengths, cost: Cost, shrink: int) -> tuple[float, int]:
  """Milliseconds, and programs that decode."""
  questions, group = lengths.shape
  shapes = []
  if shrink:
    shapes = list(
      ladder(questions, (questions, group), shrink=shrink, fewest=1)
    )
  total, rows, programs = 0.0, questions * group, 1
  for column in range(lengths.max()):
    live = (lengths > column).sum(1)
    while shapes and -(-live // shapes[0][1]).sum() <= shapes[0][0]:
      blocks, width = shapes.pop(0)
      if rows != blocks * width:
        rows, total, programs = blocks * width, total + cost.shape, programs + 1
    total += cost.of(rows)
  return total, programs


def slotted(
  lengths: Lengths, cost: Cost, slots: int, *, refill: bool
) -> tuple[float, int]:
  """Milliseconds, and programs that decode; questions begin in their order."""
  questions, group = lengths.shape
  at_once = min(max(slots // group, 1), questions)
  fresh = max(at_once // 4, 1) if refill else at_once
  left, waiting = lengths[:at_once].copy(), lengths[at_once:]
  total = 0.0
  while len(waiting):
    free = np.flatnonzero((left <= 0).all(1))[:fresh]
    if len(free) == fresh:
      free = free[: len(waiting)]
      left[free], waiting = waiting[: len(free)], waiting[len(free) :]
    else:
      left -= 1
      total += cost.of(at_once * group)
  tail, programs = shrinking(np.maximum(left, 0), cost, 4 if refill else 0)
  return total + tail, programs


def compare(
  batches: Sequence[Lengths], cost: Cost, slots: int
) -> dict[str, tuple[float, float]]:
  """Mean milliseconds and programs of each schedule."""
  found = {
    name: [shrinking(x, cost, shrink) for x in batches]
    for name, shrink in SHRINK.items()
  }
  if slots:
    for name in ("waves", "refill"):
      found[name] = [
        slotted(x, cost, slots, refill=name == "refill") for x in batches
      ]
  found["ideal"] = [(ideal(x, cost), 0) for x in batches]
  means = {name: np.mean(runs, axis=0) for name, runs in found.items()}
  return {name: (total, programs) for name, (total, programs) in means.items()}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--questions", type=int, default=8)
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--longest", type=int, default=64, help="tokens")
  parser.add_argument("--batches", type=int, default=20)
  parser.add_argument("--column", type=float, default=0.4, help="milliseconds")
  parser.add_argument("--row", type=float, default=0.05, help="milliseconds")
  parser.add_argument("--shape", type=float, default=1.0, help="milliseconds")
  parser.add_argument("--slots", type=int, default=0, help="rows at once")
  given = parser.parse_args(arguments)
  batches = [
    draw_lengths(given.questions, given.group, given.longest, seed)
    for seed in range(given.batches)
  ]
  cost = Cost(column=given.column, row=given.row, shape=given.shape)
  found = compare(batches, cost, given.slots)
  table = Table("schedule", "ms", "times faster", "programs")
  for name, (total, programs) in found.items():
    gain = found["wait"][0] / total
    table.add_row(name, f"{total:.1f}", f"{gain:.2f}", f"{programs:.1f}")
  Console().print(table)


if __name__ == "__main__":
  main()
