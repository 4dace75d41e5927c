"""What a step is watched by, against what is counted by hand."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm import step, watch
from tests.steps import (  # noqa: F401
  FAILED,
  REWARDS,
  Learner,
  batch_fixture,
  completions_fixture,
  job_fixture,
  learner_fixture,
  scores_fixture,
  stage_fixture,
)


def learn(job, stage, learner, batch):
  """The metrics of a step's updates, at step 5."""
  state = types.SimpleNamespace(params=10.0)
  return step.learn(job, stage, learner, state, batch, 5)[1]


def test_padding_of_a_rollout_is_what_came_since():
  before = {"padding/prompts": (3.0, 10.0)}
  now = {"padding/prompts": (5.0, 30.0), "padding/lanes": (1.0, 4.0)}
  assert watch.padding_since(before, now) == {
    "padding/prompts": (2.0, 20.0),
    "padding/lanes": (1.0, 4.0),
  }
  assert watch.padding_since(now, now) == {}
  assert watch.padding_since({}, {}) == {}


def test_a_stall_is_what_no_phase_of_the_devices_took():
  timing = {"data": 1.0, "encode": 0.5, "rollout": 2.0, "logprobs": 0.25}
  timing |= {"score": 0.5, "update": 3.0}
  assert watch.stall(timing, 8.0) == {"host_stall": 2.25}
  assert watch.stall(timing | {"record": 0.5}, 8.0) == {"host_stall": 2.75}


# -- blindness -----------------------------------------------------------------


class Seeing(Learner):
  """A token's logprob is how bright its question's pictures are."""

  def score(self, params, tree):
    light = np.zeros((*tree.slots.shape[:1], 1, 1), np.float32)
    if tree.vision is not None:
      room = len(tree.slots) // len(tree.ids)
      pixels = np.asarray(tree.vision.pixel_values)
      merged = pixels.reshape(len(pixels), -1, 4, pixels.shape[-1]).sum((2, 3))
      for place in range(len(light)):
        row, own = divmod(place, room)
        mine = np.asarray(tree.tree_ids[row]) == own
        index = np.asarray(tree.vision_index[row])[mine]
        light[place] = merged[row, index[index >= 0]].sum()
    return params * jnp.broadcast_to(light, tree.slots.shape)


def test_the_effect_of_pictures_is_what_exchanging_them_changes(
  job, stage, batch
):
  """A question is shown the pictures of the one before that has some."""
  stage.updates_per_rollout = 1
  job.config["limits"]["blind_every"] = 5
  metrics = learn(job, stage, Seeing(), batch)
  seen = [q.pixel_values for q in batch.questions if len(q.pixel_values)]
  change = np.zeros(len(batch.questions))
  change[[len(q.pixel_values) > 0 for q in batch.questions]] = [
    np.abs(own.sum() - np.resize(other, own.shape).sum())
    for own, other in zip(seen, [seen[-1], *seen[:-1]], strict=True)
  ]
  mask = batch.rollout.completion_mask & ~FAILED[:, None, None]
  tokens = mask.sum((1, 2)) * (change > 0)
  total, count = metrics["picture_effect"]
  assert count == tokens.sum() > 0
  assert total == pytest.approx(10 * (change * tokens).sum(), rel=1e-4)


def test_a_blind_model_has_no_effect_of_pictures(job, stage, learner, batch):
  job.config["limits"]["blind_every"] = 5
  metrics = learn(job, stage, learner, batch)
  assert metrics["picture_effect"][0] == 0 < metrics["picture_effect"][1]


@pytest.mark.parametrize(
  ("every", "measured"), [(0, False), (2, False), (1, True)]
)
def test_the_effect_is_measured_at_the_steps_asked_for(
  job, stage, batch, every, measured
):
  job.config["limits"]["blind_every"] = every
  metrics = learn(job, stage, Seeing(), batch)
  assert ("picture_effect" in metrics) == measured


def test_without_other_pictures_there_is_no_effect_to_measure(
  job, stage, batch
):
  same = [batch.questions[0]] * len(batch.questions)
  job.config["limits"]["blind_every"] = 1
  alike = dataclasses.replace(batch, questions=same)
  metrics = learn(job, stage, Seeing(), alike)
  assert "picture_effect" not in metrics


# -- metrics and cost ----------------------------------------------------------


