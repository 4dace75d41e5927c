"""How time and memory of rollout and update grow, against what is expected.

  python tools/bench_scaling.py [--axes=group,depth] [--most=4] [--out DIR]

One size grows and the others stay at BASE, on one device, with random weights
of a tiny model: completions of a question, tokens of a completion, text tokens
of the prompt, pictures of 224 x 224, layers of the decoder. Programs:

  rollout  all completions, to their full length
  prompt   the same, ended at the first token: what is not decoding
  update   one GRPO update, the reference's logprobs included

and figures: seconds of a call that begins and ends on the host; MB, arguments,
results and scratch of the largest compiled program; seconds of compiling, by
XLA alone.

LAWS says what each should do. A law about growth is the highest power, for the
slope of log figure over the upper half of the sizes, against log size, or the log
of the tokens of a row, or of the operations that the program needs, those of
attention too (operations.py says what counts). One about independence is the most
that the last figure may differ from the first.

Shows a table on stderr, writes scaling.png to --out, and prints a JSON line a
figure, which bench_compare.py reads, and one a law.
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

# Where the other tools are.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jaxvlm import compiling, heap, models
from jaxvlm.display import PLAIN_WIDTH, Display
from jaxvlm.types import Question
from tools import bench, bench_work, operations
from tools.bench import Lab

SIDE = 224  # of a picture, pixels
TOKENS = 2048  # of a microbatch
AXES: dict[str, tuple[int, ...]] = {
  "group": (2, 4, 8, 16, 32),
  "completion": (64, 128, 256, 512, 1024, 2048, 4096),
  "prompt": (64, 128, 256, 512, 1024, 2048, 4096),
  "images": (1, 2, 4, 8),
  "depth": (4, 8, 16, 32),
}
UNITS = {
  "group": "completions of a question",
  "completion": "tokens of a completion",
  "prompt": "text tokens of the prompt",
  "images": "pictures",
  "depth": "layers of the decoder",
}
FIGURES = {"s": "seconds", "mb": "MB", "compile_s": "seconds of compiling"}
PROGRAMS = ("rollout", "prompt", "update")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of one point; a question is one prompt with its completions."""

  group: int = 4
  completion: int = 64
  prompt: int = 64  # text tokens, beside those of pictures
  images: int = 1
  depth: int = 2


BASE = Sizes()
# Above a law's power: buffers grow in steps, and clocks have noise.
SLACK = 0.15
CHANGE = 0.5  # the most that an independent figure may change
SHORTEST = 0.2  # seconds of a repetition, of several calls where one is shorter


@dataclasses.dataclass(frozen=True)
class Law:
  """What a figure of a program should do as a size grows, and why."""

  program: str
  figure: str
  _: dataclasses.KW_ONLY
  says: str
  power: float | None  # that it grows with at most; None: it is independent
  of: str = "size"  # or "tokens" of a row, or "operations" that are needed


LAWS: dict[str, tuple[Law, ...]] = {
  "group": (
    Law(
      "rollout", "s", power=1, says="linear in rows, beside a step's own cost"
    ),
    Law("rollout", "mb", power=1, says="linear in rows"),
    Law("prompt", "s", power=None, says="read once for all completions"),
    # Attention skips other completions: dense, the slope would be 2.
    Law("update", "s", power=1, says="linear in tokens", of="tokens"),
    Law("update", "mb", power=1, says="linear in tokens", of="tokens"),
  ),
  "completion": (
    # Each step reads at most twice the columns that are written, mostly.
    Law("rollout", "s", power=1, says="linear in them", of="operations"),
    Law("rollout", "mb", power=1, says="linear"),
    Law("update", "s", power=1, says="linear in them", of="operations"),
    Law("update", "mb", power=1, says="linear in tokens", of="tokens"),
  ),
  "prompt": (
    Law("rollout", "s", power=1, says="linear in them", of="operations"),
    Law("rollout", "mb", power=1, says="linear"),
    Law("prompt", "s", power=1, says="linear in them", of="operations"),
    Law("update", "s", power=1, says="linear in them", of="operations"),
    Law("update", "mb", power=1, says="linear in tokens", of="tokens"),
  ),
  "images": (
    # Patches see their own picture alone; the prompt grows by its tokens.
    Law("rollout", "s", power=1, says="linear"),
    Law("rollout", "mb", power=1, says="linear"),
    Law("prompt", "s", power=1, says="linear"),
    Law("update", "s", power=1, says="linear"),
    Law("update", "mb", power=1, says="linear"),
  ),
  "depth": (
    Law("rollout", "s", power=1, says="linear"),
    Law("rollout", "mb", power=1, says="linear"),
    # Prefill scans its layers, decoding has them unrolled.
    Law("rollout", "compile_s", power=1, says="linear: decoding is unrolled"),
    Law("update", "s", power=1, says="linear"),
    Law("update", "mb", power=1, says="linear"),
    Law("update", "compile_s", power=None, says="layers are scanned"),
  ),
}

