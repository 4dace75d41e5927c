"""rewards/text_distance.py."""

import random
import time

import pytest

from jaxvlm.rewards.text_distance import distance, reward
from jaxvlm.types import Example


def table(a, b):
  """Levenshtein distance by the textbook's table."""
  above = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    row = [i]
    for j, y in enumerate(b, 1):
      row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
    above = row
  return above[-1]


def grade(answer, gold, threshold=0.0):
  row = Example(problem="?", answer=gold)
  return reward(f"<answer>{answer}</answer>", row, threshold=threshold)


@pytest.mark.parametrize(
  ("a", "b", "expected"),
  [
    ("", "", 0),
    ("", "abc", 3),
    ("abc", "", 3),
    ("kitten", "sitting", 3),
    ("saturday", "sunday", 3),
    ("日本語", "日木語", 1),
    ("ab", "ba", 2),
    ("a" * 200, "b" * 200, 200),
  ],
)
def test_the_distance_is_levenshteins(a, b, expected):
  assert distance(a, b) == distance(b, a) == expected


def test_the_distance_equals_the_textbooks_table():
  draw = random.Random(0)
  for _ in range(300):
    a, b = ("".join(draw.choices("ab ", k=draw.randrange(90))) for _ in "12")
    assert distance(a, b) == table(a, b)


@pytest.mark.parametrize(
  ("answer", "gold", "expected"),
  [
    ("STOP", "STOP", 1.0),
    (" two\n words ", "two words", 1.0),
    ("STOP", "STEP", 0.75),
    ("stop", "STOP", 0.0),
    ("cafe\u0301", "caf\u00e9", 1.0),
    ("STOP STOP", "STOP", 4 / 9),
    (r"\boxed{STOP}", "STOP", 1.0),
  ],
)
def test_the_reward_is_the_share_that_is_right(answer, gold, expected):
  assert grade(answer, gold) == pytest.approx(expected)


def test_below_the_threshold_nothing_is_paid():
  assert grade("STOP", "STEP", 0.75) == 0.75
  assert grade("STOP", "STEP", 0.76) == 0.0
  assert grade("a quick brown fox", "none of these words", 0.5) == 0.0


def test_no_answer_is_not_the_text_none():
  row = Example(problem="?", answer="None")
  for completion in ("None", "", "<think>None</think>", "<answer></answer>"):
    assert reward(completion, row, threshold=0.0) == 0.0
  assert grade("None", "None") == 1.0


def test_a_row_without_answer_is_refused():
  with pytest.raises(ValueError, match="no answer"):
    grade("", " ")


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_a_threshold_is_a_share(threshold):
  with pytest.raises(ValueError, match="expected 0 to 1"):
    grade("a", "a", threshold)


def test_long_answers_cost_little():
  start = time.perf_counter()
  assert grade("ab" * 2000, "ba" * 2000) > 0.99
  assert grade("a" * 1_000_000, "a" * 1000, 0.5) == 0.0
  assert time.perf_counter() - start < 1.0
