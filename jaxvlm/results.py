"""What a run came to: its tables, and summary.json.

Everything is read back from metrics.jsonl, so a resumed run shows the whole.
"""

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxvlm import paths
from jaxvlm.metrics import Record, read_records
from jaxvlm.paths import Path

_MEAN = re.compile(r"(?P<capability>[^/]+)/mean@\d+")
_TASK = re.compile(r"(?P<capability>[^/]+)/task/(?P<task>.+)/majority")
_PACKAGES = (
  *("jaxvlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
  *("grain", "transformers", "numpy", "pillow"),
)
_ARTEFACTS = {
  "curves": "curves.png",
  "records": "metrics.jsonl",
  "samples": "samples.jsonl",
  "summary": "summary.json",
  "TensorBoard": "tensorboard",
}
_LABEL_WIDTH, _STAGE_WIDTH = 34, 13  # columns of the table of tasks


def stage_ends(workdir: Path) -> list[Record]:
  """The last evaluation of each stage, in the order of the stages."""
  file = paths.path(workdir) / "metrics.jsonl"
  ends: dict[str, Record] = {}
  for record in read_records(file, kind="eval"):
    ends.pop(record["stage"], None)
    ends[record["stage"]] = record
  return list(ends.values())


def print_results(
  workdir: Path, console: Console, *, artefacts: Mapping[str, Path]
) -> None:
  """Prints what each stage changed, the tasks, and where everything is.

  Args:
    workdir: of a run whose evaluations `Logger` wrote.
    console: where to print (`display.make_console()`).
    artefacts: what else the run left, by a word for it; the files that this
      package always writes there are found by themselves.
  """
  ends = stage_ends(workdir)
  if ends:
    console.print(_stage_table(ends))
    tasks = _task_table(ends, console.width)
    if tasks.row_count:
      console.print(tasks)
  here = paths.path(workdir)
  places = {word: here / name for word, name in _ARTEFACTS.items()}
  found = {word: path for word, path in places.items() if path.exists()}
  for word, path in (found | dict(artefacts)).items():
    console.print(f"{word:<24}{path}", soft_wrap=True, markup=False)


def write_summary(
  workdir: Path,
  *,
  seconds: float,
  given: Mapping[str, Any],
  ledger: Mapping[str, Any],
  dropped: Mapping[str, Any],
) -> None:
  """Writes summary.json.

  Args:
    workdir: of the run.
    seconds: that the run took, over all its processes.
    given: what went in, by stage and held-out set (`account.write`).
    ledger: compute spent in each stage (`stages.Ledger` as a dict).
    dropped: rows left out, by data set and reason.
  """
  ends = stage_ends(workdir)
  summary = {
    **given,
    "evaluations": [
      {key: end[key] for key in ("stage", "global_step", "metrics")}
      for end in ends
    ],
    "ledger": ledger,
    "dropped": dropped,
    "seconds": seconds,
    "versions": versions(),
  }
  text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
  paths.write(paths.path(workdir) / "summary.json", text.encode())


def versions() -> dict[str, str]:
  """Of Python and of the packages that decide a run's numbers."""
  found = {"python": platform.python_version(), "machine": platform.machine()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"
  return found


def _stage_table(ends: list[Record]) -> Table:
  """Stages down, capabilities across; a line for each kind of score."""
  means: dict[str, str] = {}  # capability -> the name of its mean@k
  for end in ends:
    for name in end["metrics"]:
      if match := _MEAN.fullmatch(name):
        means[match["capability"]] = name
  table = Table(
    title="Held-out accuracy in percent, and its change by each stage",
    caption="length: mean tokens of a completion, and the share that was cut off",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    title_justify="left",
    caption_justify="left",
  )
  table.add_column("after stage", no_wrap=True, style="bold")
  table.add_column("", no_wrap=True)
  for capability in means:
    table.add_column(capability.replace("_", " "), justify="right")
  before: Mapping[str, float | None] = {}
  for end in ends:
    scores = end["metrics"]
    kinds = sorted({name.split("/")[1] for name in means.values()})
    for i, kind in enumerate(kinds):
      cells = [_change(scores, before, f"{c}/{kind}") for c in means]
      table.add_row(end["stage"] if i == 0 else "", kind, *cells)
    cells = [_change(scores, before, f"{c}/greedy") for c in means]
    table.add_row("", "greedy", *cells)
    lengths = [_length(scores, c) for c in means]
    table.add_row("", "length", *lengths, style="dim", end_section=True)
    before = scores
  return table


def _change(
  scores: Mapping[str, float | None],
  before: Mapping[str, float | None],
  name: str,
) -> Text:
  """A score in percent, and the points since the row before."""
  score, previous = scores.get(name), before.get(name)
  text = Text("–" if score is None else f"{100 * score:.1f}")
  if score is None or previous is None:
    return text.append(" " * 6)
  points = round(100 * (score - previous), 1)
  style = "green" if points > 0 else "red" if points < 0 else "dim"
  return text.append(f" {points:>+5.1f}", style=style)


def _length(scores: Mapping[str, float | None], capability: str) -> Text:
  """Mean tokens and, where there are any, the share of truncated ones."""
  length = scores.get(f"{capability}/length")
  truncated = scores.get(f"{capability}/truncated")
  text = Text("–" if length is None else f"{length:.1f}")
  return text.append(f" {truncated:>5.0%}" if truncated else " " * 6)


def _task_table(ends: list[Record], width: int) -> Table:
  """Tasks down, stages across: greedy accuracy beside the majority answer."""
  # Where not all stages fit, the newest do.
  ends = ends[-max(1, (width - _LABEL_WIDTH) // _STAGE_WIDTH) :]
  table = Table(
    title="Greedy accuracy of each task in percent",
    caption="majority: always giving the task's most frequent answer",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    title_justify="left",
    caption_justify="left",
  )
  table.add_column("task", no_wrap=True)
  table.add_column("majority", justify="right", style="dim")
  for end in ends:
    table.add_column(end["stage"].replace("_", " "), justify="right")
  shown = ""
  for name, majority in ends[-1]["metrics"].items():
    match = _TASK.fullmatch(name)
    if match is None or majority is None:
      continue
    if match["capability"] != shown:
      shown = match["capability"]
      table.add_row(Text(shown.replace("_", " "), style="bold"))
    greedy = f"{shown}/task/{match['task']}/greedy"
    cells = [_above(end["metrics"].get(greedy), majority) for end in ends]
    table.add_row(f"  {match['task']}", f"{100 * majority:.1f}", *cells)
  return table


def _above(score: float | None, majority: float) -> Text:
  """A score in percent, red where the majority answer does as well."""
  if score is None:
    return Text("–")
  return Text(f"{100 * score:.1f}", style="red" if score <= majority else "")
