"""Rows are paid by the scorer of their own task."""

import dataclasses

import pytest

from jaxvlm.data.sources.reasoning_gym import source
from jaxvlm.rewards.reasoning_gym import reward
from jaxvlm.scoring import Scorer
from jaxvlm.types import Example

reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def rows():
  return source(
    # The answer of countdown is any expression that comes out right.
    tasks=("countdown", "leg_counting", "basic_arithmetic"),
    size=6,
    seed=0,
    configs={},
  )


def test_the_tasks_scorer_pays_in_the_workers(rows):
  completions = [
    [f"<answer>{row.answer}</answer>", row.answer, "<answer>no</answer>"]
    for row in rows
  ]
  completions[0][1] = f"\\boxed{{{rows[0].answer}}}"
  with Scorer(
    rewards=(("reasoning_gym", 1.0),), num_workers=1, timeout=20.0
  ) as scorer:
    scores = scorer.score(completions, rows)
  assert scores.messages == ()
  assert scores.rewards[:, 0].tolist() == [1.0] * 6
  assert scores.rewards[0, 1] == 1.0
  assert (scores.rewards[1:, 1] == 0).all()  # no final answer
  assert (scores.rewards[:, 2] < 0.1).all()


def test_an_answer_that_is_not_the_rows_own_may_be_right(rows):
  assert reward(f"<answer>(({rows[0].answer}))</answer>", rows[0]) == 1.0
  assert reward(f"<answer>{rows[0].answer} + 1</answer>", rows[0]) < 0.1


def test_an_answer_that_the_scorer_cannot_read_is_wrong():
  row = source(tasks=("prime_factorization",), size=1, seed=0, configs={})[0]
  name = "prime_factorization"
  entry = {"answer": "2", "metadata": {"factors": [2]}}
  with pytest.raises(ValueError, match="invalid literal"):
    reasoning_gym.get_score_answer_fn(name)("a x b", entry)
  assert reward("<answer>a x b</answer>", row) == 0.0
  assert reward(f"<answer>{row.answer}</answer>", row) == 1.0


def test_rows_of_elsewhere_are_refused(rows):
  with pytest.raises(ValueError, match="no row of the source reasoning_gym"):
    reward("<answer>1</answer>", Example(problem="1", answer="1"))
  other = dataclasses.replace(rows[0], problem="Another?")
  with pytest.raises(ValueError, match="comes out otherwise here"):
    reward("<answer>1</answer>", other)
