"""How a device's work and communication grow over meshes, against what is expected.

  python tools/bench_scaling_mesh.py [--axes=data,tensor] [--most=4]

Programs of a step are compiled for 1, 2, 4 and 8 virtual CPU devices along one
axis of the mesh, and what each device does is read from their HLO; nothing is
run, for times of devices that share two cores say nothing. Strong scaling: the
same questions on more devices. Weak scaling: as many more questions. Programs:

  update   one update: gradients of all its microbatches, and the optimizer
  gather   the sampler's copy of the weights, once a step
  prefill  the prompts of a rollout
  decode   one token of all completions

and figures: flops of products, and bytes that a device receives, by kind of
collective. LAWS says what each should be, in numbers: from one device's work, the
size of the weights, or, where it is activations that travel, from what two
devices exchange.

Shows a table on stderr, and prints a JSON line a figure, which bench_compare.py
reads, and one a law. Exits with 1 where a law does not hold.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"
  # The partitioner decides what is counted; the backend's work changes nothing.
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"
  )

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

# Where the other tools are.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from configs import common
from jaxvlm import sharding
from jaxvlm.display import PLAIN_WIDTH, Display
from jaxvlm.models import Network
from jaxvlm.plan import hlo, programs
from jaxvlm.plan.batch import Lengths
from jaxvlm.plan.hlo import Cost
from jaxvlm.stages import Stage
from tools import bench, bench_work

AXES = ("data", "fsdp", "tensor")
SIZES = (1, 2, 4, 8)
MOST = SIZES[-1]
EACH = 4  # questions of a device, of eight or where they grow: they fill a row
GROUP, COMPLETION, PROMPT, VISUAL = 4, 64, 64, 16
# Of the compiler's names; the reason that a program has these parts.
PROGRAMS = {
  "gradient": "update",
  "optimizer step": "update",
  "decode weights": "gather",
  "prefill": "prefill",
  "decode": "decode",
}
TOLERANCE = 0.15  # prompts and pictures are padded to a few sizes
NOTHING = 1024  # bytes; a loop's end and a sum of counts are agreed on

Point = Mapping[tuple[str, str], float]  # by program and figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A number of devices along one axis, and of questions."""

  axis: str
  devices: int
  questions: int

  @property
  def shards(self) -> int:
    """Parts that the questions are split into."""
    return 1 if self.axis == "tensor" else self.devices

  @property
  def microbatches(self) -> int:
    """Of an update; each is one group for each data shard."""
    return self.questions // self.shards

  @property
  def others(self) -> float:
    """Share of an array that the other devices hold."""
    return 1 - 1 / self.devices


# -- counting ------------------------------------------------------------------


def make_network() -> Network:
  """Whose sizes all divide by eight."""
  config = bench_work.read_shape(
    bench_work.qwen25vl(
      {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
      },
      {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 8,
        "fullatt_block_indexes": [1],
      },
    )
  )
  return Network(
    config=config,
    dtype="float32",
    param_dtype="float32",
    remat="full",
    attention="plain",
  )


def weight_bytes() -> dict[str, int]:
  """Of all weights, of what an update gathers of them, and of the decoder's.

  Layers are gathered once for the forward pass and once for the backward pass,
  which computes them again first; what is no layer is kept.
  """
  network = make_network()
  shapes = jax.tree.leaves(network.shapes())
  axes = jax.tree.leaves(network.axes(), is_leaf=lambda x: isinstance(x, tuple))
  sizes = [4 * x.size for x in shapes]
  layers = sum(
    n for n, names in zip(sizes, axes, strict=True) if "layer" in names
  )
  decoder = jax.tree.leaves(network.shapes()["language_model"])
  return {
    "weights": sum(sizes),
    "gathered": sum(sizes) + layers,
    "decoder": sum(4 * x.size for x in decoder),
  }


def make_run(case: Case) -> programs.Run:
  sizes = [case.devices if axis == case.axis else 1 for axis in sharding.AXES]
  devices = np.array(jax.devices()[: case.devices]).reshape(sizes)
  stage = common.stage(
    data={"none": {"report_as": ""}},
    rewards=(("exact", 1.0),),
    steps=1,
    rollout_questions=case.questions,
    update_questions=case.questions,
    updates_per_rollout=1,
    num_completions=GROUP,
    max_completion_length=COMPLETION,
    microbatch_tokens=PROMPT + GROUP * COMPLETION,
    logprob_chunk=64,
    kl_coef=0.0,
    reference="none",
  )
  return programs.Run(
    network=make_network(),
    mesh=Mesh(devices, sharding.AXES),
    stage=Stage(name="bench", **stage.to_dict()),
    lengths=Lengths(
      prompt=PROMPT,
      longest_prompt=PROMPT,
      visual=VISUAL,
      most_visual=VISUAL,
      completion=COMPLETION,
      longest_completion=COMPLETION,
    ),
    slots=0,
    reference_looks=False,
    evaluation=None,
    evaluation_questions=0,
  )