Point = dict[tuple[str, str], list[float]]  # by program and figure


# -- measuring -----------------------------------------------------------------


@functools.cache  # laws ask for it as often as for operations
def make_network(depth: int) -> models.Network:
  config = bench_work.read_shape(
    bench_work.qwen25vl(
      {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
      },
      {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
      },
    )
  )
  return models.Network(
    config=config,
    dtype=bench.usual_dtype(),
    param_dtype="float32",
    remat="none",
    attention=models.choose_attention("auto"),
  )


def make_lab(sizes: Sizes) -> Lab:
  network = make_network(sizes.depth)
  return Lab(
    network=network,
    params=network.init(0),
    reference=lambda: network.init(1),
    arrays={},
    group=sizes.group,
    length=sizes.completion,
    microbatch_tokens=TOKENS,
  )


def make_question(lab: Lab, sizes: Sizes) -> Question:
  """Pictures and then text."""
  random, config = np.random.default_rng(0), lab.network.config
  _, pixels, grids = bench_work.draw_pictures(
    random, config, sizes.images, SIDE
  )
  tokens = int(grids[0].prod()) // lab.layout.patches_per_token
  shown = [
    config.vision_start_token_id,
    *[config.image_token_id] * tokens,
    config.vision_end_token_id,
  ]
  text = bench_work.draw_text(random, config, (sizes.prompt,))
  ids = np.concatenate([np.tile(shown, sizes.images), text])
  return lab.question(0, ids, pixels, grids)


