"""What the lines of the loop hand to the learner; the learner is scripted."""

import dataclasses
import operator
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm import step
from jaxvlm.types import Vision
from tests.steps import (  # noqa: F401
  FAILED,
  REWARDS,
  advantages_of,
  batch_fixture,
  by_question,
  completions_fixture,
  job_fixture,
  learner_fixture,
  places,
  scores_fixture,
  stage_fixture,
)


def test_advantages_are_of_the_group(batch):
  half = 1 / np.sqrt(3)
  np.testing.assert_allclose(
    batch.advantages[1], [2 * half, -half, -half], rtol=1e-6
  )
  assert (batch.advantages[[0, 2, 4, 6, 7]] == 0).all()


def test_demonstrations_weigh_one(stage, questions, completions, job):
  stage.kind = "sft"
  scores = step.grade(job, None, questions, completions)()
  batch = advantages_of(stage, questions, completions, scores)
  np.testing.assert_array_equal(batch.advantages, np.ones((8, 3)))
  assert not scores.failed.any() and scores.parts == {}


@pytest.mark.parametrize(
  ("name", "first"),
  [("dr_grpo", [2 / 3, -1 / 3, -1 / 3]), ("rloo", [1, -0.5, -0.5])],
)
def test_the_estimator_is_the_one_that_is_named(
  stage, questions, completions, scores, name, first
):
  stage.advantage = {"name": name}
  found = advantages_of(stage, questions, completions, scores).advantages
  np.testing.assert_allclose(found[1], first, rtol=1e-6)


def test_failed_groups_do_not_count_in_the_deviation_of_a_batch(
  stage, questions, completions, scores
):
  stage.advantage = {"name": "batch_std", "eps": 0.0}
  found = advantages_of(stage, questions, completions, scores).advantages
  deviation = REWARDS[~FAILED].std(ddof=1)
  np.testing.assert_allclose(found[1, 0], 2 / 3 / deviation, rtol=1e-6)
  assert (found[FAILED] == 0).all()


def test_gdpo_takes_the_parts_and_their_weights(
  stage, questions, completions, scores
):
  stage.advantage = {"name": "gdpo", "eps": 1e-9}
  stage.rewards = (("exact", 1.0), ("short", 2.0))
  short = np.broadcast_to([0.0, 0.01, 0.02], REWARDS.shape)
  scores = dataclasses.replace(scores, parts={"exact": REWARDS, "short": short})
  found = advantages_of(stage, questions, completions, scores).advantages
  # Of a group that is right or wrong as a whole, the second part alone is left.
  assert found[0, 0] == -found[0, 2] < 0
  # 2 / sqrt(3) - 2 and -1 / sqrt(3) + 2, over one deviation.
  ratio = (2 / np.sqrt(3) - 2) / (2 - 1 / np.sqrt(3))
  np.testing.assert_allclose(found[1, 0] / found[1, 2], ratio, rtol=1e-6)


def test_a_kl_penalty_is_taken_from_the_reward(
  stage, questions, completions, scores
):
  stage.kl_coef, stage.kl_target = 0.5, "reward"
  stage.advantage = {"name": "dr_grpo"}
  mask = completions.completion_mask
  old = np.where(mask, -1.0, np.nan).astype(np.float32)
  ref = np.where(mask, -1.5, np.nan).astype(np.float32)
  found = advantages_of(stage, questions, completions, scores, old, ref)
  paid = REWARDS - 0.5 * 0.5 * mask.sum(-1)
  expected = paid - paid.mean(1, keepdims=True)
  np.testing.assert_allclose(
    found.advantages[~FAILED], expected[~FAILED], rtol=1e-6
  )
  assert found.ref_logprobs is None  # no second term in the loss
  np.testing.assert_array_equal(found.scores.rewards, REWARDS)