def measure(case: Case) -> Point:
  """What one device does and receives in each program."""
  run = make_run(case)
  jax.clear_caches()  # traces remember the mesh they were made for
  costs: dict[str, Cost] = {}
  with sharding.use(run.mesh):
    compiler = programs.Compiler(
      mesh=run.mesh, done=lambda one: costs.update({one.name: one.cost})
    )
    programs.compile_run(run, compiler)
    plan, _, _ = programs.microbatches(run)
  assert len(plan.groups) == case.microbatches
  point = {(program, "flops"): 0.0 for program in PROGRAMS.values()}
  for name, program in PROGRAMS.items():
    cost = costs.get(name, Cost())
    calls = case.microbatches if name == "gradient" else 1
    found = [("flops", cost.flops)]
    found += [(one.kind, one.turns * one.bytes) for one in cost.collectives]
    for figure, value in found:
      key = program, figure
      point[key] = point.get(key, 0.0) + calls * value
  return point


def cases(axis: str, mode: str, most: int) -> list[Case]:
  return [
    Case(
      axis=axis, devices=n, questions=EACH * (MOST if mode == "strong" else n)
    )
    for n in SIZES
    if n <= most
  ]


def measure_all(wanted: Sequence[Case], display: Display) -> dict[Case, Point]:
  """Points of all cases; one device is the same along every axis."""
  found: dict[Case, Point] = {}
  first = {alone(case): case for case in wanted}
  with display.task("meshes", total=len(first)) as advance:
    for like, case in first.items():
      found[like] = measure(case)
      advance(1)
  return {case: found[alone(case)] for case in wanted}


def alone(case: Case) -> Case:
  if case.devices > 1:
    return case
  return dataclasses.replace(case, axis=AXES[0])


# -- laws ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Law:
  """What a figure should be; `amount` is that of a case, in units of `unit`."""

  axes: tuple[str, ...]
  program: str
  figure: str
  amount: Callable[[Case], float]
  _: dataclasses.KW_ONLY
  says: str
  # A key of weight_bytes; or first: of the first case, whatever it is.
  unit: str
  slack: float = TOLERANCE
  # Loops whose end is data count as often as a shard reads rows of prompts, those
  # of attention within too: only as many questions of a shard compare.
  mode: str = ""


def share(case: Case) -> float:
  return case.questions / case.devices


def summed(case: Case) -> float:
  """Of an array that each device has a part of: sent around, and back."""
  return 2 * case.others


