"""A search for meshes and sizes with which a run fits, the fastest first.

Compiling a try takes minutes. Arithmetic comes first: it says in which order to
try, and what cannot fit whatever the compiler does.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxvlm import sharding
from jaxvlm.plan import compiler, estimate, planning, programs
from jaxvlm.plan.chips import Chip
from jaxvlm.plan.planning import STATES, Plan
from jaxvlm.plan.programs import READS, Run

Overrides = dict[str, Any]


def search(
  tries: Iterable[tuple[Overrides, Run]],
  chip: Chip,
  *,
  efficiency: float,
  budget: float,
  told: Callable[[Overrides, Plan], None],
) -> tuple[Overrides, Plan] | None:
  """The fastest of these runs, by `seconds`, that fits; None: out of time.

  Where an update is too large, other slots are no help; where decoding is, more
  slots are none. A mesh's programs are compiled once.

  Args:
    tries: overrides, and the run with them.
    chip: of the mesh.
    efficiency: as in `estimate`.
    budget: seconds after which no other is begun.
    told: of each that was compiled.
  """
  started = time.monotonic()
  left = [one for one in tries if least(one[1]) <= chip.hbm]
  left.sort(key=lambda one: seconds(one[1], chip))
  known: dict[Mesh, dict[str, Any]] = {}
  while left and time.monotonic() - started <= budget:
    overrides, run = left.pop(0)
    plan = planning.make(
      run,
      chip,
      efficiency=efficiency,
      known=known.setdefault(run.mesh, {}),
      brief=True,
    )
    told(overrides, plan)
    if plan.fits:
      return overrides, plan
    if plan.largest[0] in (*READS, *STATES):
      left = [one for one in left if not _updates_alike(one[1], run)]
    else:
      left = [one for one in left if not _decodes_more(one[1], run)]
  return None


def _updates_alike(other: Run, run: Run) -> bool:
  """Whether all but decoding is as in this run."""
  return (other.mesh, other.network, other.stage) == (
    *(run.mesh, run.network, run.stage),
  )


def _decodes_more(other: Run, run: Run) -> bool:
  """Whether at least as much decodes at once."""
  return other.mesh == run.mesh and (
    estimate.in_flight(other)[0] >= estimate.in_flight(run)[0]
  )


# -- arithmetic ----------------------------------------------------------------


def least(run: Run) -> int:
  """Bytes that a chip holds while it decodes, before anything is compiled."""
  network, stage = run.network, run.stage
  params = sharding.abstract(run.mesh, network.shapes(), network.axes())
  width = jnp.dtype(network.param_dtype).itemsize
  per_number = compiler.size(params) / width
  state = per_number * (8 + 2 * stage.optimizer["compensated"] + 2 * width)
  weights = compiler.size(programs.gathered(network, run.mesh))
  blocks, _ = estimate.in_flight(run)
  block = _block(run, stage.num_completions, stage.max_completion_length)
  return int(state + weights + blocks * block)


def seconds(run: Run, chip: Chip) -> float:
  """Of a step, roughly: what decoding reads, and an update's larger part.

  An update multiplies, and meanwhile gathers weights over fsdp and sums what
  passes between layers over tensor.
  """
  network, stage = run.network, run.stage
  weights = compiler.size(programs.gathered(network, run.mesh))
  blocks, _ = estimate.in_flight(run)
  longest = stage.max_completion_length
  caches = blocks * _block(run, stage.num_completions, longest)
  with sharding.use(run.mesh):
    found = sum(
      count * (weights + blocks * _block(run, slots, columns))
      for blocks, slots, columns, count in estimate.decoded(
        run, refills=caches <= weights
      )
    )
  decode = found / chip.bandwidth
  plan = programs.microbatches(run)[0]
  text, tensor = network.config.text_config, run.mesh.shape["tensor"]
  asked = programs.policies(run) + run.reference_looks
  reads = asked + 3  # forwards, and a gradient's two and its way back
  numbers = weights / jnp.dtype(network.dtype).itemsize
  columns = plan.columns
  compute = 2 * numbers * columns * (reads + 1) / chip.flops
  passed = columns * text.hidden_size * text.num_hidden_layers
  links = (reads + 2) * weights  # a gradient is summed in float32
  links += 2 * reads * 2 * (1 - 1 / tensor) * passed * 2
  updates = plan.groups.shape[0] * stage.updates_per_rollout
  return decode + updates * max(compute, links / chip.links)


def _block(run: Run, slots: int, columns: int) -> int:
  """Bytes on a chip of the caches of a question and so many completions.

  Args:
    run: whose.
    slots: completions.
    columns: that a completion has.
  """
  text, tensor = run.network.config.text_config, run.mesh.shape["tensor"]
  heads = text.num_key_value_heads
  heads //= 1 if heads % tensor else tensor
  tokens = run.lengths.longest_prompt + slots * columns
  width = jnp.dtype(run.network.dtype).itemsize
  return 2 * width * text.num_hidden_layers * heads * text.head_dim * tokens


# -- what is tried -------------------------------------------------------------


def candidates(
  config: Mapping[str, Any], devices: int, stage: str
) -> Iterator[Overrides]:
  """Overrides to try: meshes, what an update takes less with, and slots."""
  fields = config["stages"][stage]
  questions, group = fields["rollout_questions"], fields["num_completions"]
  asked = config["evaluation"]["batch_questions"]
  for tensor in (1, 2, 4, 8):
    if devices % tensor or questions % (devices // tensor):
      continue
    shards = devices // tensor
    mesh = {"mesh.tensor": tensor, "mesh.fsdp": shards, "mesh.data": 1}
    if asked % shards:
      mesh["evaluation.batch_questions"] = -(-asked // shards) * shards
    for less in _reliefs(config):
      for part in (1, 2, 4, 8, 16, 32):
        if part <= questions // shards:
          slots = questions // shards // part * group * shards
          slots = 0 if part == 1 else slots
          yield mesh | less | {"sampler.slots": slots}


def _reliefs(config: Mapping[str, Any]) -> Iterator[Overrides]:
  """Overrides with which an update takes ever less memory, and more time."""
  less: Overrides = {}
  yield dict(less)
  if config["model"]["remat"] != "full":
    less["model.remat"] = "full"
    yield dict(less)
  smaller = {}
  for name in config["schedule"]:
    fields = config["stages"][name]
    longest = fields["num_completions"] * fields["max_completion_length"]
    longest += config["inputs"]["max_prompt_length"]
    if longest < fields["microbatch_tokens"]:
      smaller[f"stages.{name}.microbatch_tokens"] = longest
  if smaller:
    yield less | smaller
