"""What the lines of the loop hand to the learner; the learner is scripted."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm import step
from jaxvlm.step import Batch
from jaxvlm.types import Scores


@pytest.fixture
def job(mesh, layout):
  return types.SimpleNamespace(
    config={"limits": {"blind_every": 0}},
    mesh=mesh,
    processor=types.SimpleNamespace(
      layout=layout, decode=lambda ids: "-".join(map(str, ids))
    ),
    matrix_sizes=(1000, 100),
  )


@pytest.fixture
def stage():
  return types.SimpleNamespace(
    kind="grpo",
    advantage_eps=1e-9,
    updates_per_rollout=2,
    microbatches=2,
    learning_rate_at=lambda update: 0.1 * update,
  )


REWARDS = np.array(
  [[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]]
  + [[0] * 3] * 2,
  np.float64,
)
FAILED = np.array([False, False, True, False, False, False, False, True])


@pytest.fixture
def completions():
  """Completion (q, g) has 1 + (q + g) % 4 tokens."""
  lengths = 1 + (np.arange(8)[:, None] + np.arange(3)) % 4
  mask = np.arange(4) < lengths[..., None]
  ids = np.where(mask, np.arange(96).reshape(8, 3, 4) % 40 + 7, 0)
  return step.Rollout(
    completion_ids=ids.astype(np.int32),
    completion_mask=mask,
    truncated=lengths == 4,
    sampler_logprobs=np.where(mask, -1.0 - ids / 100, 0).astype(np.float32),
  )


@pytest.fixture
def scores():
  # Question 5 has another reward of its own.
  own = np.arange(8)[:, None] == 5
  parts = {
    "exact": np.where(own, np.nan, REWARDS),
    "mine": np.where(own, REWARDS, np.nan),
  }
  return Scores(rewards=REWARDS, parts=parts, failed=FAILED, accuracy=REWARDS)


@pytest.fixture
def batch(stage, questions, completions, scores):
  return step.advantages_of(stage, questions, completions, scores)


def test_advantages_are_of_the_group(batch):
  half = 1 / np.sqrt(3)
  np.testing.assert_allclose(
    batch.advantages[1], [2 * half, -half, -half], rtol=1e-6
  )
  assert (batch.advantages[[0, 2, 4, 6, 7]] == 0).all()


def test_demonstrations_weigh_one(stage, questions, completions, job):
  stage.kind = "sft"
  scores = step.score(job, None, questions, completions)
  batch = step.advantages_of(stage, questions, completions, scores)
  np.testing.assert_array_equal(batch.advantages, np.ones((8, 3)))
  assert not scores.failed.any() and scores.parts == {}


@pytest.mark.parametrize(
  ("count", "rows"),
  [
    (2, [1, 3]),
    (3, [1, 3, 5]),
    (4, [0, 1, 3, 5]),
    (6, [0, 1, 3, 4, 5, 6]),
    (7, [0, 1, 2, 3, 4, 5, 6]),
    (8, [0, 1, 2, 3, 4, 5, 6, 7]),
  ],
)
def test_live_groups_are_chosen_first_failed_last_in_their_order(
  batch, count, rows
):
  np.testing.assert_array_equal(step.choose(batch, count), rows)


def test_a_failed_group_is_last_even_if_it_looks_alive(batch):
  failed = np.arange(8) == 1
  scores = dataclasses.replace(batch.scores, failed=failed)
  chosen = step.choose(dataclasses.replace(batch, scores=scores), 7)
  assert 1 not in chosen


def test_taking_rows_takes_them_everywhere(batch, questions):
  rows = np.array([3, 5])
  taken = batch.take(rows)
  assert [q.question_id for q in taken.questions] == [103, 105]
  np.testing.assert_array_equal(taken.advantages, batch.advantages[rows])
  np.testing.assert_array_equal(taken.scores.rewards, REWARDS[rows])
  np.testing.assert_array_equal(taken.scores.parts["exact"][0], REWARDS[3])
  assert np.isnan(taken.scores.parts["exact"][1]).all()
  np.testing.assert_array_equal(taken.scores.accuracy, REWARDS[rows])
  np.testing.assert_array_equal(taken.scores.failed, FAILED[rows])
  for found, whole in zip(
    jax.tree.leaves(taken.rollout), jax.tree.leaves(batch.rollout), strict=True
  ):
    np.testing.assert_array_equal(found, whole[rows])


def test_written_responses_become_a_rollout_of_one_completion(questions):
  responses = [np.arange(20, 20 + n, dtype=np.int32) for n in (3, 1, 5)]
  rows = [
    dataclasses.replace(question, response_ids=ids)
    for question, ids in zip(questions, responses, strict=False)
  ]
  rollout = step.demonstrations(rows, 5)
  assert rollout.completion_ids.shape == (3, 1, 5)
  for q, ids in enumerate(responses):
    mask = rollout.completion_mask[q, 0]
    np.testing.assert_array_equal(rollout.completion_ids[q, 0][mask], ids)
    np.testing.assert_array_equal(mask, np.arange(5) < len(ids))
  assert not rollout.truncated.any()


def test_completions_are_scored_as_text_beside_their_examples(
  job, questions, completions, scores
):
  def score(texts, examples, lengths):
    np.testing.assert_array_equal(
      lengths, 1 + (np.arange(8)[:, None] + np.arange(3)) % 4
    )
    assert examples == [q.example for q in questions]
    assert texts[0][1] == "-".join(
      str(i) for i in completions.completion_ids[0, 1][:2]
    )
    return scores

  scorer = types.SimpleNamespace(score=score)
  assert step.score(job, scorer, questions, completions) is scores


# -- learn ---------------------------------------------------------------------


class Learner:
  """Logprobs are its parameters; an update adds 1 to them."""

  def __init__(self):
    self.updates = []

  def logprobs(self, params, tree):
    return jnp.full(tree.slots.shape, float(params))

  def update(self, state, experience, rate):
    self.updates.append((state.params, experience, rate))
    tokens = float(experience.completion_mask.sum())
    moved = types.SimpleNamespace(params=state.params + 1)
    return moved, {"loss": (2 * tokens, tokens), "update_skipped": (0.0, 1.0)}


@pytest.fixture
def learner():
  return Learner()


def learn(job, stage, learner, batch, reference=None, at=5):
  state = types.SimpleNamespace(params=10.0)
  return step.learn(job, stage, learner, state, reference, batch, at)


def test_several_updates_share_old_logprobs_of_the_training_graph(
  job, stage, learner, batch
):
  """Both are of the policy before the first update, not the sampler's."""
  state, _, _ = learn(job, stage, learner, batch)
  assert state.params == 12.0
  assert [params for params, _, _ in learner.updates] == [10.0, 11.0]
  for _, experience, _ in learner.updates:
    np.testing.assert_array_equal(
      experience.old_logprobs, np.full((2, 2, 3, 4), 10.0)
    )