def test_a_rollouts_metrics_are_those_made_by_hand(stage, batch):
  lengths = batch.rollout.completion_mask.sum(-1)
  right = (REWARDS == 1) & ~FAILED[:, None]
  metrics = watch.rollout_metrics(stage, batch)
  own = {name: pair for name, pair in metrics.items() if name.count("/") < 2}
  assert {n: p for n, p in own.items() if n.split("/")[0] not in KINDS} == {
    "reward": (7.0, 18.0),  # six groups did not fail
    "reward/exact": (5.0, 15.0),
    "reward/mine": (2.0, 3.0),  # of the one row that has it
    "accuracy": (7.0, 18.0),
    "length": (lengths.sum(), 24.0),
    "length_right": (lengths[right].sum(), 7.0),
    "length_wrong": (lengths[~right & ~FAILED[:, None]].sum(), 11.0),
    "truncated": (6.0, 24.0),
    "live_groups": (3.0, 8.0),
    "failed_groups": (2.0, 1.0),
  }


KINDS = ("images", "text", "own", "other")


def test_metrics_of_rows_with_pictures_and_without_stand_apart(stage, batch):
  metrics = watch.rollout_metrics(stage, batch)
  seen = np.array([len(q.pixel_values) > 0 for q in batch.questions])
  lengths = batch.rollout.completion_mask.sum(-1)
  for kind, rows in (("images", seen), ("text", ~seen)):
    assert 0 < rows.sum() < 8
    assert metrics[f"{kind}/length"] == (lengths[rows].sum(), 3 * rows.sum())
    accuracy = REWARDS[rows & ~FAILED]
    assert metrics[f"{kind}/accuracy"] == (accuracy.sum(), accuracy.size)


def test_metrics_of_a_stages_sources_stand_apart(stage, batch):
  stage.labels = ("", "other")
  questions = [
    dataclasses.replace(
      q, example=dataclasses.replace(q.example, report_as=label)
    )
    for q, label in zip(batch.questions, ["", "other"] * 4, strict=True)
  ]
  metrics = watch.rollout_metrics(
    stage, dataclasses.replace(batch, questions=questions)
  )
  for label, rows in (("own", slice(0, 8, 2)), ("other", slice(1, 8, 2))):
    paid = REWARDS[rows][~FAILED[rows]]
    assert metrics[f"{label}/reward"] == (paid.sum(), paid.size)


def test_what_is_all_of_a_batch_is_not_said_twice(stage, batch):
  stage.labels = ("", "other")
  seen = np.flatnonzero([len(q.pixel_values) > 0 for q in batch.questions])
  metrics = watch.rollout_metrics(stage, batch.take(seen))
  assert not [name for name in metrics if name.split("/")[0] in KINDS]


def test_the_supply_of_groups_is_counted(stage, batch):
  assert watch.supply(stage, [batch], batch) == {}
  stage.max_rollouts = 3
  assert watch.supply(stage, [batch, batch], batch) == {
    "rollouts": (2.0, 1.0),
    "idle_groups": (5.0, 1.0),
  }


def test_a_shortage_is_told_with_its_counts(stage):
  stage.name, stage.max_rollouts, stage.rollout_questions = "seeing", 3, 8
  assert watch.shortage(stage, 7, {}) is None
  assert watch.shortage(stage, 7, {"idle_groups": (0.0, 1.0)}) is None
  told = watch.shortage(stage, 7, {"idle_groups": (5.0, 1.0)})
  assert "step 7 ran out after 3 rollouts of 8 questions" in told
  assert "of 8 groups that it learns from, 5 have one reward" in told


def test_speed_counts_prompts_once_and_as_easyr1_does(batch):
  spent = {"prompt_tokens": 100.0, "generated_tokens": 60.0}
  speed = watch.speed(batch, spent, 2.0)  # groups of 3
  assert speed["tokens_per_second"] == 80.0
  assert speed["tokens_per_second_per_device"] == 360 / 2 / jax.device_count()


def test_a_step_costs_what_is_counted_by_hand(job, stage, batch, questions):
  chosen = batch.take(np.array([1, 3]))
  cost = watch.cost(job, stage, batch, chosen)
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
  cost = watch.cost(job, stage, batch, batch)
  assert cost["generated_tokens"] == 0
  rows = cost["prompt_tokens"] + cost["trained_tokens"]
  assert cost["model_flops"] == 6000 * rows + 600 * cost["patches"]


def test_each_pass_over_a_rollout_is_counted(job, stage, batch):
  once = watch.cost(job, stage, batch, batch)
  tokens = once["prompt_tokens"] + once["generated_tokens"]
  forward = 2000 * tokens + 200 * once["patches"]
  stage.asks_old_logprobs, stage.kl_coef = True, 0.1
  thrice = watch.cost(job, stage, batch, batch)
  assert thrice["model_flops"] - once["model_flops"] == 2 * forward
