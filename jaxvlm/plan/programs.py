"""The programs of a run, lowered and compiled from shapes alone.

They are those that Sampler, Encoder and Learner call, given the same static
arguments; what one leaves to the next is passed on as the shape, dtype and
sharding that the compiler gave it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
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
from jaxvlm.plan.compiler import Compiler
from jaxvlm.rollout import prompts, schedule, slots
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
  # Whether the reference's tower is not the policy's, which has seen the pictures.
  reference_looks: bool
  evaluation: Draws | None  # None: the run evaluates nothing
  evaluation_questions: int

  @property
  def shards(self) -> int:
    return sharding.data_shards(self.mesh)

  @property
  def merges_alone(self) -> bool:
    """Whether the stage trains the mergers of a tower that it does not."""
    frozen = self.stage.freeze
    return "vision_tower" in frozen and "merger" not in frozen

  @property
  def layout(self) -> Layout:
    return Layout.from_config(self.network.config.to_hf())


PARTS = ("rollout", "update", "evaluation")
READS = ("gradient", "logprobs", "logprobs: reference")  # of microbatches
# Decoding while its caches have the fewest columns; "decode": with all.
FIRST_COLUMNS = "decode: first columns"


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
    if stage.kind == "sft" and "vision_tower" in stage.freeze:
      each = stage.rollout_questions // run.shards
      asked = batch.questions(each, run.lengths, run.layout)
      _look(run, compile, params, asked, kept, "")
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
  decode_weights = _decode_weights(run, compile, params, beside, prefix)
  beside["decode weights"] = decode_weights
  _look(run, compile, params, asked, beside, prefix)
  program = slots.Program(
    network=network, draws=draws, eos_ids=(0,), pad_id=0, shards=shards
  )
  at_once, fresh = schedule.in_flight(
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
  widths = list(schedule.cache_columns(draws.max_completion_length))
  caches = compile(
    f"{prefix}empty caches",
    slots.empty_caches,
    program,
    (at_once * shards, group, widths[0]),
    beside=beside | {"decode weights": decode_weights, "slots": state},
  )

  def decode(name: str, columns: int, state: Any, caches: Any) -> Any:
    return compile(
      f"{prefix}{name}",
      slots.decode,
      program,
      each,
      columns,
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

  if len(widths) > 1:
    state, caches, _ = decode(FIRST_COLUMNS, widths[0], state, caches)
    grown = _widened(caches, widths[-1])
    others = {"caches": (state.prompts, grown[1:])}
    own = {"slots": dataclasses.replace(state, prompts=[])}
    compile(
      f"{prefix}grow",
      slots.grow_layer,
      _widened(caches, widths[-2])[0],
      widths[-1],
      beside=beside | {"decode weights": decode_weights} | own | others,
    )
    caches = grown
  state, caches, _ = decode("decode", widths[-1], state, caches)
  beside["decode weights"] = decode_weights
  refills = schedule.refills(draws, decode_weights, state.prompts)
  if at_once < each and refills:
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
  shapes = list(schedule.ladder(each, (at_once, group)))
  if shapes:
    rest = dataclasses.replace(state, prompts=[])
    others = {"caches": (state.prompts[1:], caches[1:])}
    to = rows(shapes[0][0]), rows(*shapes[0])
    compile(
      f"{prefix}regroup",
      slots.regroup_layer,
      program,
      state.prompts[0],
      caches[0],
      *to,
      beside=beside | others | {"slots": rest},
    )
    compile(
      f"{prefix}regroup: rest",
      slots.regroup_rest,
      program,
      rest,
      *to,
      beside=beside | {"caches": (state.prompts, caches)},
    )


def _widened(caches: Any, columns: int) -> Any:
  """Caches of completions, with so many columns."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (*x.shape[:3], columns, x.shape[4]), x.dtype, sharding=x.sharding
    ),
    caches,
  )


