"""What a step is watched by: earnings, lengths, costs, and whether it sees."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxvlm import compiling, sharding
from jaxvlm.batch import Batch, membership, named
from jaxvlm.job import Job
from jaxvlm.learner import Learner
from jaxvlm.metrics import Metrics
from jaxvlm.stages import Stage
from jaxvlm.types import Params, Tree


def picture_effect(
  job: Job, learner: Learner, params: Params, tree: Tree, mask: jax.Array
) -> Metrics:
  """How much completions' logprobs change with another question's pictures.

  A model that does not see still learns: the answers' form, and what is
  frequent. Its pictures change nothing, and this is exactly 0.

  Args:
    job: the mesh.
    learner: of the stage.
    params: the policy.
    tree: packed rows of this host [U Q/U ...].
    mask: completion_mask, global [U Q/U G C].

  Returns:
    The mean absolute change of a token, over the questions whose pictures were
    exchanged for others; nothing for text alone.
  """
  if tree.vision is None:
    return {}
  pixels = tree.vision.pixel_values
  others = np.roll(pixels, 1, axis=1)
  changed = (pixels != others).any(axis=(2, 3))  # [U S]
  changed = np.repeat(changed, tree.ids.shape[1] // changed.shape[1], axis=1)
  vision = dataclasses.replace(tree.vision, pixel_values=others)
  trees = tree, dataclasses.replace(tree, vision=vision)
  seen, shown_others, changed = sharding.place(
    job.mesh, (*trees, changed), ("microbatch",)
  )
  change = jnp.abs(
    learner.logprobs(params, seen) - learner.logprobs(params, shown_others)
  )
  counted = mask & changed[..., None, None]
  count = float(jnp.sum(counted))
  if not count:
    return {}
  return {"picture_effect": (float(jnp.sum(change * counted)), count)}


def rollout_metrics(stage: Stage, batch: Batch) -> Metrics:
  """What a rollout earned and how long it was, over all hosts.

  Each figure also for each label of the stage, and for questions with pictures
  and without, where there are several.
  """
  scores, rollout = batch.scores, batch.rollout
  lengths = rollout.completion_mask.sum(-1)
  kept = np.broadcast_to(~scores.failed[:, None], lengths.shape)
  each = np.ones(lengths.shape, bool)
  figures = {
    "length": (lengths, each),
    "truncated": (rollout.truncated, each),
    "live_groups": (batch.live[:, None], each[:, :1]),
  }
  if scores.parts:  # a demonstration earns nothing
    figures["reward"] = (scores.rewards, kept)
    for name, part in scores.parts.items():
      figures[f"reward/{name}"] = (part, kept & ~np.isnan(part))
  if (accuracy := scores.accuracy) is not None:
    figures["accuracy"] = (accuracy, kept)
    figures["length_right"] = (lengths, kept & (accuracy >= 0.5))
    figures["length_wrong"] = (lengths, kept & (accuracy < 0.5))
  groups = membership(batch.questions, stage.labels)
  pairs = [
    [
      np.where(counted, values, 0.0).sum(-1) @ groups,
      counted.sum(-1) @ groups,
    ]
    for values, counted in figures.values()
  ]
  totals = sharding.sum_over_hosts(np.array(pairs, np.float64))
  failed = sharding.sum_over_hosts(np.array([scores.failed.sum(), 1]))
  metrics: Metrics = {"failed_groups": (float(failed[0]), float(failed[1]))}
  for name, (sums, counts) in zip(figures, totals, strict=True):
    metrics |= named(name, sums, counts, stage.labels)
  return metrics


def supply(stage: Stage, found: Sequence[Batch], chosen: Batch) -> Metrics:
  """How many rollouts a step took, and how many groups still teach nothing."""
  if stage.max_rollouts == 1:
    return {}
  idle = sharding.sum_over_hosts(int((~chosen.live).sum()))
  return {
    "rollouts": (float(len(found)), 1.0),
    "idle_groups": (float(idle), 1.0),
  }


def shortage(stage: Stage, step: int, metrics: Metrics) -> str | None:
  """What to tell where a step ran out of rollouts before it had enough."""
  idle = metrics.get("idle_groups", (0.0, 1.0))[0]
  if not idle:
    return None
  return (
    f"{stage.name}: step {step} ran out after {stage.max_rollouts} rollouts of "
    f"{stage.rollout_questions} questions (max_rollouts): of "
    f"{stage.update_questions} groups that it learns from, {idle:.0f} have one "
    "reward and teach nothing. idle_groups counts them in each step."
  )


def cost(
  job: Job, stage: Stage, batch: Batch, chosen: Batch
) -> dict[str, float]:
  """What this step adds to the stage's ledger, over all hosts.

  Args:
    job: sizes of the network.
    stage: its knobs.
    batch: what was rolled out.
    chosen: what was learned from.
  """
  patches = sum(len(q.pixel_values) for q in batch.questions)
  prompts = sum(len(q.prompt_ids) for q in batch.questions)
  generated = float(batch.rollout.completion_mask.sum())
  trained = float(chosen.trained(stage.mask_truncated).sum())
  counts = {
    "questions": len(batch.questions),
    "patches": patches,
    "prompt_tokens": prompts,
    "generated_tokens": generated if stage.kind == "grpo" else 0.0,
    "trained_tokens": trained,
  }
  rows = sum(len(q.prompt_ids) for q in chosen.questions) + trained
  seen = sum(len(q.pixel_values) for q in chosen.questions)
  decoder, tower = job.matrix_sizes
  # 2 per weight and token forward, 4 backward; attention is not counted.
  flops = 6.0 * (decoder * rows + tower * seen)
  if stage.kind == "grpo":
    passes = 1 + stage.asks_old_logprobs + (stage.kl_coef != 0)
    tokens = counts["generated_tokens"] + prompts
    flops += 2.0 * passes * (decoder * tokens + tower * patches)
  counts["model_flops"] = flops
  totals = sharding.sum_over_hosts(list(counts.values()))
  return dict(zip(counts, totals.tolist(), strict=True)) | {
    "updates": stage.updates_per_rollout
  }


def compiled(before: compiling.Tally) -> dict[str, float]:
  """Programs and seconds of compiling since then, cached ones too."""
  now = compiling.tally()
  return {
    "compile": now.seconds - before.seconds,
    "programs": now.programs - before.programs,
  }


def speed(
  batch: Batch, spent: dict[str, float], seconds: float
) -> dict[str, float]:
  """Tokens a second of a step that cost what was spent.

  tokens_per_second counts each prompt once, as it is computed here;
  tokens_per_second_per_device counts it once for each of its completions, as
  EasyR1 does, whose figures it is to be compared with.
  """
  prompts, generated = spent["prompt_tokens"], spent["generated_tokens"]
  group = batch.rollout.truncated.shape[1]
  return {
    "seconds": seconds,
    "tokens_per_second": (prompts + generated) / seconds,
    "tokens_per_second_per_device": (prompts * group + generated)
    / (seconds * jax.device_count()),
  }
