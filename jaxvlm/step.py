"""What the lines of the loop do: roll out, score, learn."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxvlm import sharding, stages, watch
from jaxvlm.batch import Batch, best_first, join, membership, named
from jaxvlm.encoder import Encoder
from jaxvlm.evaluate import decode_rollout
from jaxvlm.job import Job
from jaxvlm.learner import Learner, TrainState
from jaxvlm.metrics import Metrics, add
from jaxvlm.packing import Packed
from jaxvlm.rl import advantages, kl
from jaxvlm.rollout.sampler import Sampler, Weights
from jaxvlm.scoring import Scorer
from jaxvlm.stages import Stage
from jaxvlm.types import Experience, Params, Question, Rollout, Scores


def encode_frozen(
  stage: Stage,
  encoder: Encoder,
  params: Params,
  questions: list[Question],
) -> list[Question]:
  """Questions with what the tower sees, where the stage does not train it.

  What its mergers see, where they are trained: each reader merges that.
  """
  if "vision_tower" in stage.freeze:
    return encoder(params, questions, merge="merger" in stage.freeze)
  return questions


def sampling_weights(
  stage: Stage, sampler: Sampler, params: Params
) -> Weights | None:
  """What all rollouts of a step read; None in SFT, which samples nothing."""
  return None if stage.kind == "sft" else sampler.weights(params)


def roll_out(
  stage: Stage,
  sampler: Sampler,
  weights: Weights | None,
  questions: Sequence[Question],
  key: jax.Array,
) -> Rollout:
  """Completions of these questions: sampled, or in SFT as they are written."""
  draws = stage.make_draws()
  if weights is None:
    return demonstrations(questions, draws.max_completion_length)
  return sampler.sample(weights, questions, key=key, draws=draws)


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


def grade(
  job: Job,
  scorer: Scorer | None,
  questions: Sequence[Question],
  rollout: Rollout,
) -> Callable[[], Scores]:
  """Starts to score a rollout in the workers, beside the device's work.

  A demonstration (no scorer) earns 1.

  Returns:
    What waits for the scores.
  """
  if scorer is None:
    shape = rollout.truncated.shape
    return lambda: Scores(
      rewards=np.ones(shape), parts={}, failed=np.zeros(shape[0], bool)
    )
  texts = decode_rollout(rollout, job.processor.decode)
  lengths = np.asarray(rollout.completion_mask).sum(-1)
  return scorer.start(texts, [q.example for q in questions], lengths).result


def policy_logprobs(
  job: Job,
  stage: Stage,
  learner: Learner,
  params: Params,
  reference: Params | None,
  questions: Sequence[Question],
  rollout: Rollout,
) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Logprobs [Q G C] by the policy that sampled, and by the reference.

  None where nothing asks for them: those of the policy, where a rollout feeds
  one update, which finds the same itself; the reference's, without a KL term.
  A reference whose tower is not the policy's looks at the pictures itself.
  """

  def score(
    policies: Sequence[Params], questions: Sequence[Question]
  ) -> list[np.ndarray]:
    if not policies:
      return []
    ids, mask = rollout.completion_ids, rollout.completion_mask
    return learner.logprobs(policies, in_rows(job, stage, questions, ids, mask))

  policies = [params] if stage.asks_old_logprobs else []
  others = [] if reference is None else [reference]
  own_sight = stage.reference == "base" and stages.base_sees_otherwise(
    job.schedule, stage
  )
  if others and own_sight:
    unseen = [dataclasses.replace(q, features=None) for q in questions]
    found = score(policies, questions) + score(others, unseen)
  else:
    found = score(policies + others, questions)
  old = found[0] if policies else None
  return old, found[-1] if others else None


def in_rows(
  job: Job,
  stage: Stage,
  questions: Sequence[Question],
  completion_ids: np.ndarray,
  completion_mask: np.ndarray,
) -> Packed:
  """Groups of this host in packed rows, as many at once as the stage says."""
  decoder, tower = job.matrix_sizes
  return Packed(
    questions,
    completion_ids,
    completion_mask,
    tokens=stage.microbatch_tokens,
    mesh=job.mesh,
    layout=job.processor.layout,
    largest=job.known.patches,
    patch_cost=tower / decoder,
  )


def advantages_of(
  stage: Stage,
  questions: Sequence[Question],
  rollout: Rollout,
  scores: Scores,
  old_logprobs: np.ndarray | None,
  ref_logprobs: np.ndarray | None,
) -> Batch:
  """A batch of what was sampled; demonstrations weigh 1, failed groups 0."""
  if stage.kind == "sft":
    values = rewarded = scores.rewards
  elif stage.kl_coef and stage.kl_target == "reward":
    assert old_logprobs is not None and ref_logprobs is not None
    tokens, _ = kl.estimate(
      jnp.asarray(old_logprobs),
      jnp.asarray(ref_logprobs),
      jnp.asarray(rollout.completion_mask),
      estimator=stage.kl_estimator,
      limit=stage.kl_limit,
    )
    penalty = stage.kl_coef * np.asarray(tokens, np.float64).sum(-1)
    ref_logprobs = None  # no term in the loss
    values = _estimate(stage, questions, scores, penalty)
    # A penalty differs within a group though its answers earn the same.
    rewarded = advantages.dr_grpo(
      np.where(scores.failed[:, None], 0.0, scores.rewards)
    )
  else:
    none = np.zeros(scores.rewards.shape)
    values = rewarded = _estimate(stage, questions, scores, none)
  return Batch(
    questions=questions,
    rollout=rollout,
    scores=scores,
    advantages=values,
    unequal=advantages.live(rewarded),
    old_logprobs=old_logprobs,
    ref_logprobs=ref_logprobs,
  )


