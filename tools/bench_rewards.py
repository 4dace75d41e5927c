"""Completions a second that rewards take in their worker processes.

  python tools/bench_rewards.py

Scores --groups rows of --size completions of some 250 words with an accuracy and
think_format on --workers processes, and checks each score. Half of a group are
right and say it alike, the others are wrong, each in its own way; "math" has
integers, decimals, fractions, roots and terms in equal shares. Prints a JSON
line: completions a second, the median of --repeats after a first that warms the
workers up.
"""

import argparse
import json
import os
import random
import statistics
import time

import numpy as np

from jaxvlm.scoring import Scorer
from jaxvlm.types import Example

WORDS = ("we", "see", "that", "two", "sides", "are", "3,", "so", "x^2", "= 25")


def integer(n: int, g: int) -> tuple[str, str, str]:
  """A row's answer, a right one, and a wrong one for each completion g."""
  return str(n), f" {n}", str(n + g)


def decimal(n: int, g: int) -> tuple[str, str, str]:
  return f"{n}.5", f"{n}.50", f"{n + g}.25"


def fraction(n: int, g: int) -> tuple[str, str, str]:
  return f"{n}/7", rf"\frac{{{2 * n}}}{{14}}", rf"\frac{{{n}}}{{{7 + g}}}"


def root(n: int, g: int) -> tuple[str, str, str]:
  return rf"{n}\sqrt{{3}}", rf"\sqrt{{{3 * n * n}}}", rf"{n + g}\sqrt{{2}}"


def term(n: int, g: int) -> tuple[str, str, str]:
  return f"{n}x+1", f"1+{n}x", f"{n + g}x-1"


def option(n: int, g: int) -> tuple[str, str, str]:
  letter, other = "ABCD"[n % 4], "ABCD"[(n + 1 + g % 3) % 4]
  return letter, rf"\text{{({letter})}}", f"{other}. a cat"


def amount(n: int, g: int) -> tuple[str, str, str]:
  return f"{n}", f"{n}.01", f"{2 * n + g}"


KINDS = {
  "math": (integer, decimal, fraction, root, term),
  "multiple_choice": (option,),
  "number(relative=0.05)": (amount,),
}


def make(
  name: str, groups: int, size: int
) -> tuple[list[Example], list[list[str]], np.ndarray]:
  """Rows, completions [Q][G], and what the first reward is to be [Q G]."""
  draw = random.Random(0)
  rows, completions = [], []
  right = np.arange(groups * size).reshape(groups, size) % 2 == 0
  kinds = KINDS[name]
  for q in range(groups):
    kind, n = kinds[q % len(kinds)], draw.randrange(2, 1000)
    gold = kind(n, 0)[0]
    rows.append(Example(problem="?", answer=gold, name=f"bench[{q}]"))
    completions.append([])
    for g in range(size):
      thought = " ".join(draw.choices(WORDS, k=250))
      _, good, bad = kind(n, g)
      answer = good if right[q, g] else bad
      completions[-1].append(
        f"<think> {thought} </think> It is \\boxed{{{answer}}}."
      )
  return rows, completions, right.astype(float)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--groups", type=int, default=500)
  parser.add_argument("--size", type=int, default=8)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5)
  given = parser.parse_args()
  rates = {}
  for name in KINDS:
    rows, completions, expected = make(name, given.groups, given.size)
    rewards = ((name, 0.9), ("think_format", 0.1))
    taken = []
    with Scorer(
      rewards=rewards, num_workers=given.workers, timeout=30.0
    ) as scorer:
      for _ in range(1 + given.repeats):
        started = time.perf_counter()
        scores = scorer.score(completions, rows)
        taken.append(time.perf_counter() - started)
        check(scores.parts, expected, name)
    rates[name] = expected.size / statistics.median(taken[1:])
  record = {
    "completions_per_second": {n: round(rate) for n, rate in rates.items()},
    "groups": given.groups,
    "size": given.size,
    "workers": given.workers,
    "repeats": given.repeats,
    "cores": len(os.sched_getaffinity(0)),
    "load": os.getloadavg()[0],
  }
  print(json.dumps(record))


def check(
  parts: dict[str, np.ndarray], expected: np.ndarray, name: str
) -> None:
  """Raises AssertionError unless every completion has the score it is due."""
  assert expected.size > 0
  np.testing.assert_array_equal(parts[name], expected)
  np.testing.assert_array_equal(parts["think_format"], np.ones_like(expected))


if __name__ == "__main__":
  main()