SPLIT = ("data", "fsdp")
LAWS = (
  Law(AXES, "decode", "flops", share, says="split evenly", unit="first"),
  *(
    Law(
      axes,
      "prefill",
      "flops",
      share,
      says="split evenly",
      unit="first",
      mode=mode,
    )
    for axes, mode in ((SPLIT, "weak"), (("tensor",), "strong"))
  ),
  Law(SPLIT, "update", "flops", share, says="split evenly", unit="first"),
  Law(
    ("tensor",),
    "update",
    "flops",
    share,
    says="split but for the embedding of patches",
    unit="first",
    slack=0.4,
  ),
  Law(
    ("data",),
    "update",
    "all-reduce",
    lambda case: summed(case) * case.microbatches,
    says="gradients, once a microbatch",
    unit="weights",
  ),
  Law(
    ("fsdp",),
    "update",
    "all-gather",
    lambda case: case.others * case.microbatches,
    says="weights, layers for either pass, once a microbatch",
    unit="gathered",
  ),
  Law(
    ("fsdp",),
    "update",
    # On a CPU; TPUs make a reduce-scatter of it, with half the bytes.
    "all-reduce",
    lambda case: summed(case) * case.microbatches,
    says="gradients, once a microbatch",
    unit="weights",
  ),
  Law(
    ("fsdp",),
    "gather",
    "all-gather",
    lambda case: case.others,
    says="the decoder's weights, once",
    unit="decoder",
  ),
  Law(
    ("fsdp",),
    "prefill",
    "all-gather",
    lambda case: case.others,
    says="the decoder's weights, for each row that is read",
    unit="first",
    mode="weak",
  ),
  *(
    Law(
      ("tensor",),
      program,
      "all-reduce",
      lambda case: summed(case) * case.questions,
      says="activations, as many as there are tokens",
      unit="first",
    )
    for program in ("update", "prefill", "decode")
  ),
  *(
    Law(axes, program, figure, lambda case: 0.0, says="nothing", unit="first")
    for axes, program in ((SPLIT, "decode"), (("data",), "prefill"))
    for figure in hlo.COLLECTIVES
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """A law, and what was counted on each number of devices."""

  mode: str
  axis: str
  law: Law
  devices: tuple[int, ...]
  expected: tuple[float, ...]
  counted: tuple[float, ...]

  @property
  def holds(self) -> bool:
    return all(
      abs(found - due) <= max(self.law.slack * due, NOTHING)
      for due, found in zip(self.expected, self.counted, strict=True)
    )


def judge(
  mode: str,
  axis: str,
  own: Sequence[Case],
  points: Sequence[Point],
  sizes: Mapping[str, int],
) -> Iterator[Finding]:
  """The laws of an axis; `sizes` are those of weight_bytes."""
  for law in LAWS:
    if axis not in law.axes or law.mode not in ("", mode):
      continue
    amounts = [law.amount(case) for case in own]
    counted = [point.get((law.program, law.figure), 0.0) for point in points]
    first = (x / due for x, due in zip(counted, amounts, strict=True) if due)
    unit = sizes[law.unit] if law.unit in sizes else next(first, 0.0)
    yield Finding(
      mode=mode,
      axis=axis,
      law=law,
      devices=tuple(case.devices for case in own),
      expected=tuple(unit * amount for amount in amounts),
      counted=tuple(counted),
    )


# -- showing -------------------------------------------------------------------


def make_table(findings: Sequence[Finding]) -> Table:
  """Laws of nothing that hold are left out."""
  table = Table(
    *("scaling", "axis", "program", "a device's", "devices"),
    *("expected", "counted", "why"),
    show_lines=True,
  )
  for one in findings:
    if one.holds and not any(one.expected):
      continue
    table.add_row(
      one.mode,
      one.axis,
      one.law.program,
      f"{'' if one.law.figure == 'flops' else 'bytes of '}{one.law.figure}",
      "\n".join(map(str, one.devices)),
      "\n".join(f"{x:.3g}" for x in one.expected),
      "\n".join(f"{x:.3g}" for x in one.counted),
      one.law.says if one.holds else f"[red]not so: {one.law.says}[/red]",
    )
  return table


def lines(
  series: Mapping[tuple[str, str], Sequence[tuple[Case, Point]]],
  findings: Sequence[Finding],
) -> Iterator[dict[str, Any]]:
  """JSON lines: of each figure as bench.py has them, and of each law."""
  about = {"peer": "jaxvlm", "model": "scaling_mesh", **bench.surroundings()}
  for (mode, axis), found in series.items():
    for case, point in found:
      for (program, figure), value in point.items():
        yield about | {
          "work": f"{program} {axis}={case.devices} {mode}",
          "metric": figure,
          "median": value,
          "n": 1,
          "values": [value],
          "higher_is_better": False,
          "exact": True,
        }
  for one in findings:
    yield about | {
      "law": f"{one.mode} {one.law.program} {one.law.figure} by {one.axis}",
      "says": one.law.says,
      "devices": one.devices,
      "expected": [round(x) for x in one.expected],
      "counted": [round(x) for x in one.counted],
      "holds": one.holds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--axes", default=",".join(AXES))
  parser.add_argument(
    "--most", type=int, choices=SIZES[1:], default=MOST, help="devices"
  )
  given = parser.parse_args(arguments)
  axes = given.axes.split(",")
  if unknown := set(axes) - set(AXES):
    parser.error(f"no axis {unknown.pop()!r}; there are {', '.join(AXES)}")
  console = Console(stderr=True, highlight=False)
  if not console.is_terminal:
    console = Console(stderr=True, highlight=False, width=PLAIN_WIDTH + 20)
  plans = {
    (mode, axis): cases(axis, mode, given.most)
    for mode in ("strong", "weak")
    for axis in axes
  }
  with Display(console) as display:
    found = measure_all(
      [case for own in plans.values() for case in own], display
    )
  sizes = weight_bytes()
  findings = [
    one
    for (mode, axis), own in plans.items()
    for one in judge(mode, axis, own, [found[case] for case in own], sizes)
  ]
  console.print(make_table(findings))
  series = {
    key: [(case, found[case]) for case in own] for key, own in plans.items()
  }
  for line in lines(series, findings):
    print(json.dumps(line))
  if not all(one.holds for one in findings):
    sys.exit(1)


if __name__ == "__main__":
  main()