def _estimate(
  stage: Stage,
  questions: Sequence[Question],
  scores: Scores,
  penalty: np.ndarray,
) -> np.ndarray:
  """Advantages; estimators that look at the whole batch see all hosts'."""
  options = dict(stage.advantage)
  name = options.pop("name")
  estimator = functools.partial(advantages.ESTIMATORS[name], **options)
  kept, own = sharding.gather(~scores.failed)
  values = np.zeros((len(kept), *penalty.shape[1:]), np.float32)
  rewards, _ = sharding.gather(scores.rewards - penalty)
  if name == "gdpo":
    parts, _ = sharding.gather(np.stack([*scores.parts.values()], axis=1))
    asked = [dict(q.example.rewards or stage.rewards) for q in questions]
    weights, _ = sharding.gather(
      np.array([[a.get(part, 0.0) for part in scores.parts] for a in asked])
    )
    values[kept] = estimator(np.moveaxis(parts[kept], 1, 0), weights[kept].T)
  else:
    values[kept] = estimator(rewards[kept])
  return values[own]


def enough(stage: Stage, waiting: Batch | None, found: Sequence[Batch]) -> bool:
  """Whether a step has rolled out what it learns from, or may no more.

  Args:
    stage: its knobs.
    waiting: groups with unequal rewards, left over by the step before.
    found: rollouts of this step.
  """
  if not found or len(found) == stage.max_rollouts:
    return bool(found)
  batches = [*found, waiting] if waiting else found
  live = sum(int(batch.live.sum()) for batch in batches)
  missing = stage.update_questions // jax.process_count() - live
  return int(sharding.agree_max(missing)) <= 0


def choose(
  stage: Stage, batch: Batch, waiting: Batch | None
) -> tuple[Batch, Batch | None]:
  """The groups to learn from, and those to keep for the next step.

  Args:
    stage: its knobs.
    batch: of this step.
    waiting: what the step before kept; None: nothing.
  """
  groups = join([waiting, batch]) if waiting else batch
  count = stage.update_questions // jax.process_count()
  rows, rest = best_first(groups, count)
  keep = stage.max_rollouts > 1 and len(rest)
  return groups.take(rows), groups.take(rest) if keep else None


def learn(
  job: Job,
  stage: Stage,
  learner: Learner,
  state: TrainState,
  batch: Batch,
  step: int,
) -> tuple[TrainState, Metrics]:
  """The updates of one rollout, in equal shares of its questions.

  Args:
    job: mesh and layout.
    stage: its knobs.
    learner: of the stage.
    state: donated.
    batch: what was chosen; failed groups are masked out.
    step: of the stage, from 0; the learning rate goes by it.

  Returns:
    The new state, and metrics of all hosts.
  """
  parts = stage.updates_per_rollout
  mask = batch.trained(stage.mask_truncated)
  metrics: Metrics = {}
  every = job.config["limits"]["blind_every"]
  for i, rows in enumerate(np.split(np.arange(len(batch.questions)), parts)):
    share = batch.take(rows)
    ids = share.rollout.completion_ids
    packed = in_rows(job, stage, share.questions, ids, mask[rows])
    if i == 0 and every and step % every == 0:
      others, changed = watch.exchanged(share.questions)
      shown = in_rows(job, stage, others, ids, mask[rows])
      metrics = watch.picture_effect(
        learner, state.params, packed, shown, mask[rows] & changed
      )
    rate = stage.learning_rate_at(step * parts + i)
    state, pairs = learner.update(
      state, experiences(stage, share, packed, mask[rows]), rate
    )
    metrics = add(metrics, _named(pairs, stage.labels))
    metrics = add(metrics, {"learning_rate": (rate, 1.0)})
    metrics = add(metrics, watch.padding(packed))
  return state, metrics


def experiences(
  stage: Stage, batch: Batch, packed: Packed, mask: np.ndarray
) -> Iterator[Experience]:
  """The microbatches of an update.

  Args:
    stage: its knobs.
    batch: what is learned from.
    packed: its groups in rows.
    mask: bool [Q G C], the tokens that count.
  """
  groups = membership(batch.questions, stage.labels)
  for u in range(len(packed)):
    place = functools.partial(packed.place, u=u)
    yield Experience(
      tree=packed.tree(u),
      completion_mask=place(mask),
      advantages=place(batch.advantages.astype(np.float32)),
      groups=place(groups),
      sampler_logprobs=place(batch.rollout.sampler_logprobs),
      old_logprobs=place(batch.old_logprobs),
      ref_logprobs=place(batch.ref_logprobs),
    )


def _named(pairs: object, labels: Sequence[str]) -> Metrics:
  metrics: Metrics = {}
  for name, pair in jax.device_get(pairs).items():
    sums, counts = pair
    if sums.ndim:
      metrics |= named(name, sums, counts, labels)
    else:
      metrics[name] = (float(sums), float(counts))
  return metrics
