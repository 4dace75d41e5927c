"""What the lines of the loop do: roll out, score, choose, learn."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxvlm import sharding
from jaxvlm.evaluate import decode_rollout
from jaxvlm.job import Job
from jaxvlm.learner import Learner, TrainState
from jaxvlm.metrics import Metrics, add
from jaxvlm.packing import pack, unbatch
from jaxvlm.rl import advantages
from jaxvlm.scoring import Scorer
from jaxvlm.stages import Stage
from jaxvlm.types import Experience, Params, Question, Rollout, Scores, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """This host's questions of a step with what was answered and earned."""

  questions: Sequence[Question]  # Q
  rollout: Rollout
  scores: Scores
  advantages: np.ndarray  # float64 [Q G]

  def take(self, rows: np.ndarray) -> "Batch":
    """The batch of these questions alone."""
    scores = dataclasses.replace(
      self.scores,
      rewards=self.scores.rewards[rows],
      parts={name: part[rows] for name, part in self.scores.parts.items()},
      failed=self.scores.failed[rows],
      accuracy=(
        None if self.scores.accuracy is None else self.scores.accuracy[rows]
      ),
    )
    return Batch(
      questions=[self.questions[q] for q in rows],
      rollout=jax.tree.map(lambda x: x[rows], self.rollout),
      scores=scores,
      advantages=self.advantages[rows],
    )


def demonstrations(questions: Sequence[Question], length: int) -> Rollout:
  """The written responses of an SFT batch, as a rollout of G = 1."""
  count = len(questions)
  ids = np.zeros((count, 1, length), np.int32)
  mask = np.zeros((count, 1, length), bool)
  for q, question in enumerate(questions):
    assert question.response_ids is not None
    ids[q, 0, : len(question.response_ids)] = question.response_ids
    mask[q, 0, : len(question.response_ids)] = True
  return Rollout(
    completion_ids=ids,
    completion_mask=mask,
    truncated=np.zeros((count, 1), bool),
    sampler_logprobs=np.zeros((count, 1, length), np.float32),
  )


def score(
  job: Job,
  scorer: Scorer | None,
  questions: Sequence[Question],
  rollout: Rollout,
) -> Scores:
  """Rewards of a rollout; a demonstration (no scorer) earns 1."""
  if scorer is None:
    shape = rollout.truncated.shape
    return Scores(
      rewards=np.ones(shape), parts={}, failed=np.zeros(shape[0], bool)
    )
  texts = decode_rollout(rollout, job.processor.decode)
  lengths = np.asarray(rollout.completion_mask).sum(-1)
  return scorer.score(texts, [q.example for q in questions], lengths)


def advantages_of(
  stage: Stage, questions: Sequence[Question], rollout: Rollout, scores: Scores
) -> Batch:
  """The step's batch; demonstrations weigh 1, failed groups 0."""
  if stage.kind == "sft":
    values = scores.rewards
  else:
    values = advantages.grpo(scores.rewards, eps=stage.advantage_eps)
  return Batch(
    questions=questions, rollout=rollout, scores=scores, advantages=values
  )


def choose(batch: Batch, count: int) -> np.ndarray:
  """The questions to learn from, in their order: [count] indices.

  Groups with unequal rewards first, for the others have no gradient; then
  those of equal rewards; failed ones last.
  """
  rank = np.where(np.any(batch.advantages != 0, axis=1), 0, 1)
  rank = np.where(batch.scores.failed, 2, rank)
  return np.sort(np.argsort(rank, kind="stable")[:count])