def test_a_kl_penalty_makes_no_group_of_one_reward_worth_choosing(
  stage, questions, completions, scores, batch
):
  stage.kl_coef, stage.kl_target = 0.5, "reward"
  mask = completions.completion_mask
  old, ref = (np.where(mask, x, 0).astype(np.float32) for x in (-1.0, -1.5))
  # What a failed group earned is not known.
  rewards = np.where(FAILED[:, None], np.nan, REWARDS)
  scores = dataclasses.replace(scores, rewards=rewards)
  found = advantages_of(stage, questions, completions, scores, old, ref)
  assert np.any(found.advantages[0] != 0)
  np.testing.assert_array_equal(found.live, batch.live)
  assert batch.live.sum() == 3


# -- how much is rolled out ------------------------------------------------------


def few(batch, rows):
  return batch.take(np.array(rows))


def test_a_step_rolls_out_once_where_it_may_no_more(stage, batch):
  assert not step.enough(stage, None, [])
  assert step.enough(stage, None, [batch])


def test_groups_of_one_reward_are_replaced_up_to_the_budget(stage, batch):
  stage.max_rollouts, stage.update_questions = 3, 4
  assert not step.enough(stage, None, [batch])  # 3 groups are alive
  assert step.enough(stage, None, [batch, batch])
  assert step.enough(stage, few(batch, [1]), [batch])
  dead = few(batch, [0, 2, 4])
  assert not step.enough(stage, None, [dead, dead])
  assert step.enough(stage, None, [dead, dead, dead])


def test_what_waited_is_learned_from_first_and_the_rest_waits(stage, batch):
  stage.max_rollouts, stage.update_questions = 2, 3
  chosen, waiting = step.choose(stage, batch, few(batch, [3]))
  ids = [q.question_id - 100 for q in chosen.questions]
  assert ids == [3, 1, 3]
  assert [q.question_id - 100 for q in waiting.questions] == [5]
  _, waiting = step.choose(stage, batch, None)
  assert waiting is None
  stage.max_rollouts, stage.update_questions = 1, 2
  assert step.choose(stage, batch, None)[1] is None  # they are let go


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
  def start(texts, examples, lengths):
    np.testing.assert_array_equal(
      lengths, 1 + (np.arange(8)[:, None] + np.arange(3)) % 4
    )
    assert examples == [q.example for q in questions]
    assert texts[0][1] == "-".join(
      str(i) for i in completions.completion_ids[0, 1][:2]
    )
    return types.SimpleNamespace(result=lambda: scores)

  scorer = types.SimpleNamespace(start=start)
  assert step.grade(job, scorer, questions, completions)() is scores


# -- learn ---------------------------------------------------------------------


def learn(job, stage, learner, batch, at=5):
  state = types.SimpleNamespace(params=10.0)
  return step.learn(job, stage, learner, state, batch, at)


@pytest.mark.parametrize("asked", [True, False])
def test_logprobs_are_of_the_policy_that_sampled_and_of_the_reference(
  job, stage, learner, questions, completions, asked
):
  stage.asks_old_logprobs = asked

  def score(params, tree):
    rows = jnp.asarray(places(tree), jnp.float32)[:, None, None]
    return params + jnp.broadcast_to(rows, tree.slots.shape)

  learner.score = score
  old, ref = step.policy_logprobs(
    job, stage, learner, 10.0, 3.0, questions, completions
  )
  expected = np.broadcast_to(np.arange(8)[:, None, None], (8, 3, 4))
  np.testing.assert_array_equal(ref, 3 + expected)
  if asked:
    np.testing.assert_array_equal(old, 10 + expected)
  else:
    assert old is None


