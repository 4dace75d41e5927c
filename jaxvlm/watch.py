"""What a step is watched by: earnings, lengths, costs, and whether it sees."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool

from jaxvlm import compiling, sharding
from jaxvlm.batch import Batch, membership, named
from jaxvlm.job import Job
from jaxvlm.learner import Learner
from jaxvlm.metrics import Metrics
from jaxvlm.packing import Packed
from jaxvlm.stages import Stage
from jaxvlm.types import Params, Question


def exchanged(
  questions: Sequence[Question],
) -> tuple[list[Question], Bool[np.ndarray, "Q 1 1"]]:
  """Questions that are shown each other's pictures, and which of them are.

  Patches are taken in their order, cut or repeated to the question's own number;
  so are features, where a frozen tower has seen them.
  """
  seen = [
    q for q, question in enumerate(questions) if len(question.pixel_values)
  ]
  others = list(questions)
  changed = np.zeros((len(questions), 1, 1), bool)
  for q, other in zip(seen, np.roll(seen, 1), strict=True):
    own, shown = questions[q], questions[other]
    pixels = np.resize(shown.pixel_values, own.pixel_values.shape)
    changed[q] = (pixels != own.pixel_values).any()
    features = own.features
    if features is not None and shown.features is not None:
      places = np.resize(np.arange(shown.features.shape[1]), features.shape[1])
      features = shown.features[:, places]
    others[q] = dataclasses.replace(own, pixel_values=pixels, features=features)
  return others, changed


def picture_effect(
  learner: Learner,
  params: Params,
  packed: Packed,
  shown: Packed,
  mask: Bool[np.ndarray, "Q G C"],
) -> Metrics:
  """How much completions' logprobs change with another question's pictures.

  A model that does not see still learns: the answers' form, and what is
  frequent. Its pictures change nothing, and this is exactly 0.

  Args:
    learner: of the stage.
    params: the policy.
    packed: the groups.
    shown: likewise, their pictures `exchanged`.
    mask: tokens of the questions whose pictures were.

  Returns:
    The mean absolute change of a token; nothing where none is counted.
  """
  count = float(sharding.sum_over_hosts(mask.sum()))
  if not count:
    return {}
  (own,), (other,) = (learner.logprobs([params], p) for p in (packed, shown))
  total = sharding.sum_over_hosts(np.abs(own - other)[mask].sum())
  return {"picture_effect": (float(total), count)}


def padding(packed: Packed) -> Metrics:
  """Shares of columns and patches of an update that mean nothing."""
  return _over_hosts(
    {f"padding/{name}": pair for name, pair in packed.plan.padding.items()}
  )


def padding_since(before: Metrics, now: Metrics) -> Metrics:
  """Shares of what a sampler read since then, prompts and lanes, likewise."""
  return _over_hosts(
    {
      name: (now[name][0] - empty, now[name][1] - size)
      for name, (empty, size) in (
        dict.fromkeys(now, (0.0, 0.0)) | before
      ).items()
    }
  )


def _over_hosts(pairs: Metrics) -> Metrics:
  """Sums over all hosts, of what has a size."""
  totals = sharding.sum_over_hosts(np.array([*pairs.values()], np.float64))
  return {
    name: (float(empty), float(size))
    for name, (empty, size) in zip(pairs, totals, strict=True)
    if size
  }


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


def stall(timing: Mapping[str, float], seconds: float) -> dict[str, float]:
  """Seconds up to the end of a step in which no device had anything to do.

  Rollout, logprobs and update keep the devices busy, and the host works beside
  them; whatever else a step waits for are data, rewards, and groups that are
  sorted and counted. Before it the step before was written down (`record`), which
  is in no step's seconds. Evaluations are in none.
  """
  busy = ("encode", "rollout", "logprobs", "update")
  waited = seconds + timing.get("record", 0.0)
  return {"host_stall": waited - sum(timing.get(name, 0.0) for name in busy)}


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
