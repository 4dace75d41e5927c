"""The programs of a run, lowered and compiled from shapes alone.

They are those that Sampler, Encoder and Learner call, given the same static
arguments; what one leaves to the next is passed on as the shape, dtype and
sharding that the compiler gave it.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxvlm import encoder, filling, learner, packing, sharding
from jaxvlm.data.vision_layout import Layout, pack_vision
from jaxvlm.learner import Learner
from jaxvlm.models import Network
from jaxvlm.plan import batch
from jaxvlm.plan.batch import Lengths
from jaxvlm.plan.hlo import Cost, Module
from jaxvlm.rollout import prompts, sampler, slots
from jaxvlm.rollout.sampler import Sampler
from jaxvlm.rollout.slots import Draws
from jaxvlm.stages import Stage
from jaxvlm.types import Experience, Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What a plan is made for."""

  network: Network
  mesh: Mesh
  stage: Stage
  lengths: Lengths
  slots: int  # as sampler.slots
  evaluation: Draws | None  # None: the run evaluates nothing
  evaluation_questions: int

  @property
  def shards(self) -> int:
    return sharding.data_shards(self.mesh)

  @property
  def layout(self) -> Layout:
    return Layout.from_config(self.network.config.to_hf())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes on a chip."""

  arguments: int
  outputs: int
  aliased: int  # of the outputs, those that take an argument's place
  temporaries: int
  code: int
  beside: Mapping[str, int]  # what else lives while the program runs

  @property
  def peak(self) -> int:
    """Of the program alone."""
    own = self.arguments + self.outputs - self.aliased
    return own + self.temporaries + self.code

  @property
  def live(self) -> int:
    return self.peak + sum(self.beside.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A program that was compiled for the mesh; of one chip."""

  name: str
  memory: Memory
  cost: Cost  # loops counted as often as they turn
  flops: float  # as the compiler tells, each loop's body once
  bytes: float
  optimal_seconds: float | None  # None: it does not tell
  seconds: float  # that compiling took
  module: Module
  # Bytes of its largest argument that is whole on every chip, and which.
  replicated: tuple[int, str]
  held: Mapping[str, Any]  # arrays, by name, that its structure is checked by
  tokens: int  # of a chip; 0: it has no such thing


class TooLarge(Exception):
  """The compiler found no room for a program: bytes it would take."""

  def __init__(self, name: str, needed: int):
    super().__init__(name)
    self.name, self.needed = name, needed


@dataclasses.dataclass
class Compiler:
  """Compiles programs in the order of a step."""

  mesh: Mesh
  done: Callable[[Compiled], None]

  def __call__(
    self,
    name: str,
    call: Any,
    *arguments: Any,
    beside: Mapping[str, Any] | None = None,
    turns: float = 1.0,
    held: Mapping[str, Any] | None = None,
    tokens: int = 0,
  ) -> Any:
    """The program's outputs, as shapes that are placed on the mesh.

    Args:
      name: of the program.
      call: jitted.
      *arguments: shapes, and what is static.
      beside: by name, arrays that live meanwhile and are no arguments.
      turns: of a loop whose end is data.
      held: as in Compiled.
      tokens: likewise.

    Raises:
      TooLarge: it does not fit alone.
    """
    started = time.monotonic()
    lowered = call.lower(*arguments)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if found := re.search(
        r"(?:Used |required for[\w ]*\()([\d.]+)([KMGT])", str(error)
      ):
        power = "KMGT".index(found.group(2)) + 1
        raise TooLarge(
          name, int(float(found.group(1)) * 1024**power)
        ) from error
      raise
    stats, told = compiled.memory_analysis(), compiled.cost_analysis() or {}
    module = Module(compiled.as_text(), dynamic_turns=turns)
    optimal = float(told.get("optimal_seconds", -1.0))
    self.done(
      Compiled(
        name=name,
        memory=Memory(
          arguments=stats.argument_size_in_bytes,
          outputs=stats.output_size_in_bytes,
          aliased=stats.alias_size_in_bytes,
          temporaries=stats.temp_size_in_bytes,
          code=stats.generated_code_size_in_bytes,
          beside={k: size(x) for k, x in (beside or {}).items()},
        ),
        cost=module.cost(),
        flops=float(told.get("flops", 0.0)),
        bytes=float(told.get("bytes accessed", 0.0)),
        optimal_seconds=optimal if optimal >= 0 else None,
        seconds=time.monotonic() - started,
        module=module,
        replicated=_replicated(arguments),
        held=held or {},
        tokens=tokens,
      )
    )
    return jax.tree.map(
      lambda out, placed: jax.ShapeDtypeStruct(
        out.shape, out.dtype, sharding=placed
      ),
      lowered.out_info,
      compiled.output_shardings,
    )