def row_tokens(sizes: Sizes) -> int:
  """Tokens of a row of the update."""
  shown = (SIDE // 28) ** 2 + 2  # pictures of patches of 14, merged by twos
  pictures = sizes.images * shown
  return pictures + sizes.prompt + sizes.group * sizes.completion


def measure(sizes: Sizes, *, reps: int, longest_wait: float) -> Point:
  """Repetitions of each figure."""
  lab = make_lab(sizes)
  questions = [make_question(lab, sizes)]
  shape = (len(questions), sizes.group, sizes.completion)
  random = np.random.default_rng(1)
  ids = bench_work.draw_text(random, lab.network.config, shape)
  values = random.normal(size=shape[:2])
  point: Point = {}

  def sample(limit: int) -> None:
    lab.sampler.sample(
      lab.sampler.weights(lab.params),
      questions,
      key=jax.random.key(0),
      draws=lab.draws,
      limits=np.full(shape[:2], limit, np.int32),
    )

  def take(program: str, run: Callable[[], None], *, compiles: bool) -> None:
    if compiles:
      megabytes, seconds = compile_by(run)
      point[program, "mb"] = [megabytes]
      point[program, "compile_s"] = [seconds]
    started = time.perf_counter()
    run()
    calls = max(1, round(SHORTEST / (time.perf_counter() - started)))
    walls, _ = bench.repeated(
      lambda: [run() for _ in range(calls)], reps, longest_wait=longest_wait
    )
    point[program, "s"] = [wall / calls for wall in walls]

  take("rollout", lambda: sample(sizes.completion), compiles=True)
  take("prompt", lambda: sample(1), compiles=False)
  state = lab.learner.init(jax.tree.map(jnp.copy, lab.params))

  def update() -> None:
    nonlocal state
    state, _ = lab.update(state, questions, ids, values, None, lab.reference)

  take("update", update, compiles=True)
  return point


def compile_by(run: Callable[[], None]) -> tuple[float, float]:
  """MB of the largest program that a first call compiles, and seconds of XLA.

  All programs of before are dropped, so that none is shared. This way nothing
  need be known of how many programs a call has, nor of their arguments.
  """
  jax.clear_caches()
  gc.collect()
  before = compiling.tally().seconds
  run()
  seconds = compiling.tally().seconds - before
  return largest_program() / 1e6, seconds


def largest_program() -> int:
  """Bytes that the largest of the programs that now are needs, at its peak."""
  client = jax.devices()[0].client
  return max(
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    + stats.temp_size_in_bytes
    - stats.alias_size_in_bytes  # donated: argument and result are one
    for stats in (
      program.get_compiled_memory_stats()
      for program in client.live_executables()
    )
  )


def measure_all(
  axes: Mapping[str, Sequence[int]],
  display: Display,
  *,
  reps: int,
  longest_wait: float,
) -> dict[str, list[Point]]:
  """Points of each axis, in the order of its sizes; equal ones are one."""
  plans = {
    axis: [dataclasses.replace(BASE, **{axis: size}) for size in sizes]
    for axis, sizes in axes.items()
  }
  found: dict[Sizes, Point] = {}
  costs = {s: _cost(s) for plan in plans.values() for s in plan}
  # What is left is in tokens, so that the time left is that of long rows too.
  with display.task("tokens", total=sum(costs.values())) as advance:
    for axis, plan in plans.items():
      for sizes in plan:
        if sizes in found:
          continue
        found[sizes] = measure(sizes, reps=reps, longest_wait=longest_wait)
        advance(costs[sizes])
        seconds = ", ".join(
          f"{program} {statistics.median(found[sizes][program, 's']):.3g} s"
          for program in PROGRAMS
        )
        display.print(f"{axis} {getattr(sizes, axis)}: {seconds}")
  return {axis: [found[s] for s in plan] for axis, plan in plans.items()}


def _cost(sizes: Sizes) -> int:
  compiling = 5000  # in tokens of a row
  return compiling + row_tokens(sizes) * sizes.depth // BASE.depth


# -- laws ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """A law, and what was measured."""

  axis: str
  law: Law
  sizes: tuple[int, ...]
  medians: tuple[float, ...]
  measured: float  # slope, or relative change

  @property
  def holds(self) -> bool:
    if self.law.power is None:
      return abs(self.measured) <= CHANGE
    return self.measured <= self.law.power + SLACK

  @property
  def expected_words(self) -> str:
    law = self.law
    if law.power is None:
      return f"independent: {law.says}"
    of = "" if law.of == "size" else f" of {law.of}"
    return f"power at most {law.power:g}{of}: {law.says}"

  @property
  def measured_words(self) -> str:
    if self.law.power is None:
      return f"{self.measured:+.0%}"
    return f"power {self.measured:.2f}"


def fit_slope(sizes: Iterable[float], values: Iterable[float]) -> float:
  """The exponent over the upper half of the sizes, two of them at least."""
  x, y = np.log(list(sizes)), np.log(list(values))
  half = min(len(x) // 2, len(x) - 2)
  return float(np.polyfit(x[half:], y[half:], 1)[0])


def extent(law: Law, axis: str, size: int) -> float:
  """What a law's figure grows with, where an axis has this size."""
  sizes = dataclasses.replace(BASE, **{axis: size})
  if law.of == "tokens":
    return row_tokens(sizes)
  return needed(law.program, sizes) if law.of == "operations" else size


def needed(program: str, sizes: Sizes) -> float:
  """Operations of a call."""
  length = 1 if program == "prompt" else sizes.completion
  batch = operations.Batch(
    prompts=np.array([row_tokens(dataclasses.replace(sizes, group=0))]),
    completions=np.full((1, sizes.group), length),
    grids=np.full((sizes.images, 3), [1, SIDE // 14, SIDE // 14]),
  )
  count = operations.of_update if program == "update" else operations.of_rollout
  return count(make_network(sizes.depth), batch, at_once=TOKENS).flops


def judge(
  axis: str, sizes: Sequence[int], points: Sequence[Point]
) -> list[Finding]:
  findings = []
  for law in LAWS[axis]:
    medians = [
      statistics.median(point[law.program, law.figure]) for point in points
    ]
    if law.power is None:
      measured = medians[-1] / medians[0] - 1
    else:
      against = [extent(law, axis, size) for size in sizes]
      measured = fit_slope(against, medians)
    findings.append(
      Finding(
        axis=axis,
        law=law,
        sizes=tuple(sizes),
        medians=tuple(medians),
        measured=measured,
      )
    )
  return findings


# -- showing -------------------------------------------------------------------


def make_table(
  axes: Mapping[str, Sequence[int]],
  points: Mapping[str, Sequence[Point]],
  findings: Sequence[Finding],
) -> Table:
  """A row for each axis and program."""
  table = Table(
    *("axis", "program", "sizes", "seconds", "MB", "expected", "measured"),
    show_lines=True,
  )
  for axis, sizes in axes.items():
    for program in PROGRAMS:
      own = [f for f in findings if f.axis == axis and f.law.program == program]
      if not own:
        continue
      columns = [
        "\n".join(f"{m:.3g}" for m in _medians(points[axis], program, figure))
        for figure in ("s", "mb")
      ]
      table.add_row(
        axis,
        program,
        "\n".join(map(str, sizes)),
        *columns,
        "\n".join(f"{FIGURES[f.law.figure]}: {f.expected_words}" for f in own),
        "\n".join(
          f.measured_words if f.holds else f"[red]{f.measured_words}, no[/red]"
          for f in own
        ),
      )
  return table


def _medians(points: Sequence[Point], program: str, figure: str) -> list[float]:
  return [
    statistics.median(point[program, figure])
    for point in points
    if (program, figure) in point
  ]


# Okabe and Ito's colours, told apart with any colour vision.
_COLOURS = {"rollout": "#0072B2", "prompt": "#E69F00", "update": "#D55E00"}
_STYLE: Any = {
  "font.size": 9,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.edgecolor": "#BBBBBB",
  "grid.color": "#E4E4E4",
  "xtick.minor.size": 0,
}


def draw(
  axes: Mapping[str, Sequence[int]],
  points: Mapping[str, Sequence[Point]],
  findings: Sequence[Finding],
  file: pathlib.Path,
) -> None:
  """A panel for each figure and axis; both scales are logarithmic."""
  with matplotlib.rc_context(_STYLE):
    figure = Figure(
      figsize=(1 + 2.9 * len(axes), 2.5 * len(FIGURES) + 0.8),
      layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(
      len(FIGURES), len(axes), squeeze=False, sharex="col", sharey="row"
    )
    for row, (name, unit) in enumerate(FIGURES.items()):
      for column, (axis, sizes) in enumerate(axes.items()):
        panel = panels[row, column]
        _draw_panel(panel, name, sizes, points[axis])
        own = [f for f in findings if (f.axis, f.law.figure) == (axis, name)]
        _draw_words(panel, own)
        if row == len(FIGURES) - 1:
          panel.set_xlabel(UNITS[axis])
        if column == 0:
          panel.set_ylabel(unit)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
      handles, labels, loc="outside upper left", ncols=4, frameon=False
    )
    figure.savefig(file, dpi=130)


def _draw_panel(
  panel: Axes, figure: str, sizes: Sequence[int], points: Sequence[Point]
) -> None:
  panel.set_xscale("log", base=2)
  panel.set_yscale("log")
  panel.yaxis.set_major_formatter(_plain)
  panel.yaxis.set_minor_formatter(_plain)
  panel.set_xticks(sizes, [str(size) for size in sizes])
  panel.grid()
  panel.set_axisbelow(True)
  for program in PROGRAMS:
    values = _medians(points, program, figure)
    if values:
      panel.plot(
        sizes,
        values,
        color=_COLOURS[program],
        marker="o",
        markersize=3.5,
        linewidth=1.4,
        label=program,
      )


def _plain(value: float, place: int) -> str:
  """0.02 for 2 x 10^-2; the other minor ticks have no number."""
  digit = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
  return f"{value:g}" if digit in (1, 2, 5) else ""


def _draw_words(panel: Axes, findings: Sequence[Finding]) -> None:
  """What was measured, in the programs' colours, above the panel."""
  for i, finding in enumerate(findings):
    words = finding.measured_words
    panel.annotate(
      words if finding.holds else f"{words} (!)",
      (0.0, 1.0),
      xycoords="axes fraction",
      xytext=(2 + 62 * i, 3),
      textcoords="offset points",
      color=_COLOURS[finding.law.program],
      fontsize=8,
    )


def lines(
  axes: Mapping[str, Sequence[int]],
  points: Mapping[str, Sequence[Point]],
  findings: Sequence[Finding],
) -> Iterable[dict[str, Any]]:
  """JSON lines: of each figure as bench.py has them, and of each law."""
  about = {
    "peer": "jaxvlm",
    "model": "scaling",
    "dtype": bench.usual_dtype(),
    **bench.surroundings(),
  }
  for axis, sizes in axes.items():
    for size, point in zip(sizes, points[axis], strict=True):
      for (program, figure), values in point.items():
        yield about | {
          "work": f"{program} {axis}={size}",
          "metric": figure,
          "median": statistics.median(values),
          "n": len(values),
          "values": [float(f"{value:.6g}") for value in values],
          "higher_is_better": False,
          "exact": figure == "mb",
        }
  for finding in findings:
    law = finding.law
    yield about | {
      "law": f"{law.program} {law.figure} by {finding.axis}",
      "sizes": finding.sizes,
      "medians": [float(f"{value:.6g}") for value in finding.medians],
      "expected": finding.expected_words,
      "measured": round(finding.measured, 4),
      "holds": finding.holds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--axes", default=",".join(AXES), help=f"of {', '.join(AXES)}"
  )
  parser.add_argument(
    "--most", type=int, help="sizes of each axis, the smallest; from 2"
  )
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
  parser.add_argument("--reps", type=int, default=3)
  parser.add_argument(
    "--wait",
    type=float,
    default=10.0,
    help="seconds to wait for a quiet machine, before a repetition",
  )
  given = parser.parse_args(arguments)
  heap.keep()
  names = given.axes.split(",")
  for name in names:
    if name not in AXES:
      parser.error(f"no axis {name!r}; there are {', '.join(AXES)}")
  if given.most is not None and given.most < 2:
    parser.error(f"--most={given.most}: growth needs two sizes")
  axes = {name: AXES[name][: given.most] for name in names}
  # A program that is read from a cache says nothing about compiling.
  jax.config.update("jax_enable_compilation_cache", False)
  console = Console(stderr=True, highlight=False)
  if not console.is_terminal:
    console = Console(stderr=True, highlight=False, width=PLAIN_WIDTH + 20)
  with Display(console) as display:
    points = measure_all(
      axes, display, reps=given.reps, longest_wait=given.wait
    )
  findings = [
    found
    for axis, sizes in axes.items()
    for found in judge(axis, sizes, points[axis])
  ]
  console.print(make_table(axes, points, findings))
  given.out.mkdir(parents=True, exist_ok=True)
  file = given.out / "scaling.png"
  draw(axes, points, findings, file)
  console.print(f"{file}", soft_wrap=True)
  for line in lines(axes, points, findings):
    print(json.dumps(line))


if __name__ == "__main__":
  main()
