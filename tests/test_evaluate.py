"""Evaluation with a scripted sampler and scorer; every number by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxvlm import evaluate
from jaxvlm.evaluate import (
  Asked,
  Evaluator,
  HeldOut,
  answer,
  decode_rollout,
  majority,
)
from jaxvlm.rollout.sampler import Draws
from jaxvlm.types import Example, Question, Rollout, Scores

RIGHT, WRONG, BROKEN = 1, 2, 3
# (greedy, three sampled completions) of five questions.
SCRIPT = (
  (RIGHT, (RIGHT, RIGHT, WRONG)),
  (WRONG, (WRONG, WRONG, WRONG)),
  (WRONG, (WRONG, RIGHT, WRONG)),
  (RIGHT, (RIGHT, RIGHT, RIGHT)),
  (RIGHT, (BROKEN, RIGHT, RIGHT)),
)
TASKS = ("color", "color", "count", "color", "count")
ANSWERS = ("red", "red", "2", "blue", "3")


class Sampler:
  """Writes the script's token as often as the question's number, plus 1."""

  def __init__(self):
    self.calls = []
    self.events = []

  def weights(self, params):
    return params + "'s weights"

  def start(self, weights, questions, *, key, draws):
    self.calls.append((weights, [q.question_id for q in questions], key, draws))
    shape = (len(questions), draws.num_completions, 6)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, question in enumerate(questions):
      greedy, sampled = SCRIPT[question.question_id]
      drawn = (greedy,) if draws.temperature == 0 else sampled
      ids[row] = np.array(drawn)[:, None]
      mask[row] = np.arange(6) <= question.question_id
    rollout = Rollout(
      completion_ids=ids,
      completion_mask=mask,
      truncated=mask.sum(-1) >= 5,
      sampler_logprobs=np.zeros(shape, np.float32),
    )
    number = len(self.calls)
    self.events.append(f"start {number}")

    def wait():
      self.events.append(f"wait {number}")
      return rollout

    return wait


class Scorer:
  """1 for RIGHT; a group with a BROKEN completion fails, though not scored 0."""

  def __init__(self):
    self.examples = []
    self.lengths = []

  def score(self, completions, examples, lengths):
    self.examples += examples
    self.lengths += lengths.tolist()
    right = [[text[0] == str(RIGHT) for text in group] for group in completions]
    failed = [
      any(text[0] == str(BROKEN) for text in group) for group in completions
    ]
    return Scores(
      rewards=np.array(right, np.float64), parts={}, failed=np.array(failed)
    )


def make_questions(tasks=TASKS):
  return [
    Question(
      question_id=i,
      example=Example(problem="", answer=ANSWERS[i], task=task),
      prompt_ids=np.zeros(2, np.int32),
      position_ids=np.zeros((3, 2), np.int32),
      pixel_values=np.zeros((0, 1), np.float32),
      image_grid_thw=np.zeros((0, 3), np.int32),
    )
    for i, task in enumerate(tasks)
  ]


def make_evaluator(held_out, sampler, **changes):
  return Evaluator(
    held_out,
    sampler=sampler,
    decode=lambda ids: "".join(map(str, ids)),
    **{
      "seed": 0,
      "batch_questions": 2,
      "num_completions": 3,
      "max_completion_length": 6,
      "temperature": 1.0,
      "top_k": 0,
      "top_p": 1.0,
    }
    | changes,
  )


@pytest.fixture
def sampler():
  return Sampler()


def make_held_out(questions, own=slice(None)):
  return HeldOut(
    capability="sight",
    examples=[question.example for question in questions],
    questions=questions[own],
    scorer=Scorer(),
  )


@pytest.fixture
def held_out():
  return make_held_out(make_questions())


EXPECTED = {
  "sight/greedy": 3 / 5,
  "sight/mean@3": (2 + 0 + 1 + 3 + 0) / 15,  # the broken group is wrong
  "sight/pass@3": 3 / 5,
  "sight/length": (1 + 2 + 3 + 4 + 5) / 5,
  "sight/truncated": 1 / 5,
  "sight/task/color/greedy": 2 / 3,
  "sight/task/color/majority": 2 / 3,
  "sight/task/count/greedy": 1 / 2,
  "sight/task/count/majority": 1 / 2,
}


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 8])
def test_metrics_are_those_made_by_hand_whatever_the_batch(
  held_out, sampler, batch
):
  """Batches that do not divide are filled up, and the filling not counted."""
  evaluator = make_evaluator([held_out], sampler, batch_questions=batch)
  assert evaluator.run("policy") == pytest.approx(EXPECTED)
  assert {len(ids) for _, ids, _, _ in sampler.calls} == {batch}
  assert len(held_out.scorer.examples) == 2 * 5


def test_rewards_are_told_how_many_tokens_each_completion_has(
  held_out, sampler
):
  make_evaluator([held_out], sampler, batch_questions=8).run("policy")
  one = [[1], [2], [3], [4], [5]]
  assert held_out.scorer.lengths == one + [[n] * 3 for [n] in one]


def test_each_batch_is_answered_greedily_and_by_draws(held_out, sampler):
  make_evaluator([held_out], sampler, top_p=0.9).run("policy")
  draws = [draws for _, _, _, draws in sampler.calls]
  assert [d.temperature for d in draws] == [0.0, 1.0] * 3
  assert [d.num_completions for d in draws] == [1, 3] * 3
  assert draws[1].top_p == 0.9
  assert {weights for weights, *_ in sampler.calls} == {"policy's weights"}


def test_draws_depend_on_the_seed_and_the_capability_alone(held_out):
  other = dataclasses.replace(held_out, capability="reason")

  def keys(held_outs, **changes):
    sampler = Sampler()
    make_evaluator(held_outs, sampler, **changes).run("policy")
    return [jax.random.key_data(key).tolist() for _, _, key, _ in sampler.calls]

  both = keys([held_out, other])
  assert both == keys([held_out, other], batch_questions=2)
  assert both[:6] == keys([held_out]) and both[6:] == keys([other])
  assert both[0] not in both[6:]
  assert both[0] not in keys([held_out], seed=1)


def test_progress_counts_every_batch(held_out, sampler):
  evaluator = make_evaluator([held_out, held_out], sampler)
  calls = []
  evaluator.run("policy", lambda: calls.append(None))
  assert len(calls) == evaluator.batches() == 2 * 2 * 3


def test_a_batch_is_under_way_while_the_one_before_is_scored(sampler, held_out):
  asked = [
    Asked(
      questions=held_out.questions[start : start + 2],
      own=2,
      key=None,
      draws=Draws(
        num_completions=3,
        max_completion_length=6,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
      ),
    )
    for start in (0, 1, 2)
  ]
  answered = answer(
    asked, sampler=sampler, weights="w", decode=str, scorer=held_out.scorer
  )
  assert [a.asked for a in answered] == asked
  assert sampler.events == [
    *("start 1", "start 2", "wait 1"),
    *("start 3", "wait 2", "wait 3"),
  ]


def test_questions_without_a_task_have_no_task_metrics(sampler):
  held_out = make_held_out(make_questions([""] * 5))
  metrics = make_evaluator([held_out], sampler).run("policy")
  assert not any("task" in name for name in metrics)
  assert metrics["sight/greedy"] == pytest.approx(3 / 5)


def test_hosts_evaluate_their_own_questions_and_add_their_sums(monkeypatch):
  """Each host has no others, and all of them count the same batches."""
  sums, seen = [], []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for host in (0, 1):
    held_out = make_held_out(make_questions(), slice(host, None, 2))
    sampler = Sampler()
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    monkeypatch.setattr(
      evaluate.sharding,
      "sum_over_hosts",
      lambda values: sums.append(np.array(values)) or np.ones(len(values)),
    )
    make_evaluator([held_out], sampler, batch_questions=4).run("policy")
    seen.append([ids for _, ids, _, _ in sampler.calls][::2])
  assert seen == [[[0, 2], [4, 0]], [[1, 3], [1, 1]]]  # the first fills up
  monkeypatch.setattr(
    evaluate.sharding, "sum_over_hosts", lambda values: sums[0] + sums[1]
  )
  metrics = make_evaluator([held_out], Sampler(), batch_questions=4).run("")
  assert metrics == pytest.approx(EXPECTED)


def test_a_host_that_no_question_is_left_for_counts_none(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(evaluate.sharding, "sum_over_hosts", np.array)
  held_out, sampler = make_held_out(make_questions([""])), Sampler()
  metrics = make_evaluator([held_out], sampler, batch_questions=4).run("")
  assert [ids for _, ids, _, _ in sampler.calls] == 2 * [[0, 0]]
  assert metrics["sight/greedy"] == 0 and not held_out.scorer.examples


def test_majority_is_the_share_of_the_most_frequent_answer():
  answers = [("a", "1"), ("a", "2"), ("a", "1"), ("b", "x"), ("", "1")]
  examples = [Example(problem="", answer=y, task=t) for t, y in answers]
  assert majority(examples) == {"a": pytest.approx(2 / 3), "b": 1.0}


def test_only_what_the_mask_covers_is_decoded():
  rollout = Rollout(
    completion_ids=np.array([[[5, 6, 7], [8, 0, 0]]]),
    completion_mask=np.array([[[True, True, False], [True, False, False]]]),
    truncated=np.zeros((1, 2), bool),
    sampler_logprobs=np.zeros((1, 2, 3)),
  )
  texts = decode_rollout(rollout, lambda ids: "-".join(map(str, ids)))
  assert texts == [["5-6", "8"]]