def test_an_only_update_makes_no_extra_pass(
  job, stage, learner, batch, monkeypatch
):
  stage.updates_per_rollout = 1
  monkeypatch.setattr(
    learner, "logprobs", lambda *_: pytest.fail("an extra pass")
  )
  learn(job, stage, learner, batch)
  (_, experience, _), *others = learner.updates
  assert not others
  assert experience.old_logprobs is None and experience.ref_logprobs is None


def test_the_reference_gives_the_kl_terms_logprobs(job, stage, learner, batch):
  stage.updates_per_rollout = 1
  learn(job, stage, learner, batch, reference=3.0)
  np.testing.assert_array_equal(
    learner.updates[0][1].ref_logprobs, np.full((2, 4, 3, 4), 3.0)
  )


def test_each_update_learns_from_its_share_at_its_own_rate(
  job, stage, learner, batch
):
  _, metrics, last = learn(job, stage, learner, batch)
  rates = [rate for _, _, rate in learner.updates]
  assert rates == pytest.approx([0.1 * 10, 0.1 * 11])
  found = [experience for _, experience, _ in learner.updates]
  assert last is found[-1]
  for name, whole in (
    ("advantages", batch.advantages),
    ("sampler_logprobs", batch.rollout.sampler_logprobs),
  ):
    parts = [np.asarray(getattr(e, name)) for e in found]
    np.testing.assert_array_equal(
      np.concatenate([x.reshape(4, *x.shape[2:]) for x in parts]), whole
    )
  for i, experience in enumerate(found):
    ids = np.asarray(experience.tree.ids).reshape(4, -1)
    for row, question in zip(ids, batch.questions[4 * i :], strict=False):
      prompt = question.prompt_ids
      np.testing.assert_array_equal(row[: len(prompt)], prompt)
  assert metrics["learning_rate"] == pytest.approx((2.1, 2.0))
  tokens = batch.rollout.completion_mask[~FAILED].sum()
  assert metrics["loss"] == (2 * tokens, tokens)


def test_failed_groups_are_masked_out(job, stage, learner, batch):
  learn(job, stage, learner, batch)
  masks = np.concatenate(
    [
      np.asarray(e.completion_mask).reshape(4, 3, 4)
      for _, e, _ in learner.updates
    ]
  )
  slots = np.concatenate(
    [np.asarray(e.tree.slots).reshape(4, 3, 4) for _, e, _ in learner.updates]
  )
  expected = batch.rollout.completion_mask & ~FAILED[:, None, None]
  np.testing.assert_array_equal(masks, expected)
  np.testing.assert_array_equal(slots >= 0, expected)