def size(tree: Any) -> int:
  """Bytes of arrays on one chip."""
  total = 0
  for x in jax.tree.leaves(tree):
    if isinstance(x, jax.ShapeDtypeStruct):
      total += int(np.prod(_shard(x))) * x.dtype.itemsize
  return total


def _shard(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  return x.sharding.shard_shape(x.shape) if x.sharding else x.shape


def _replicated(arguments: Any) -> tuple[int, str]:
  found = [(0, "")]
  for path, x in jax.tree_util.tree_leaves_with_path(arguments):
    if isinstance(x, jax.ShapeDtypeStruct) and _shard(x) == x.shape:
      bytes_ = int(np.prod(x.shape)) * x.dtype.itemsize
      found.append((bytes_, jax.tree_util.keystr(path)))
  return max(found)


PARTS = ("rollout", "update", "evaluation")


def compile_run(
  run: Run, compile: Compiler, parts: Collection[str] = PARTS
) -> None:
  """All programs of a step of a stage, and of what comes before it.

  Args:
    run: whose.
    compile: is given them in order.
    parts: of PARTS, those that are compiled.
  """
  network, mesh = run.network, run.mesh
  params = sharding.abstract(mesh, network.shapes(), network.axes())
  stage = run.stage
  own = Learner(
    network=network,
    mesh=mesh,
    banned=np.zeros(network.config.vocab_size, bool),
    frozen=stage.freeze,
    optimizer=stage.make_optimizer(),
    objective=stage.make_objective(),
  )
  trainable, _ = own.program.trainable(params)
  opt_state = compile(
    "optimizer state", own.make_opt_state(params), trainable, beside={}
  )
  kept = {"optimizer": opt_state}
  if stage.kl_coef and stage.kind == "grpo":
    kept["reference"] = params
  if stage.kind == "grpo" and "rollout" in parts:
    _rollout(run, compile, params, kept, stage.make_draws(), "")
  if "update" in parts:
    _update(run, compile, own, params, opt_state, kept)
  if run.evaluation is not None and "evaluation" in parts:
    _rollout(run, compile, params, kept, run.evaluation, "evaluation: ")


# -- a rollout -----------------------------------------------------------------


def _rollout(
  run: Run,
  compile: Compiler,
  params: Any,
  kept: Mapping[str, Any],
  draws: Draws,
  prefix: str,
) -> None:
  network, mesh, shards = run.network, run.mesh, run.shards
  count = run.evaluation_questions if prefix else run.stage.rollout_questions
  each, group = count // shards, draws.num_completions
  asked = batch.questions(each, run.lengths, run.layout)
  station = Sampler(
    network=network,
    mesh=mesh,
    eos_ids=(0,),
    pad_id=0,
    banned=np.zeros(network.config.vocab_size, bool),
    layout=run.layout,
    known=filling.Known.of(filling.sizes_of(asked)),
    slots=run.slots,
  )
  beside, weights = dict(kept), params
  decode_weights = compile(
    f"{prefix}decode weights",
    slots.unstack,
    network,
    mesh,
    params,
    beside=beside,
  )
  beside["decode weights"] = decode_weights
  if longest := max(len(q.pixel_values) for q in asked):
    lane, together = station.encoder.shape(longest, each)
    lanes = pack_vision([asked[:1]], layout=run.layout, patches=lane)
    vision = batch.whole(mesh, {"vision": lanes}, shards * together)["vision"]
    compile(
      f"{prefix}tower",
      encoder.encode,
      network,
      weights,
      batch.widen(vision, network),
      beside=beside,
    )
  program = slots.Program(
    network=network, draws=draws, eos_ids=(0,), pad_id=0, shards=shards
  )
  at_once, fresh = sampler.in_flight(
    run.slots, shards=shards, each=each, group=group
  )
  bucket = prompts.find(station.buckets, run.lengths.longest_prompt)
  shown = [batch.seen(q, network, run.layout) for q in asked]
  read, reads = _prompts(run, shown[:at_once], bucket)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  banned = jax.ShapeDtypeStruct((network.config.vocab_size,), bool)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def rows(*shape: int) -> Any:
    return batch.whole(mesh, np.zeros(shape, np.int32), shards)

  def prefill(
    name: str, read: Any, reads: int, blocks: int, beside: Any
  ) -> Any:
    return compile(
      f"{prefix}{name}",
      slots.prefill,
      program,
      weights,
      banned,
      read,
      scalar,
      rows(blocks),
      rows(blocks, group),
      key,
      scalar,
      beside=beside,
      turns=reads,
    )

  state = prefill("prefill", read, reads, at_once, beside)
  beside["policy"] = params
  del beside["decode weights"]
  caches = compile(
    f"{prefix}empty caches",
    slots.empty_caches,
    program,
    (at_once * shards, group),
    beside=beside | {"decode weights": decode_weights, "slots": state},
  )
  state, caches, _ = compile(
    f"{prefix}decode",
    slots.decode,
    program,
    each,
    decode_weights,
    banned,
    state,
    caches,
    scalar,
    scalar,
    scalar,
    beside=beside,
    held={"weights": decode_weights, "caches": (state.prompts, caches)},
  )
  beside["decode weights"] = decode_weights
  if at_once < each:
    more, reads = _prompts(run, shown[:fresh], bucket)
    waits = {"slots": state, "caches": caches}
    waits |= {k: x for k, x in beside.items() if k != "policy"}
    new = prefill("admit: prefill", more, reads, fresh, waits)
    compile(
      f"{prefix}admit",
      slots.admit,
      program,
      state,
      rows(fresh),
      new,
      beside=beside | {"caches": caches},
    )
  shapes = list(sampler.ladder(each, (at_once, group)))
  if shapes:
    compile(
      f"{prefix}regroup",
      slots.regroup,
      program,
      state,
      caches,
      rows(shapes[0][0]),
      rows(*shapes[0]),
      beside=beside,
    )


def _prompts(
  run: Run, asked: Sequence[Question], bucket: prompts.Bucket
) -> tuple[Any, int]:
  """Packed rows as shapes, and how many of each shard hold something."""
  packed = prompts.pack(
    asked,
    np.ones(len(asked), bool),
    shards=1,
    bucket=bucket,
    layout=run.layout,
  )
  placed = batch.whole(run.mesh, packed.prompts, run.shards)
  vision = batch.widen(placed.vision, run.network)
  return dataclasses.replace(placed, vision=vision), packed.reads


# -- an update -----------------------------------------------------------------


def microbatches(run: Run) -> tuple[packing.Plan, Any, Any]:
  """How an update's groups are packed, the groups and their masks."""
  stage = run.stage
  count = stage.update_questions // stage.updates_per_rollout
  asked = batch.questions(count, run.lengths, run.layout)
  mask = batch.masks(
    count, stage.num_completions, run.lengths, stage.microbatch_tokens
  )
  found = packing.plan(
    asked,
    mask,
    tokens=stage.microbatch_tokens,
    shards=run.shards,
    layout=run.layout,
    largest=max(len(q.pixel_values) for q in asked),
  )
  return found, asked, mask


def _update(
  run: Run,
  compile: Compiler,
  own: Learner,
  params: Any,
  opt_state: Any,
  kept: Mapping[str, Any],
) -> None:
  stage, program = run.stage, own.program
  micro = _experience(run)
  banned = jax.ShapeDtypeStruct((run.network.config.vocab_size,), bool)
  rows, columns = micro.tree.ids.shape
  loops = {
    # Nearly all tokens are completions': chunks of a row's targets.
    "turns": columns / stage.logprob_chunk,
    "tokens": rows // run.shards * columns,
  }
  if micro.old_logprobs is not None or micro.ref_logprobs is not None:
    compile(
      "logprobs",
      learner.logprobs,
      program,
      params,
      banned,
      micro.tree,
      beside=kept,
      **loops,
    )
  total = compile("zeros", learner.zeros, program, params, beside=kept)
  total, _ = compile(
    "gradient",
    learner.add_gradient,
    program,
    total,
    params,
    banned,
    micro,
    beside=kept,
    **loops,
  )
  state = learner.TrainState(params=params, opt_state=opt_state)
  number = jax.ShapeDtypeStruct((), jnp.float32)
  compile(
    "optimizer step",
    learner.apply,
    program,
    state,
    total,
    number,
    number,
    beside={k: x for k, x in kept.items() if k != "optimizer"},
  )


def _experience(run: Run) -> Any:
  """A microbatch, as shapes."""
  stage = run.stage
  found, asked, mask = microbatches(run)
  one = dataclasses.replace(found, groups=found.groups[:1, :1])
  tree = packing.pack(
    one, 0, asked, np.zeros(mask.shape, np.int32), mask, layout=run.layout
  )
  room, (group, length) = found.groups.shape[2], mask.shape[1:]
  per_token = np.zeros((room, group, length), np.float32)
  refers = stage.kind == "grpo" and stage.kl_coef and stage.kl_target == "loss"
  placed = batch.whole(
    run.mesh,
    Experience(
      tree=tree,
      completion_mask=per_token.astype(bool),
      advantages=per_token[..., 0],
      groups=np.zeros((room, len(stage.labels)), bool),
      sampler_logprobs=per_token,
      old_logprobs=per_token if stage.asks_old_logprobs else None,
      ref_logprobs=per_token if refers else None,
    ),
    found.groups.shape[1],
  )
  vision = batch.widen(placed.tree.vision, run.network)
  tree = dataclasses.replace(placed.tree, vision=vision)
  return dataclasses.replace(placed, tree=tree)
