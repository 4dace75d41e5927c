"""rewards/number.py."""

import time
from fractions import Fraction

import pytest

from jaxvlm.rewards import load
from jaxvlm.rewards.number import quantity, reward
from jaxvlm.types import Example


def grade(answer, gold, **bounds):
  row = Example(problem="?", answer=gold)
  return reward(rf"It is \boxed{{{answer}}}.", row, **bounds)


@pytest.mark.parametrize(
  ("text", "value", "unit"),
  [
    ("12", 12, ""),
    ("-3.50", Fraction(-7, 2), ""),
    ("−3", -3, ""),
    (".5", Fraction(1, 2), ""),
    ("7.", 7, ""),
    ("1,234,567.5", Fraction(2469135, 2), ""),
    ("3/6", Fraction(1, 2), ""),
    (r"-\frac{1}{2}", Fraction(-1, 2), ""),
    (r"\dfrac{ 3 }{4}", Fraction(3, 4), ""),
    ("1e3", 1000, ""),
    ("2.5E-2", Fraction(1, 40), ""),
    (r"2 \times 10^{5}", 200_000, ""),
    (r"$2\times 10^{-1}$", Fraction(1, 5), ""),
    ("50%", 50, "%"),
    (r"50\%", 50, "%"),
    ("12 cm", 12, "cm"),
    ("12cm.", 12, "cm"),
    (r"12\text{ cm}", 12, "cm"),
    ("3 Square Meters", 3, "square meters"),
    ("30°", 30, "degrees"),
    (r"\$5", 5, ""),
    ("$5", 5, ""),
  ],
)
def test_one_number_is_read(text, value, unit):
  assert quantity(text) == (value, unit)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "None",
    "three",
    "3 or 4",
    "3 or four",
    "3 to",
    "1 2",
    "1,2",
    "12,34",
    "[3]",
    "(3, 4)",
    "10^2",
    "2x",
    "2 x",
    "x = 5",
    "1.2.3",
    "1/0",
    r"\frac{1}{0.0}",
    "1/2/3",
    "--3",
    "inf",
    "nan",
    "1e9999",
    "12 cm 5",
  ],
)
def test_what_is_not_one_number_is_none(text):
  assert quantity(text) is None
  assert grade(text, "3", absolute=1e9) == 0.0


def test_without_bounds_the_number_is_the_same():
  assert grade("0.50", "1/2") == 1.0
  assert grade("0.3333333", "1/3") == 0.0
  assert grade("10000000000000001", "10000000000000000") == 0.0
  assert grade("-3", "3") == 0.0


@pytest.mark.parametrize(
  ("answer", "gold", "bounds", "expected"),
  [
    ("105", "100", {"relative": 0.05}, 1.0),
    ("95", "100", {"relative": 0.05}, 1.0),
    ("105.01", "100", {"relative": 0.05}, 0.0),
    ("100", "105.2", {"relative": 0.05}, 1.0),  # of the row's number,
    ("105.2", "100", {"relative": 0.05}, 0.0),  # not of the answer
    ("-95", "-100", {"relative": 0.05}, 1.0),
    ("0.01", "0", {"relative": 0.05}, 0.0),
    ("0.3", "0.2", {"absolute": 0.1}, 1.0),  # in floats 0.09999999999999998
    ("1.1", "1", {"absolute": 0.1}, 1.0),  # in floats 0.10000000000000009
    ("1.11", "1", {"absolute": 0.1}, 0.0),
    ("0.333", "1/3", {"absolute": 1e-3}, 1.0),
    ("109", "100", {"absolute": 10, "relative": 0.05}, 1.0),
  ],
)
def test_bounds_are_met_exactly(answer, gold, bounds, expected):
  assert grade(answer, gold, **bounds) == expected


def test_units_count_where_both_have_one():
  assert grade("12 cm", "12") == grade("12", "12 cm") == 1.0
  assert grade("12 CM", "12 cm") == 1.0
  assert grade("12 mm", "12 cm") == 0.0


def test_no_answer_is_no_number():
  row = Example(problem="?", answer="3")
  assert reward("3", row, absolute=1e9) == 0.0
  assert reward("<answer></answer>", row, absolute=1e9) == 0.0


@pytest.mark.parametrize("gold", ["", "None", "3 or 4", "red"])
def test_a_row_whose_answer_is_not_a_number_is_refused(gold):
  with pytest.raises(ValueError, match="is not one number"):
    grade(gold, gold)


def test_a_negative_bound_is_refused():
  with pytest.raises(ValueError, match="below 0"):
    grade("3", "3", relative=-0.1)


@pytest.mark.parametrize(
  "text",
  ["9" * 100_000, "1e999999999", "9" * 90 + "e999", "1," * 50_000, "30000000!"],
)
def test_costly_numbers_are_refused_at_once(text):
  start = time.perf_counter()
  assert grade(text, "3") == 0.0
  assert time.perf_counter() - start < 0.1


def test_a_config_gives_the_bound():
  near = load("number(relative=0.05)")
  row = Example(problem="?", answer="100")
  assert near("<answer>104</answer>", row) == 1.0
  assert load("number")("<answer>104</answer>", row) == 0.0