def _look(
  run: Run,
  compile: Compiler,
  params: Any,
  asked: Sequence[Question],
  beside: Mapping[str, Any],
  prefix: str,
) -> None:
  """The tower, asked for a data shard's questions."""
  longest = max(len(q.pixel_values) for q in asked)
  if not longest:
    return
  lane, together = encoder.Encoder(
    network=run.network,
    mesh=run.mesh,
    layout=run.layout,
    known=filling.Known.of(filling.sizes_of(asked)),
  ).shape(longest, len(asked))

  def look(name: str, call: Any, shown: Question) -> None:
    lanes = pack_vision([[shown]], layout=run.layout, patches=lane)
    count = run.shards * together
    vision = batch.whole(run.mesh, {"vision": lanes}, count)["vision"]
    compile(
      f"{prefix}{name}",
      call,
      run.network,
      params,
      batch.widen(vision, run.network),
      beside=beside,
    )

  if not run.merges_alone or prefix:
    look("tower", encoder.encode, asked[0])
    return
  look("tower", encoder.see, asked[0])
  if run.stage.kind == "grpo":
    look("merger", encoder.encode, _known(run, [asked[0]])[0])


def _decode_weights(
  run: Run,
  compile: Compiler,
  params: Any,
  beside: Mapping[str, Any],
  prefix: str,
) -> Any:
  """The weights that decoding reads; its last layer is made beside the rest."""
  network, mesh = run.network, run.mesh

  def part(name: str, i: Any, others: Any) -> Any:
    return compile(
      f"{prefix}{name}",
      slots.unstack_part,
      network,
      mesh,
      params,
      i,
      beside={**beside, "decode weights": others},
    )

  around = part("decode weights: around", None, ())
  like = gathered(network, mesh)["language_model"]["layers"]
  others = network.join(around, [like[i] for i in range(len(like) - 1)])
  layer = part("decode weights", jax.ShapeDtypeStruct((), jnp.int32), others)
  return network.join(around, [layer] * len(like))


def gathered(network: Network, mesh: Mesh) -> Any:
  """The weights that decoding reads, as shapes that are placed on the mesh."""

  def part(i: int | None) -> Any:
    return jax.tree.map(
      lambda x, axes: jax.ShapeDtypeStruct(
        x.shape,
        jnp.dtype(network.dtype),
        sharding=slots.gathered(mesh, axes, x.shape),
      ),
      jax.eval_shape(lambda params: network.cut(params, i), network.shapes()),
      network.cut_axes(i),
    )

  number = network.config.text_config.num_hidden_layers
  return network.join(part(None), [part(0)] * number)


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


def microbatches(
  run: Run, *, looks: bool = False
) -> tuple[packing.Plan, Any, Any]:
  """How an update's groups are packed, the groups and their masks.

  Args:
    run: whose.
    looks: whether they are read by one who knows nothing of their pictures.
  """
  stage = run.stage
  count = stage.update_questions // stage.updates_per_rollout
  asked = batch.questions(count, run.lengths, run.layout)
  if not looks:
    asked = _known(run, asked)
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


def _known(run: Run, asked: list[Question]) -> list[Question]:
  """The questions with what a frozen tower has seen of them before."""
  if "vision_tower" not in run.stage.freeze:
    return asked
  merged = not run.merges_alone
  return [batch.seen(q, run.network, run.layout, merged=merged) for q in asked]


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

  def loops(tree: Any) -> dict[str, Any]:
    rows, columns = tree.ids.shape
    return {
      # Nearly all tokens are completions': chunks of a row's targets.
      "turns": columns / stage.logprob_chunk,
      "tokens": rows // run.shards * columns,
    }

  def score(name: str, tree: Any) -> None:
    again = stage.max_rollouts > 1  # then decoding's copy stays for the next
    weights = gathered(run.network, run.mesh) if again else ()
    compile(
      name,
      learner.logprobs,
      program,
      params,
      banned,
      tree,
      beside={**kept, "decode weights": weights},
      **loops(tree),
    )

  if policies(run):
    score("logprobs", micro.tree)
  if run.reference_looks:
    score("logprobs: reference", _experience(run, looks=True).tree)
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
    **loops(micro.tree),
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


def policies(run: Run) -> int:
  """Those whose logprobs are asked of what the policy's tower has seen."""
  stage = run.stage
  refers = bool(stage.kl_coef) and not run.reference_looks
  return 0 if stage.kind == "sft" else stage.asks_old_logprobs + refers


def _experience(run: Run, *, looks: bool = False) -> Any:
  """A microbatch, as shapes; `looks` as in `microbatches`."""
  stage = run.stage
  found, asked, mask = microbatches(run, looks=looks)
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
