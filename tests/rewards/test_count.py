"""rewards/count.py."""

import time

import pytest

from jaxvlm.rewards.count import counted, reward
from jaxvlm.types import Example


@pytest.mark.parametrize(
  ("text", "count"),
  [
    ("3", 3),
    (" 3. ", 3),
    ("0", 0),
    ("03", 3),
    ("1,200", 1200),
    ("three", 3),
    ("Zero", 0),
    ("Twelve eggs", 12),
    ("3 red cubes", 3),
    ("$3$", 3),
    (r"3\text{ cubes}", 3),
  ],
)
def test_a_count_is_read(text, count):
  assert counted(text) == count
  row = Example(problem="?", answer=str(count))
  assert reward(f"<answer>{text}</answer>", row) == 1.0


@pytest.mark.parametrize(
  "text",
  [
    "",
    "3 or 4",
    "three or four",
    "3 to five",
    "3, 4",
    "3 cubes and 4 balls",
    "3-4",
    "-3",
    "3.5",
    "3.0",
    "three point five",
    "6/2",
    "1,20",
    "threes",
    "many",
    "None",
    "9" * 400,
  ],
)
def test_none_or_several_are_no_count(text):
  assert counted(text) is None
  row = Example(problem="?", answer="3")
  assert reward(f"<answer>{text}</answer>", row) == 0.0


def test_near_is_wrong():
  row = Example(problem="?", answer="3 cubes")
  assert reward("<answer>3</answer>", row) == 1.0
  assert reward("<answer>4</answer>", row) == 0.0
  assert reward("3", row) == 0.0


@pytest.mark.parametrize("gold", ["", "None", "3 or 4", "2.5"])
def test_a_row_whose_answer_is_no_count_is_refused(gold):
  with pytest.raises(ValueError, match="is no count"):
    reward(f"<answer>{gold}</answer>", Example(problem="?", answer=gold))


@pytest.mark.parametrize("text", ["3" + " a" * 50_000, "1,000" * 50_000])
def test_a_long_answer_is_read_in_linear_time(text):
  start = time.perf_counter()
  assert counted(text) is None
  assert time.perf_counter() - start < 0.5
