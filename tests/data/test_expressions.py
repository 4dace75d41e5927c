"""Expressions of columns: exact, three-valued, and nothing else of Python."""

import math

import pytest

from jaxvlm.data.expressions import Expression

ROW = {
  "pass_rate": 0.25,
  "count": 3,
  "task": "ocr",
  "good": True,
  "none": None,
  "nan": math.nan,
  "extra.split": "train",
}


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("pass_rate > 0 and pass_rate < 1", True),
    ("0 < pass_rate <= 0.25 < count", True),
    ("0 < pass_rate < 0.25", False),
    ("-count + 2 * (count - 1) / 4", -2.0),
    ("task == 'ocr' or task > 3", True),
    ("task in ('ocr', 'vqa')", True),
    ("task not in ['ocr']", False),
    ("not good", False),
    ("good == True", True),
    ("extra.split != 'test'", True),
    (" count", 3),
  ],
)
def test_an_expression_is_what_it_says(text, value):
  assert Expression(text)(ROW) == value


@pytest.mark.parametrize("missing", ["none", "nan"])
def test_a_missing_value_is_unknown_until_something_settles_it(missing):
  for text, value in (
    (f"{missing}", None),
    (f"{missing} > 0", None),
    (f"{missing} == {missing}", None),
    (f"{missing} + 1", None),
    (f"-{missing}", None),
    (f"{missing} in (1, 2)", None),
    (f"not {missing} > 0", None),
    (f"{missing} > 0 and good", None),
    (f"{missing} > 0 and count > 5", False),
    (f"{missing} > 0 or good", True),
    (f"{missing} > 0 or count > 5", None),
    (f"0 < {missing} < count < 2", False),
    (f"{missing} is None", True),
    (f"{missing} is not None", False),
    ("count is None", False),
  ):
    assert Expression(text)(ROW) is value, text


def test_a_number_or_a_truth_is_asked_for():
  assert Expression("-pass_rate").number(ROW) == -0.25
  assert Expression("good").number(ROW) == 1.0
  assert Expression("none").number(ROW) is None
  with pytest.raises(ValueError, match="'task': is 'ocr'; expected a number"):
    Expression("task").number(ROW)
  assert Expression("good").truth(ROW) is True
  with pytest.raises(ValueError, match="'count': is 3; expected true or"):
    Expression("count").truth(ROW)
  with pytest.raises(ValueError, match="'good and count': 'count' is 3; exp"):
    Expression("good and count")(ROW)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "is no expression"),
    ("a >", "is no expression"),
    ("a = 1", "is no expression"),
    ("f(a)", r"is not taken"),
    ("a > __import__('os').getpid()", r"getpid\(\)\" is not taken"),
    ("[a for a in b]", "is not taken"),
    ("a ** 2", "is not taken"),
    ("a[0]", "is not taken"),
    ("(1).real", "is not taken"),
    ("lambda: 1", "is not taken"),
    ("f'{a}'", "is not taken"),
    ("a if b else c", "is not taken"),
    ("a == None", "'None' is not taken"),
    ("a is 3", "`is` is for `is None` alone"),
    ("a in b", "no list of values"),
    ("a in (b, 1)", "no list of values"),
    ("1j", "is not taken"),
  ],
)
def test_what_is_no_expression_is_refused_when_it_is_read(text, message):
  with pytest.raises(ValueError, match=message):
    Expression(text)


@pytest.mark.parametrize(
  "text", ["task < 3", "task - 1", "count / (count - 3)"]
)
def test_values_that_do_not_go_together_are_refused(text):
  with pytest.raises(ValueError, match="cannot be computed"):
    Expression(text)(ROW)


def test_an_unknown_column_is_named_beside_those_there_are():
  expression = Expression("pass_rat > 0 or extra.split == 'a'")
  assert expression.names == {"pass_rat", "extra.split"}
  with pytest.raises(ValueError, match="no column 'pass_rat'; there are a, b"):
    expression.check(["b", "extra.split", "a"])
  expression.check(["pass_rat", "extra.split"])
