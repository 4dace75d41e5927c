"""Whether a run fits a pod, and how fast it is: compiled here, for chips elsewhere.

  python tools/plan_pod.py --config=configs/staged.py:qwen2_5_vl_7b --topology=v5e:4x4

Every program of a step is lowered from shapes and compiled by the TPU's own
compiler (pip install -e '.[tpu]'; no TPU is needed). Tables say what a chip
holds and does; the last line is the verdict. --config.FIELD=VALUE as for a run.
"""

import copy
import functools
import json
import operator
import os
import sys
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":
  sys.path[0] = os.getcwd()  # as python -m has it: configs import each other

from absl import app, flags
from rich.console import Console
from rich.table import Table

from jaxvlm import main, sharding
from jaxvlm.plan import chips, hlo, planning, search
from jaxvlm.plan.batch import Lengths
from jaxvlm.plan.chips import GIB
from jaxvlm.plan.compiler import Compiled
from jaxvlm.plan.planning import Plan
from jaxvlm.plan.programs import PARTS as ALL
from jaxvlm.plan.programs import Run

TOPOLOGY = flags.DEFINE_string(
  "topology", None, "v5e:4x4, v6e:8x8, v5p:4x4x4 (chips), ...; or local."
)
MODEL = flags.DEFINE_string(
  "model", "", "A published size, as qwen3_vl_8b; empty: the config's own."
)
STAGE = flags.DEFINE_string("stage", "", "Of the schedule; empty: the first.")
PROMPT = flags.DEFINE_integer("prompt", 512, "Mean tokens of a prompt.")
VISUAL = flags.DEFINE_integer("visual", 256, "Mean visual tokens among them.")
COMPLETION = flags.DEFINE_integer("completion", 512, "Mean of a completion.")
EFFICIENCY = flags.DEFINE_float(
  "efficiency",
  0.5,
  "Share of the chip's rates that is taken to be reached.",
  lower_bound=0.01,
  upper_bound=1.0,
)
PARTS = flags.DEFINE_multi_enum(
  "parts", list(ALL), list(ALL), "Those that are compiled; --search: all."
)
JSON = flags.DEFINE_bool("json", False, "A JSON line for each program, too.")
SEARCH = flags.DEFINE_float(
  "search", 0.0, "Seconds to look for a mesh and sizes that fit; 0: none."
)


def plan(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"plan_pod: unexpected arguments: {' '.join(argv[1:])}")
  screen = Console(stderr=True)
  try:
    if not TOPOLOGY.value:
      raise ValueError(
        "--topology: expected chips, as v5e:4x4, v6e:8x8, v5p:4x4x4, or 'local' "
        "for this machine's own devices."
      )
    devices = chips.devices(TOPOLOGY.value)
    chip = chips.find(devices[0])
    config = main.CONFIG.value.to_dict()
    if SEARCH.value:
      found = search.search(
        _tries(config, devices),
        chip,
        efficiency=EFFICIENCY.value,
        budget=SEARCH.value,
        told=lambda overrides, plan: screen.print(overrides, plan.verdict),
      )
      if found is None:
        sys.exit("plan_pod: nothing that fits was found within the budget.")
      overrides, made = found
      flat = (f"--config.{name}={x}" for name, x in overrides.items())
      print(" ".join(flat))
    else:
      run = _run(config, devices)
      made = planning.make(
        run,
        chip,
        efficiency=EFFICIENCY.value,
        parts=PARTS.value,
        done=lambda one: screen.print(
          f"compiled {one.name}, {one.seconds:.0f} s"
        ),
      )
  except (OSError, ValueError) as error:
    sys.exit(f"plan_pod: {error}")
  if JSON.value:
    for one in made.compiled:
      print(json.dumps(_record(made, one)))
    print(json.dumps(_summary(made)))
  _show(made, Console(width=None if sys.stdout.isatty() else 150))
  if made.faults or not made.fits:
    sys.exit(1)


def _run(config: dict[str, Any], devices: list[Any]) -> Run:
  mesh = sharding.make_mesh(**config["mesh"], devices=devices)
  size = MODEL.value
  if not size and not config["model"]["checkpoint"]:
    argument = main.config_file(sys.argv).partition(":")[2]
    size = argument.partition(",")[0]
  architecture = planning.network_config(config, size)
  stage = planning.find_stage(config, STAGE.value)
  longest = config["inputs"]["max_prompt_length"]
  tower = architecture.vision_config
  side = tower.patch_size * tower.spatial_merge_size
  most = (config["inputs"]["max_pixels"] or 0) // side**2
  lengths = Lengths(
    prompt=PROMPT.value,
    longest_prompt=longest,
    visual=VISUAL.value,
    most_visual=min(most, longest - 64) if VISUAL.value else 0,
    completion=COMPLETION.value,
    longest_completion=stage.max_completion_length,
  )
  with sharding.use(mesh):
    return planning.make_run(
      config,
      mesh=mesh,
      architecture=architecture,
      stage=stage.name,
      lengths=lengths,
    )


