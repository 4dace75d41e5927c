"""rewards/exact.py."""

import pytest

from jaxvlm.rewards.exact import reward
from jaxvlm.types import Example


def row(answer):
  return Example(problem="?", answer=answer)


@pytest.mark.parametrize(
  "completion",
  [
    "<answer>red square</answer>",
    "<answer> Red  Square\n</answer>",
    r"It is \boxed{RED SQUARE}.",
  ],
)
def test_case_and_white_space_do_not_count(completion):
  assert reward(completion, row(" red square ")) == 1.0


@pytest.mark.parametrize(
  "completion",
  ["red square", "<answer>red</answer>", "<answer>redsquare</answer>", ""],
)
def test_anything_else_is_wrong(completion):
  assert reward(completion, row("red square")) == 0.0


def test_the_answer_none_is_not_given_for_no_answer():
  assert reward("I do not know", row("None")) == 0.0
  assert reward("<answer>None</answer>", row("None")) == 1.0


def test_a_row_without_answer_is_refused():
  with pytest.raises(ValueError, match="no answer"):
    reward("<answer></answer>", row(" "))
