"""A plan: the programs of a config on a mesh, and whether they fit."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxvlm import models, paths, sharding, stages
from jaxvlm.models import Network
from jaxvlm.plan import estimate, programs, structure
from jaxvlm.plan.batch import Lengths
from jaxvlm.plan.chips import GIB, Chip
from jaxvlm.plan.compiler import Compiled, Compiler, TooLarge
from jaxvlm.plan.estimate import Estimate
from jaxvlm.plan.programs import Run
from jaxvlm.rollout import sampler
from jaxvlm.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What compiling a run's programs told."""

  run: Run
  chip: Chip
  parts: tuple[str, ...]  # of programs.PARTS, those that were compiled
  compiled: tuple[Compiled, ...]
  too_large: TooLarge | None  # what the compiler gave up at
  faults: tuple[str, ...]
  estimate: Estimate | None  # None: not all was compiled

  @property
  def largest(self) -> tuple[str, int]:
    """The program during which a chip holds most, and how much."""
    found = [(one.memory.live, one.name) for one in self.compiled]
    if self.too_large is not None:
      found.append((self.too_large.needed, self.too_large.name))
    most, name = max(found)
    return name, most

  @property
  def fits(self) -> bool:
    return self.too_large is None and self.largest[1] <= self.chip.hbm

  @property
  def verdict(self) -> str:
    name, most = self.largest
    told = f"{most / GIB:.1f} of {self.chip.hbm / GIB:.1f} GiB at {name!r}"
    whole = set(self.parts) == set(programs.PARTS)
    part = "" if whole else f" as far as {', '.join(self.parts)} goes"
    if self.fits:
      return f"fits{part}: {told}"
    over = (most - self.chip.hbm) / GIB
    return f"does not fit: {told}, {over:.1f} too much; {remedy(name)}"


STATES = ("optimizer step", "optimizer state", "zeros")


def remedy(name: str) -> str:
  """The knob that helps where this program takes most."""
  if name.startswith("evaluation"):
    return "fewer evaluation.batch_questions, or a larger mesh.tensor"
  if name in programs.READS:
    return (
      "fewer stages.*.microbatch_tokens (a group is the least), "
      "model.remat=full, or a larger mesh.tensor"
    )
  if name in STATES:
    return "more chips on mesh.fsdp or mesh.tensor"
  return "fewer sampler.slots, or a larger mesh.tensor"


def network_config(config: Mapping[str, Any], size: str) -> Any:
  """The architecture: of a published size, or as the config says.

  Raises:
    ValueError: neither names one.
    OSError: the checkpoint is not there.
  """
  if size:
    return models.find_size(size)
  model = config["model"]
  if model["checkpoint"]:
    path = paths.path(model["checkpoint"]) / "config.json"
    raw = json.loads(path.read_text())
    return models.find_family(raw.get("model_type")).Config.from_hf(raw)
  raise ValueError(
    "model: got no --model; expected a published size, as qwen2_5_vl_7b, or "
    "--config.model.checkpoint."
  )


def find_stage(config: Mapping[str, Any], name: str) -> Stage:
  """The stage of this name; "": the first of the schedule.

  Raises:
    ValueError: there is none.
  """
  name = name or config["schedule"][0]
  if name not in config["stages"]:
    raise ValueError(
      f"stage: no {name!r}; there are {', '.join(config['stages'])}."
    )
  return Stage(name=name, **config["stages"][name])


def count_hosts(devices: np.ndarray) -> int:
  """Those that hold a mesh's devices, which say so though they are not there."""
  return len({device.process_index for device in devices.flat})


def make_run(
  config: Mapping[str, Any],
  *,
  mesh: Mesh,
  architecture: Any,
  stage: str,
  lengths: Lengths,
) -> Run:
  """What of a run's config its programs depend on; within `sharding.use`.

  Raises:
    ValueError: the config is wrong, or the mesh does not divide its sizes.
  """
  found = find_stage(config, stage)
  shards = sharding.data_shards(mesh)
  found.check_shards(shards, count_hosts(mesh.devices))
  model = config["model"]
  fields = config["evaluation"]
  if fields["batch_questions"] % shards:
    raise ValueError(
      f"evaluation.batch_questions: got {fields['batch_questions']}; expected "
      f"a multiple of the {shards} data shards."
    )
  return Run(
    network=Network(
      config=architecture,
      dtype=model["dtype"],
      param_dtype=model["param_dtype"],
      remat=model["remat"],
      attention=models.choose_attention(model["attention"]),
    ),
    mesh=mesh,
    stage=found,
    lengths=lengths,
    slots=config["sampler"]["slots"],
    reference_looks=_reference_looks(config, found),
    evaluation=sampler.Draws(
      **{
        field.name: fields[field.name]
        for field in dataclasses.fields(sampler.Draws)
      }
    )
    if fields["capabilities"]
    else None,
    evaluation_questions=fields["batch_questions"],
  )


def _reference_looks(config: Mapping[str, Any], stage: Stage) -> bool:
  """Whether the reference looks at the pictures itself, as step.py has it."""
  names = config["schedule"]
  if not stage.kl_coef or stage.reference != "base" or stage.name not in names:
    return False
  schedule = [find_stage(config, name) for name in names]
  return stages.base_sees_otherwise(schedule, stage)


def make(
  run: Run,
  chip: Chip,
  *,
  efficiency: float,
  parts: Collection[str] = programs.PARTS,
  done: Callable[[Compiled], None] = lambda one: None,
  known: dict[str, Any] | None = None,
  brief: bool = False,
) -> Plan:
  """Compiles a run's programs and adds up what they hold and do.

  Args:
    run: whose.
    chip: of its mesh.
    efficiency: as in `estimate`.
    parts: of programs.PARTS, those that are compiled.
    done: is told of each program.
    known: programs that were compiled for the mesh before; these are added.
    brief: end at the first program that does not fit.
  """
  jax.clear_caches()  # traces remember the mesh they were made for
  compiled: list[Compiled] = []

  def keep(one: Compiled) -> None:
    compiled.append(one)
    done(one)
    if brief and one.memory.live > chip.hbm:
      raise TooLarge(one.name, one.memory.live)

  failed = None
  with sharding.use(run.mesh):
    try:
      compile = Compiler(
        mesh=run.mesh, done=keep, known={} if known is None else known
      )
      programs.compile_run(run, compile, parts)
    except TooLarge as error:
      failed = error
    told = None
    if failed is None and set(parts) == set(programs.PARTS):
      told = estimate.estimate(run, compiled, chip, efficiency)
  return Plan(
    run=run,
    chip=chip,
    parts=tuple(parts),
    compiled=tuple(compiled),
    too_large=failed,
    faults=tuple(structure.faults(run, compiled)),
    estimate=told,
  )
