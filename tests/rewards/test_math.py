"""rewards/math.py: golden cases of graders in the field, and their bugs."""

import time

import pytest

from jaxvlm.rewards.math import reward
from jaxvlm.types import Example


def grade(answer, gold):
  completion = rf"<think> hm </think> It is \boxed{{{answer}}}."
  return reward(completion, Example(problem="?", answer=gold))


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    ("12", "12.0"),
    ("12 cm", "12"),
    (".5", "1/2"),
    (r"\frac12", "1/2"),
    ("3/6", "1/2"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"50\%", "50"),
    ("50%", ".5"),
    ("1,000", "1000"),
    ("10^{2}", "100"),
    ("10!", "3628800"),
    ("x=5", "5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"30^\circ", "30"),
    ("30°", "30"),
    (r"\$5", "5"),
    ("7.", "7"),
    ("5", r"\boxed{5}"),
    ("(B)", "B"),
    ("Yes.", "yes"),
  ],
)
def test_equal_answers_are_right(answer, gold):
  assert grade(answer, gold) == 1.0


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    ("-3", "3"),
    ("13", "12"),
    (".333", "1/3"),
    ("[1,2]", "(1,2)"),
    ("1 2", "12"),
    ("three", "3"),
    ("no", "yes"),
    ("sey", "yes"),
    ("B", "A"),
    ("", "3"),
    (r"1, 2, 3, 4", "3"),
  ],
)
def test_other_answers_are_wrong(answer, gold):
  assert grade(answer, gold) == 0.0


def test_the_rows_answer_goes_first():
  """An interval answers an inequality; an inequality is no open interval."""
  assert grade("(1,2)", "1<x<2") == 1.0
  assert grade("1<x<2", "(1,2)") == 0.0


def test_no_answer_is_not_the_answer_none():
  for gold in ("None", "none"):
    assert reward("no box here", Example(problem="?", answer=gold)) == 0.0
    assert reward("<think>a</think>", Example(problem="?", answer=gold)) == 0.0


def test_the_answer_tag_serves_as_well_as_the_box():
  row = Example(problem="?", answer="1/2")
  assert reward("<answer> 0.5 </answer>", row) == 1.0


@pytest.mark.parametrize("gold", ["", " ", "."])
def test_a_row_without_answer_is_refused(gold):
  with pytest.raises(ValueError, match="no answer"):
    grade("3", gold)


@pytest.mark.parametrize(
  "answer",
  [
    "30000000!",
    "(30000000)!",
    "9!!!",
    "(10**9)**(10**9)",
    "9^{9^{9}}",
    "9^9^9",
    "2^{100000}",
    "1" * 60,
    "(" * 60 + "1" + ")" * 60,
    "+".join(["x^2"] * 11),
    "1+" * 150 + "1",
  ],
)
def test_costly_answers_score_nothing_at_once(answer):
  start = time.perf_counter()
  assert grade(answer, "1/2") == 0.0
  assert time.perf_counter() - start < 0.5


def test_a_costly_answer_is_right_letter_by_letter():
  assert grade("2^{100000}", "2^{100000}") == 1.0


@pytest.mark.parametrize("answer", [r"\frac{2}{14}", "0.5", r"\frac{3}{7}"])
def test_an_answer_earns_the_same_each_time(answer):
  first = grade(answer, "1/7"), grade(answer, "3/7"), grade(answer, "1/2")
  assert sum(first) == 1.0
  again = grade(answer, "1/7"), grade(answer, "3/7"), grade(answer, "1/2")
  assert again == first


@pytest.mark.parametrize(
  ("answer", "gold", "expected"),
  [
    ("0.3333333", "1/3", 1.0),  # math-verify compares to six decimals
    ("0.33333", "1/3", 0.0),
    (r"50\%", "0.5", 1.0),
    (r"50\%", "50", 1.0),
    ("0.5", "50%", 1.0),
    ("50", "50%", 1.0),
    (r"\infty", r"\infty", 1.0),
    (r"\infty", "5", 0.0),
    ("12345678901234567890", "12345678901234567891", 0.0),
    ("+7", "7", 1.0),
    ("-0", "0", 1.0),
  ],
)
def test_numbers_are_compared_as_math_verify_does(answer, gold, expected):
  assert grade(answer, gold) == expected


def test_numbers_that_are_far_apart_are_not_simplified(monkeypatch):
  monkeypatch.delattr("math_verify.verify")
  assert grade(r"47\sqrt{2}", r"31\sqrt{3}") == 0.0
  assert grade("47x-1", "31x+1") == 0.0
  assert grade("47x", "47y") == 0.0
  assert grade("46", "47") == 0.0
  assert grade("47", "047") == 1.0
  with pytest.raises(AttributeError):
    grade("48.0", "48")
