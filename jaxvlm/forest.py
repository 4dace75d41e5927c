"""The picture of arms: means and deviations over seeds, a row for each arm."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

OVERALL = "overall"  # a capability's place for the mean of all

_STYLE: Any = {
  "font.size": 9,
  "font.family": "DejaVu Sans",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.edgecolor": "#BBBBBB",
  "grid.color": "#E4E4E4",
}
_BLUE, _ORANGE, _GRAY = "#0072B2", "#D55E00", "#888888"  # Okabe and Ito's


def draw(found: Mapping[str, Any]) -> bytes:
  """A PNG: accuracy of each capability and overall, and length, by arm.

  Marks are means over seeds, bars their standard deviation, small dots the
  seeds; dashed lines are where all arms started.
  """
  capabilities = list(found["start"])
  kind, *_ = found["start"][OVERALL]
  arms = {arm: each["scores"] for arm, each in found["arms"].items()}
  with matplotlib.rc_context(_STYLE):
    height = 1.2 + 0.34 * len(arms)
    figure = Figure(
      figsize=(2.3 * (len(capabilities) + 1), height), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(capabilities) + 1, sharey=True)
    for axes, capability in zip(panels, capabilities, strict=False):
      lines = {
        word: {arm: scores[capability][word] for arm, scores in arms.items()}
        for word in (kind, "greedy")
      }
      start = {word: found["start"][capability][word]["mean"] for word in lines}
      _panel(axes, lines, start, scale=100)
      axes.set_title(capability.replace("_", " "), fontsize=9)
      axes.set_xlabel("held-out accuracy (%)")
    lengths = {arm: scores[OVERALL]["length"] for arm, scores in arms.items()}
    _panel(panels[-1], {"length": lengths}, {}, scale=1)
    panels[-1].set_title("completion length", fontsize=9)
    panels[-1].set_xlabel("length (tokens)")
    panels[0].set_yticks(range(len(arms)), list(arms))
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    handles, _ = panels[0].get_legend_handles_labels()
    handles += [
      Line2D([], [], color=_GRAY, marker=".", ls="", label="a seed"),
      Line2D([], [], color=_GRAY, lw=0.8, ls="--", label="mean at the start"),
    ]
    figure.legend(
      handles=handles, loc="outside lower center", ncols=4, frameon=False
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
  return png.getvalue()


def _panel(
  axes: Axes,
  lines: Mapping[str, Mapping[str, Any]],
  start: Mapping[str, float],
  *,
  scale: float,
) -> None:
  axes.grid(axis="x")
  axes.set_axisbelow(True)
  axes.tick_params(axis="y", length=0)
  for i, (word, arms) in enumerate(lines.items()):
    colour, shift = (_BLUE, _ORANGE)[i], (i - (len(lines) - 1) / 2) * 0.3
    if word in start:
      axes.axvline(scale * start[word], color=colour, linewidth=0.8, ls="--")
    places = [y + shift for y in range(len(arms))]
    axes.errorbar(
      [scale * each["mean"] for each in arms.values()],
      places,
      xerr=[scale * (each["sd"] or 0.0) for each in arms.values()],
      fmt="os"[i],
      color=colour,
      markersize=4.5,
      capsize=2.5,
      label=f"{word}, mean and standard deviation",
    )
    for y, each in zip(places, arms.values(), strict=True):
      seeds = [scale * value for value in each["values"]]
      axes.plot(seeds, [y] * len(seeds), ".", color=colour, alpha=0.35, ms=3)