def learn(
  job: Job,
  stage: Stage,
  learner: Learner,
  state: TrainState,
  reference: Params | None,
  batch: Batch,
  step: int,
) -> tuple[TrainState, Metrics, Experience]:
  """The updates of one rollout, in equal shares of its questions.

  Args:
    job: mesh and layout.
    stage: its knobs.
    learner: of the stage.
    state: donated.
    reference: of the KL term; None: there is none.
    batch: what was chosen; failed groups are masked out.
    step: of the stage, from 0; the learning rate goes by it.

  Returns:
    The new state, metrics of all hosts, and the last update's experience.
  """
  parts = stage.updates_per_rollout
  mask = batch.rollout.completion_mask
  mask = mask & ~batch.scores.failed[:, None, None]

  def place(x: np.ndarray) -> jax.Array:
    return sharding.place(
      job.mesh, unbatch(x, stage.microbatches), ("microbatch",)
    )

  metrics: Metrics = {}
  experiences: list[Experience] = []
  for rows in np.split(np.arange(len(batch.questions)), parts):
    local = pack(
      [batch.questions[q] for q in rows],
      batch.rollout.completion_ids[rows],
      mask[rows],
      microbatches=stage.microbatches,
      layout=job.processor.layout,
    )
    tree = sharding.place(job.mesh, local, ("microbatch",))
    every = job.config["limits"]["blind_every"]
    if not experiences and every and step % every == 0:
      metrics = picture_effect(
        job, learner, state.params, local, place(mask[rows])
      )
    experiences.append(
      Experience(
        tree=tree,
        completion_mask=place(mask[rows]),
        advantages=place(batch.advantages[rows].astype(np.float32)),
        sampler_logprobs=place(batch.rollout.sampler_logprobs[rows]),
        # A rollout's only update starts from the policy that it updates.
        old_logprobs=(
          learner.logprobs(state.params, tree) if parts > 1 else None
        ),
        ref_logprobs=(
          None if reference is None else learner.logprobs(reference, tree)
        ),
      )
    )
  for i, experience in enumerate(experiences):
    rate = stage.learning_rate_at(step * parts + i)
    state, pairs = learner.update(state, experience, rate)
    found = {n: (float(s), float(c)) for n, (s, c) in pairs.items()}
    metrics = add(metrics, found | {"learning_rate": (rate, 1.0)})
  return state, metrics, experience


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


def rollout_metrics(batch: Batch) -> Metrics:
  """What a rollout earned and how long it was, over all hosts."""
  scores, rollout = batch.scores, batch.rollout
  kept = ~scores.failed
  rows = float(kept.sum() * rollout.truncated.shape[1])
  live = np.any(batch.advantages != 0, axis=1)
  lengths = rollout.completion_mask.sum(-1)
  local: Metrics = {
    "length": (lengths.sum(), float(lengths.size)),
    "truncated": (rollout.truncated.sum(), float(lengths.size)),
    "live_groups": (live.sum(), float(len(live))),
    "failed_groups": (scores.failed.sum(), 1.0),
  }
  if scores.parts:  # a demonstration earns nothing
    local["reward"] = (scores.rewards[kept].sum(), rows)
  for name, part in scores.parts.items():
    paid = part[kept & ~np.isnan(part).any(1)]  # not of rows with their own
    local[f"reward/{name}"] = (paid.sum(), float(paid.size))
  if scores.accuracy is not None:
    local["accuracy"] = (scores.accuracy[kept].sum(), rows)
  pairs = sharding.sum_over_hosts([list(pair) for pair in local.values()])
  return {
    n: (float(s), float(c)) for n, (s, c) in zip(local, pairs, strict=True)
  }


def cost(
  job: Job, stage: Stage, batch: Batch, chosen: Batch
) -> dict[str, float]:
  """What this step adds to the stage's ledger, over all hosts."""
  patches = sum(len(q.pixel_values) for q in batch.questions)
  prompts = sum(len(q.prompt_ids) for q in batch.questions)
  generated = float(batch.rollout.completion_mask.sum())
  trained = float(chosen.rollout.completion_mask.sum())
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
  rolled = counts["generated_tokens"] + prompts * (stage.kind == "grpo")
  flops = 2.0 * decoder * rolled + 6.0 * decoder * rows
  flops += 2.0 * tower * patches * (stage.kind == "grpo") + 6.0 * tower * seen
  counts["model_flops"] = flops
  totals = sharding.sum_over_hosts(list(counts.values()))
  return dict(zip(counts, totals.tolist(), strict=True)) | {
    "updates": stage.updates_per_rollout
  }