@pytest.mark.parametrize(
  ("before", "reference", "sees"),
  [
    ((), "base", True),
    (("vision_tower",), "base", False),
    ((), "stage_start", False),
  ],
)
def test_a_base_reference_looks_itself_where_the_tower_was_trained_before(
  job, stage, learner, questions, completions, before, reference, sees
):
  stage.name, stage.freeze = "second", ("vision_tower",)
  stage.asks_old_logprobs, stage.reference = True, reference
  first = types.SimpleNamespace(name="first", freeze=before)
  job.schedule = (first, stage)
  known = [
    dataclasses.replace(
      q, features=np.zeros((1, len(q.pixel_values) // 4, 4, 8), np.float32)
    )
    for q in questions
  ]

  def score(params, tree):
    looks = isinstance(tree.vision, Vision)
    return jnp.full(tree.slots.shape, params + 100.0 * looks)

  learner.score = score
  old, ref = step.policy_logprobs(
    job, stage, learner, 10.0, 3.0, known, completions
  )
  assert np.unique(old) == [10]
  assert np.unique(ref) == [3 + 100 * sees]


def test_logprobs_that_nobody_asks_for_cost_no_pass(
  job, stage, learner, questions, completions, monkeypatch
):
  monkeypatch.setattr(
    learner, "logprobs", lambda *_: pytest.fail("an extra pass")
  )
  found = step.policy_logprobs(
    job, stage, learner, 10.0, None, questions, completions
  )
  assert found == (None, None)


def test_several_updates_take_turns_and_share_the_old_logprobs(
  job, stage, learner, questions, completions, scores
):
  old = np.arange(96, dtype=np.float32).reshape(8, 3, 4)
  batch = advantages_of(stage, questions, completions, scores, old, 2 * old)
  state, _ = learn(job, stage, learner, batch)
  assert state.params == 12.0
  assert [params for params, _, _ in learner.updates] == [10.0, 11.0]
  for i, (_, found, _) in enumerate(learner.updates):
    own = old[4 * i : 4 * i + 4]
    for name, expected in (("old_logprobs", own), ("ref_logprobs", 2 * own)):
      values = by_question(found, operator.attrgetter(name))
      np.testing.assert_array_equal(values, expected)


def masks_of(learner):
  return by_question(
    [micro for _, found, _ in learner.updates for micro in found],
    lambda micro: micro.completion_mask,
  )


def test_truncated_completions_are_masked_out_where_asked(
  job, stage, learner, batch
):
  stage.mask_truncated = True
  learn(job, stage, learner, batch)
  masks = masks_of(learner)
  cut = batch.rollout.truncated | FAILED[:, None]
  assert cut.sum() > FAILED.sum() * 3
  np.testing.assert_array_equal(masks.any(-1), ~cut)


def test_each_update_learns_from_its_share_at_its_own_rate(
  job, stage, learner, batch
):
  _, metrics = learn(job, stage, learner, batch)
  rates = [rate for _, _, rate in learner.updates]
  assert rates == pytest.approx([0.1 * 10, 0.1 * 11])
  updates = [found for _, found, _ in learner.updates]
  assert all(len(found) > 1 for found in updates)
  for i, found in enumerate(updates):
    taken = np.concatenate([places(micro.tree) for micro in found])
    np.testing.assert_array_equal(
      np.sort(taken[taken >= 0]), np.arange(4 * i, 4 * i + 4)
    )
    for name, whole in (
      ("advantages", batch.advantages),
      ("sampler_logprobs", batch.rollout.sampler_logprobs),
    ):
      values = by_question(found, operator.attrgetter(name))
      np.testing.assert_array_equal(values, whole[4 * i : 4 * i + 4])
  assert metrics["learning_rate"] == pytest.approx((2.1, 2.0))
  tokens = batch.rollout.completion_mask[~FAILED].sum()
  assert metrics["loss"] == (2 * tokens, tokens)


def test_failed_groups_are_masked_out(job, stage, learner, batch):
  learn(job, stage, learner, batch)
  slots = by_question(
    [micro for _, found, _ in learner.updates for micro in found],
    lambda micro: micro.tree.slots,
  )
  expected = batch.rollout.completion_mask & ~FAILED[:, None, None]
  np.testing.assert_array_equal(masks_of(learner), expected)
  np.testing.assert_array_equal(slots >= 0, expected)