# -- blindness -----------------------------------------------------------------


class Seeing(Learner):
  """A token's logprob is how bright its question's pictures are."""

  def logprobs(self, params, tree):
    if tree.vision is None:
      return jnp.zeros(tree.slots.shape)
    light = tree.vision.pixel_values.sum((2, 3))[..., None, None]
    return params * jnp.broadcast_to(light, tree.slots.shape)


def test_the_effect_of_pictures_is_what_exchanging_them_changes(
  job, stage, batch
):
  """Of each microbatch a question is shown the pictures of the one before."""
  stage.updates_per_rollout = 1
  job.config["limits"]["blind_every"] = 5
  _, metrics, _ = learn(job, stage, Seeing(), batch)
  light = np.array([q.pixel_values.sum() for q in batch.questions])
  change = np.abs(light.reshape(2, 4) - np.roll(light.reshape(2, 4), 1, 1))
  seen = [len(q.pixel_values) > 0 for q in batch.questions]
  other = np.array(seen).reshape(2, 4)
  other |= np.roll(other, 1, 1)
  mask = batch.rollout.completion_mask & ~FAILED[:, None, None]
  tokens = mask.sum((1, 2)).reshape(2, 4) * other
  total, count = metrics["picture_effect"]
  assert count == tokens.sum() > 0
  assert total == pytest.approx(10 * (change * tokens).sum(), rel=1e-4)


def test_a_blind_model_has_no_effect_of_pictures(job, stage, learner, batch):
  job.config["limits"]["blind_every"] = 5
  _, metrics, _ = learn(job, stage, learner, batch)
  assert metrics["picture_effect"][0] == 0 < metrics["picture_effect"][1]


@pytest.mark.parametrize(
  ("every", "measured"), [(0, False), (2, False), (1, True)]
)
def test_the_effect_is_measured_at_the_steps_asked_for(
  job, stage, batch, every, measured
):
  job.config["limits"]["blind_every"] = every
  _, metrics, _ = learn(job, stage, Seeing(), batch)
  assert ("picture_effect" in metrics) == measured


def test_without_other_pictures_there_is_no_effect_to_measure(
  job, stage, batch
):
  same = [batch.questions[0]] * len(batch.questions)
  job.config["limits"]["blind_every"] = 1
  alike = dataclasses.replace(batch, questions=same)
  _, metrics, _ = learn(job, stage, Seeing(), alike)
  assert "picture_effect" not in metrics


# -- metrics and cost ----------------------------------------------------------


def test_a_rollouts_metrics_are_those_made_by_hand(batch):
  lengths = batch.rollout.completion_mask.sum()
  assert step.rollout_metrics(batch) == {
    "reward": (7.0, 18.0),  # six groups did not fail
    "reward/exact": (5.0, 15.0),  # of five: question 5 has its own
    "reward/mine": (2.0, 3.0),
    "accuracy": (7.0, 18.0),
    "length": (lengths, 24.0),
    "truncated": (6.0, 24.0),
    "live_groups": (3.0, 8.0),
    "failed_groups": (2.0, 1.0),
  }


def test_a_step_costs_what_is_counted_by_hand(job, stage, batch, questions):
  chosen = batch.take(np.array([1, 3]))
  cost = step.cost(job, stage, batch, chosen)
  prompts = sum(len(q.prompt_ids) for q in questions)
  patches = sum(len(q.pixel_values) for q in questions)
  generated = batch.rollout.completion_mask.sum()
  trained = batch.rollout.completion_mask[[1, 3]].sum()
  own = [questions[1], questions[3]]
  rows = sum(len(q.prompt_ids) for q in own) + trained
  seen = sum(len(q.pixel_values) for q in own)
  assert cost == {
    "questions": 8,
    "patches": patches,
    "prompt_tokens": prompts,
    "generated_tokens": generated,
    "trained_tokens": trained,
    "updates": 2,
    "model_flops": 2000 * (prompts + generated)
    + 200 * patches
    + 6000 * rows
    + 600 * seen,
  }


def test_demonstrations_cost_no_generation(job, stage, batch):
  stage.kind = "sft"
  cost = step.cost(job, stage, batch, batch)
  assert cost["generated_tokens"] == 0
  rows = cost["prompt_tokens"] + cost["trained_tokens"]
  assert cost["model_flops"] == 6000 * rows + 600 * cost["patches"]


def test_a_batch_is_frozen(batch):
  with pytest.raises(dataclasses.FrozenInstanceError):
    batch.advantages = None
  assert isinstance(batch, Batch)
