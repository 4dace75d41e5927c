"""Says which figures of a benchmark got worse between two versions.

  python tools/bench_compare.py OLD NEW

OLD and NEW hold JSON lines as bench.py and bench_scaling.py print them, several
runs of the same work in a file if there are. A figure is a (peer, model, work,
metric) on a device; lines that have no `metric` are left out.

Each figure is judged by how many times as good the new one is: the ratio of the
medians, turned so that more is better. Its interval is a bootstrap's: runs are
drawn with replacement, then repetitions of each, 10,000 times, and 95 % of the
ratios lie within. A rank test would not do: of 3 repetitions against 3, as
large models have, it cannot say anything at 5 %, whereas here the interval
becomes that of the extremes, and a drop is one that leaves no overlap. Nor do
repetitions of one process tell of how processes differ; therefore runs are
drawn too, where a file has several, and a drop must be more than --floor.

Of memory and of compiling a line tells one number a run, beside its figure.
BESIDE says by how much runs of the same programs differ there: no less is a
drop, and of one run in each file the ratio is the interval. Compiling takes
time and memory, so runs that read programs from a cache are compared with such
runs alone.

  dropped   all of the interval is below 1 - floor
  rose      all of it is above 1 + floor
  same      neither, or a figure without noise (`exact`) within the floor
  unknown   one value in a file is no interval, but for memory and compiling

Exit status 1 where something dropped, 2 where the files cannot be compared:
other devices, threads or dtype. The last line of stdout is a JSON object.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

DRAWS = 10_000
COVERED = 0.95
FLOOR = 0.02
# What a line tells beside its figure, and how much of it is noise: nobody waits
# for a quiet machine to compile.
BESIDE = {
  "peak_rss_mb": 0.1,
  "peak_device_mb": 0.02,
  "first_call_s": 0.35,
  "compile_s": 0.35,
}
# Figures taken under other conditions are not compared.
CONDITIONS = ("device", "threads", "dtype")
_COLOURS = {"dropped": "red", "rose": "green", "same": "", "unknown": "yellow"}

Key = tuple[str, str, str, str]  # peer, model, work, metric


class Unequal(Exception):
  """The files cannot be compared, and why."""


@dataclasses.dataclass(kw_only=True)
class Figure:
  """All runs of a figure in a file."""

  conditions: tuple[Any, ...]
  higher_is_better: bool
  runs: list[np.ndarray]
  exact: bool = False  # the same number each time, as compiled bytes are
  noise: float = 0.0  # by how much runs of one number are known to differ

  @property
  def median(self) -> float:
    return float(np.median(np.concatenate(self.runs)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """A figure of both files."""

  key: Key
  device: str
  old: float
  new: float
  ratio: float  # times as good
  interval: tuple[float, float] | None  # None: unknown
  word: str


Figures = dict[tuple[Key, str], Figure]  # by key and device


def read(file: pathlib.Path) -> Figures:
  """The figures of a file.

  Raises:
    Unequal: a line that is no figure, or runs under several conditions.
  """
  found: Figures = {}
  for number, text in enumerate(file.read_text().splitlines(), 1):
    if not text.strip():
      continue
    try:
      own = figures_of(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
      raise Unequal(
        f"{file}:{number}: not a line of bench.py or bench_scaling.py "
        f"({type(error).__name__}: {error})."
      ) from error
    for (key, device), figure in own.items():
      known = found.setdefault((key, device), figure)
      if known.conditions != figure.conditions:
        raise Unequal(
          f"{file}: runs of {name_of(key)} differ in "
          f"{differences(known.conditions, figure.conditions)}; compare them "
          "in files of their own."
        )
      if known is not figure:
        known.runs += figure.runs
  if not found:
    raise Unequal(f"{file}: no figures.")
  return found


def figures_of(line: Mapping[str, Any]) -> Figures:
  """The figures of one run: what it measured, and what it tells beside it."""
  if "metric" not in line:
    return {}
  peer, model, work = line["peer"], line["model"], line["work"]
  conditions = tuple(line[name] for name in CONDITIONS)
  values = np.asarray(line.get("values") or [line["median"]], float)
  if not (values > 0).all():
    raise ValueError("values must be positive")
  found = {
    line["metric"]: Figure(
      conditions=conditions,
      higher_is_better=bool(line["higher_is_better"]),
      runs=[values],
      exact=bool(line.get("exact")),
    )
  }
  cached = " cached" if line.get("cached") else ""
  for name, noise in BESIDE.items():
    if value := float(line.get(name, 0)):
      found[name + cached] = Figure(
        conditions=conditions,
        higher_is_better=False,
        runs=[np.array([value])],
        noise=noise,
      )
  return {
    ((peer, model, work, metric), line["device"]): figure
    for metric, figure in found.items()
  }


def name_of(key: Key) -> str:
  peer, model, work, metric = key
  return f"{peer} {model} {work} {metric}"


def differences(old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
  return ", ".join(
    f"{name} ({a!r} and {b!r})"
    for name, a, b in zip(CONDITIONS, old, new, strict=True)
    if a != b
  )


def check_conditions(old: Figures, new: Figures) -> None:
  """Refuses figures of both files that have no condition in common.

  Raises:
    Unequal: names the first of them, and how many there are.
  """
  wrong = []
  for (key, device), figure in old.items():
    others = [
      other
      for (k, d), other in new.items()
      if k == key and (d == device or (k, d) not in old)
    ]
    if others and all(o.conditions != figure.conditions for o in others):
      wrong.append((key, figure.conditions, others[0].conditions))
  if wrong:
    key, first, second = wrong[0]
    raise Unequal(
      f"{len(wrong)} of the figures were taken under other conditions, "
      f"{name_of(key)} first: {differences(first, second)}. Take them again on "
      "one machine."
    )


def draw_medians(
  random: np.random.Generator, runs: Sequence[np.ndarray]
) -> np.ndarray:
  """Medians of DRAWS resamples, of runs and of the repetitions in each."""
  most = max(run.size for run in runs)
  table = np.stack([np.resize(run, most) for run in runs])
  sizes = np.array([run.size for run in runs])
  drawn = random.integers(len(runs), size=(DRAWS, len(runs)))
  own = sizes[drawn][..., None]  # repetitions of each drawn run
  places = random.integers(own, size=(*drawn.shape, most))
  values = table[drawn[..., None], places]
  # A short run gives as many draws as it has repetitions.
  values[np.arange(most) >= own] = np.nan
  return np.nanmedian(values.reshape(DRAWS, -1), axis=1)


def judge(
  key: Key, device: str, old: Figure, new: Figure, floor: float
) -> Verdict:
  def gain(before: Any, after: Any) -> Any:
    return after / before if old.higher_is_better else before / after

  ratio = float(gain(old.median, new.median))
  floor = max(floor, old.noise)
  fewest = min(sum(x.size for x in figure.runs) for figure in (old, new))
  interval: tuple[float, float] | None = None
  if (old.exact and new.exact) or (old.noise and fewest == 1):
    interval = (ratio, ratio)
  elif fewest > 1:
    random = np.random.default_rng(0)
    ratios = gain(*(draw_medians(random, f.runs) for f in (old, new)))
    outside = (1 - COVERED) / 2
    low, high = np.quantile(ratios, [outside, 1 - outside])
    interval = (float(low), float(high))
  if interval is None:
    word = "unknown"
  elif interval[1] < 1 - floor:
    word = "dropped"
  elif interval[0] > 1 + floor:
    word = "rose"
  else:
    word = "same"
  return Verdict(
    key=key,
    device=device,
    old=old.median,
    new=new.median,
    ratio=ratio,
    interval=interval,
    word=word,
  )


def compare(old: Figures, new: Figures, floor: float) -> list[Verdict]:
  """Verdicts of what both have, in the order of the old file.

  Raises:
    Unequal: as `check_conditions`.
  """
  check_conditions(old, new)
  return [
    judge(*place, figure, new[place], floor)
    for place, figure in old.items()
    if place in new
  ]


def make_table(verdicts: Sequence[Verdict]) -> Table:
  table = Table("figure", "old", "new", "times as good", "verdict")
  for one in verdicts:
    span = ""
    if one.interval is not None:
      span = " ({:.3f} to {:.3f})".format(*one.interval)
    table.add_row(
      name_of(one.key),
      f"{one.old:.4g}",
      f"{one.new:.4g}",
      f"{one.ratio:.3f}{span}",
      one.word,
      style=_COLOURS[one.word],
    )
  return table


def summary(
  verdicts: Sequence[Verdict], missing: Mapping[str, list[str]]
) -> dict[str, Any]:
  counts = collections.Counter(one.word for one in verdicts)
  return {
    **{word: counts[word] for word in _COLOURS},
    **missing,
    "figures": [
      {
        **dict(zip(("peer", "model", "work", "metric"), one.key, strict=True)),
        "device": one.device,
        "old": one.old,
        "new": one.new,
        "ratio": round(one.ratio, 5),
        "interval": one.interval and [round(x, 5) for x in one.interval],
        "verdict": one.word,
      }
      for one in verdicts
    ],
  }


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("old", type=pathlib.Path)
  parser.add_argument("new", type=pathlib.Path)
  parser.add_argument(
    "--floor", type=float, default=FLOOR, help="of a drop, as a share"
  )
  given = parser.parse_args(arguments)
  try:
    old, new = read(given.old), read(given.new)
    verdicts = compare(old, new, given.floor)
  except (Unequal, OSError) as error:
    print(f"bench_compare: {error}", file=sys.stderr)
    sys.exit(2)
  console = Console()
  if not console.is_terminal:
    console = Console(width=110)
  console.print(make_table(verdicts))
  missing = {
    f"only_{name}": [
      f"{name_of(key)} on {d}" for key, d in here if (key, d) not in there
    ]
    for name, here, there in (("old", old, new), ("new", new, old))
  }
  for name, file in (("old", given.old), ("new", given.new)):
    for one in missing[f"only_{name}"]:
      console.print(f"only in {file}: {one}", markup=False, soft_wrap=True)
  print(json.dumps(summary(verdicts, missing)))
  if any(one.word == "dropped" for one in verdicts):
    sys.exit(1)


if __name__ == "__main__":
  main()
