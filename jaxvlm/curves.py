"""curves.png: reward, held-out accuracy and length over a run's steps."""

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxvlm import paths
from jaxvlm.metrics import Record, read_records
from jaxvlm.paths import Path

# Okabe and Ito's colours, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _FAINT, _BAND = "#222222", "#888888", "#F4F4F4"
_MEAN = re.compile(r"(?P<capability>[^/]+)/(?P<kind>mean@\d+)")
# Evaluations: mean@k and greedy. Marks stand whole at the ends of the axis.
_FULL: Any = {
  "marker": "o",
  "markersize": 5,
  "linewidth": 1.6,
  "clip_on": False,
  "zorder": 4,
}
_OPEN: Any = {
  **_FULL,
  "marker": "s",
  "markersize": 4.5,
  "markerfacecolor": "white",
  "linestyle": "--",
  "linewidth": 1.1,
}
_STYLE: Any = {
  "font.size": 10,
  "font.family": "DejaVu Sans",
  "axes.edgecolor": "#BBBBBB",
  "axes.labelcolor": _INK,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "grid.color": "#E4E4E4",
  "text.color": _INK,
  "xtick.color": _FAINT,
  "ytick.color": _FAINT,
}


def draw_curves(workdir: Path) -> None:
  """Draws workdir/curves.png from workdir/metrics.jsonl; x is the global step.

  Three panels: training reward, raw and smoothed; held-out accuracy of each
  capability, mean@k (full line) and greedy (dashed) with a mark for each
  evaluation; completion length in training, and held out as marks. Stages
  stand in bands of their own. A run without records leaves no picture.
  """
  records = read_records(paths.path(workdir) / "metrics.jsonl")
  if not records:
    return
  evaluations = [r for r in records if r["kind"] == "eval"]
  with matplotlib.rc_context(_STYLE):
    # A canvas of its own: pyplot's global state is the user's.
    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    spans = _spans(records)
    for axes in (top, middle, bottom):
      axes.grid(axis="y")
      axes.set_axisbelow(True)
      _draw_stages(axes, spans)
    _name_stages(top, spans)
    _draw_training(top, records, spans, "reward")
    top.set_ylabel("training reward")
    _draw_accuracy(middle, evaluations)
    _draw_training(bottom, records, spans, "length")
    _draw_lengths(bottom, evaluations)
    bottom.set_xlabel("global step")
    _explain(figure, evaluations)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
  paths.write(paths.path(workdir) / "curves.png", png.getvalue())


def _spans(records: list[Record]) -> dict[str, tuple[int, int]]:
  """First and last x of each stage; a stage begins where another ended."""
  spans: dict[str, tuple[int, int]] = {}
  for record in records:
    if record["kind"] == "train":
      step = record["global_step"]
      first, _ = spans.get(record["stage"], (step - 1, step))
      spans[record["stage"]] = (first, step)
  return spans


def _draw_stages(axes: Axes, spans: dict[str, tuple[int, int]]) -> None:
  for i, (first, last) in enumerate(spans.values()):
    if i % 2:
      axes.axvspan(first, last, color=_BAND, zorder=0)
    if i:
      axes.axvline(first, color="#BBBBBB", linewidth=0.8, zorder=1)
  if spans:
    axes.set_xlim(0, max(last for _, last in spans.values()))


def _name_stages(axes: Axes, spans: dict[str, tuple[int, int]]) -> None:
  for name, (first, last) in spans.items():
    axes.annotate(
      name.replace("_", "\n"),
      ((first + last) / 2, 1.0),
      xycoords=("data", "axes fraction"),
      xytext=(0, 4),
      textcoords="offset points",
      ha="center",
      va="bottom",
      fontweight="bold",
      fontsize=9,
    )


def _draw_training(
  axes: Axes,
  records: list[Record],
  spans: dict[str, tuple[int, int]],
  name: str,
) -> None:
  """A metric of the training steps, a line for each stage."""
  for stage, (first, last) in spans.items():
    steps, values = _series(
      [r for r in records if r["kind"] == "train" and r["stage"] == stage],
      name,
    )
    if not len(steps):
      axes.annotate(
        f"no {name}: supervised",
        ((first + last) / 2, 0.5),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="center",
        color=_FAINT,
        fontsize=9,
      )
      continue
    axes.plot(steps, values, color=_FAINT, linewidth=0.7, alpha=0.6)
    axes.plot(steps, _smooth(values), color=_INK, linewidth=1.8)


def _draw_accuracy(axes: Axes, evaluations: list[Record]) -> None:
  for colour, (capability, kind) in _capabilities(evaluations):
    steps, values = _series(evaluations, f"{capability}/{kind}")
    axes.plot(steps, 100 * values, **_FULL, color=colour)
    steps, values = _series(evaluations, f"{capability}/greedy")
    axes.plot(steps, 100 * values, **_OPEN, color=colour)
  axes.set_ylim(0, 100)
  axes.set_ylabel("held-out accuracy (%)")


def _draw_lengths(axes: Axes, evaluations: list[Record]) -> None:
  for colour, (capability, _) in _capabilities(evaluations):
    steps, values = _series(evaluations, f"{capability}/length")
    axes.plot(steps, values, **_FULL | {"linestyle": ""}, color=colour)
  axes.set_ylim(bottom=0)
  axes.set_ylabel("completion length (tokens)")


def _explain(figure: Figure, evaluations: list[Record]) -> None:
  """One legend for all panels, below them."""
  lines = [Line2D([], [], color=_INK, linewidth=1.8, label="training")]
  capabilities = _capabilities(evaluations)
  for colour, (capability, _) in capabilities:
    label = capability.replace("_", " ") + ", held out"
    lines.append(Line2D([], [], **_FULL, color=colour, label=label))
  if capabilities:
    kinds = ", ".join(sorted({kind for _, (_, kind) in capabilities}))
    lines.append(Line2D([], [], **_FULL, color=_FAINT, label=kinds))
    lines.append(Line2D([], [], **_OPEN, color=_FAINT, label="greedy"))
  figure.legend(
    handles=lines,
    loc="outside lower center",
    ncols=len(lines),
    frameon=False,
    fontsize=9,
  )


def _capabilities(
  evaluations: list[Record],
) -> list[tuple[str, tuple[str, str]]]:
  """Colour, and (capability, its mean@k), in the order of the records."""
  kinds: dict[str, str] = {}
  for record in evaluations:
    for name in record["metrics"]:
      if match := _MEAN.fullmatch(name):
        kinds.setdefault(match["capability"], match["kind"])
  return [
    (_COLOURS[i % len(_COLOURS)], item) for i, item in enumerate(kinds.items())
  ]


def _series(records: list[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of a metric where it was recorded; null becomes NaN."""
  pairs = [
    (r["global_step"], r["metrics"][name])
    for r in records
    if name in r["metrics"]
  ]
  steps = np.array([step for step, _ in pairs], dtype=float)
  values = np.array([value for _, value in pairs], dtype=float)
  return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
  """A centred moving mean over a tenth of the steps; NaN counts for nothing."""
  width = max(1, len(values) // 10) | 1
  known = np.isfinite(values)
  window = np.ones(width)
  centre = slice(width // 2, width // 2 + len(values))
  total = np.convolve(np.where(known, values, 0.0), window)[centre]
  count = np.convolve(known.astype(float), window)[centre]
  return np.divide(
    total, count, out=np.full(len(values), np.nan), where=count > 0
  )