def _tries(
  config: dict[str, Any], devices: list[Any]
) -> Iterator[tuple[dict[str, Any], Run]]:
  for overrides in search.candidates(
    config, len(devices), planning.find_stage(config, STAGE.value).name
  ):
    changed = copy.deepcopy(config)
    for path, value in overrides.items():
      *owners, field = path.split(".")
      functools.reduce(operator.getitem, owners, changed)[field] = value
    try:
      run = _run(changed, devices)
    except ValueError:
      continue  # sizes that do not divide, or a host's chips do not hold
    yield overrides, run


# -- what is shown -------------------------------------------------------------


def _record(plan: Plan, one: Compiled) -> dict[str, Any]:
  """A program's line of JSON."""
  memory = one.memory
  return {
    "topology": TOPOLOGY.value,
    "mesh": dict(plan.run.mesh.shape),
    "program": one.name,
    "arguments": memory.arguments,
    "outputs": memory.outputs,
    "aliased": memory.aliased,
    "temporaries": memory.temporaries,
    "code": memory.code,
    "peak": memory.peak,
    "beside": dict(memory.beside),
    "live": memory.live,
    "hbm": plan.chip.hbm,
    "flops": one.cost.flops,
    "bytes": one.cost.bytes,
    "compiler": {
      "flops": one.flops,
      "bytes": one.bytes,
      "optimal_seconds": one.optimal_seconds,
    },
    "collectives": hlo.by_kind(one.cost.collectives, dict(plan.run.mesh.shape)),
    "compile_seconds": round(one.seconds, 1),
  }


def _summary(plan: Plan) -> dict[str, Any]:
  """The last line of JSON."""
  told = plan.estimate
  return {
    "verdict": plan.verdict,
    "fits": plan.fits,
    "faults": plan.faults,
    "step_seconds": told and told.seconds,
    "tokens_per_second_per_chip": told and told.tokens_per_second,
    "seconds": told and {x.name: x.seconds for x in told.programs},
    "bounds": told and {x.name: x.bound for x in told.programs},
  }


def _show(plan: Plan, screen: Console) -> None:
  shape = " x ".join(f"{n} {size}" for n, size in plan.run.mesh.shape.items())
  memory = Table(title=f"GiB on a {plan.chip.name}; mesh {shape}")
  for name in ("program", "arguments", "outputs", "temporaries", "peak"):
    memory.add_column(name, justify="left" if name == "program" else "right")
  memory.add_column("beside", justify="right")
  memory.add_column("at once", justify="right")
  for one in plan.compiled:
    own = one.memory
    figures = (
      own.arguments,
      own.outputs - own.aliased,
      own.temporaries,
      own.peak,
      sum(own.beside.values()),
      own.live,
    )
    memory.add_row(one.name, *(f"{x / GIB:.2f}" for x in figures))
  screen.print(memory)
  _show_work(plan, screen)
  for fault in plan.faults:
    screen.print(f"[red]structure:[/] {fault}")
  if plan.estimate is not None:
    told = plan.estimate
    screen.print(
      f"A step: {told.seconds:.0f} s at {told.efficiency:.0%} of the chip's "
      f"rates, {told.tokens_per_second:.0f} generated tokens a second and chip;"
      f" {told.largest.name!r} takes most, bound by {told.largest.bound}."
    )
  screen.print(plan.verdict, style="bold")


def _show_work(plan: Plan, screen: Console) -> None:
  work = Table(title="a call, on a chip; seconds: of all calls, at its rates")
  work.add_column("program")
  for name in ("TFLOP", "GB", "compiler's s", "calls a step", "seconds"):
    work.add_column(name, justify="right")
  work.add_column("bound")
  work.add_column("collectives, GB received")
  sizes = dict(plan.run.mesh.shape)
  timed = {x.name: x for x in plan.estimate.programs} if plan.estimate else {}
  for one in plan.compiled:
    exchanged = hlo.by_kind(one.cost.collectives, sizes)
    own = timed.get(one.name)
    best = one.optimal_seconds
    work.add_row(
      one.name,
      f"{one.cost.flops / 1e12:.2f}",
      f"{one.cost.bytes / 1e9:.1f}",
      "-" if best is None else f"{best:.4f}",
      f"{own.calls:.0f}" if own else "-",
      f"{own.seconds:.1f}" if own else "-",
      own.bound if own else "-",
      ", ".join(f"{k} {v / 1e9:.2f}" for k, v in exchanged.items() if v > 1e6),
    )
  screen.print(work)


if __name__ == "__main__":
  app.run(plan, flags_parser=main.parse)
