"""rewards/yes_no.py."""

import pytest

from jaxvlm.rewards.yes_no import reward, said
from jaxvlm.types import Example

YES, NO = Example(problem="?", answer="yes"), Example(problem="?", answer="No.")


@pytest.mark.parametrize(
  "text",
  ["yes", "Yes.", "YES!", r"\text{Yes}", "**yes**", "Yes, there is a knot."],
)
def test_yes_is_read(text):
  assert said(text) == "yes"
  assert reward(f"<answer>{text}</answer>", YES) == 1.0
  assert reward(f"<answer>{text}</answer>", NO) == 0.0


@pytest.mark.parametrize(
  "text",
  [
    "yes or no",
    "No. Yes.",
    "no/yes",
    "not yes",
    "I think yes",
    "yesterday",
    "true",
    "None",
    " ",
  ],
)
def test_neither_or_both_is_no_answer(text):
  assert said(text) is None
  assert reward(f"<answer>{text}</answer>", YES) == 0.0
  assert reward(f"<answer>{text}</answer>", NO) == 0.0


def test_no_answer_is_not_no():
  for completion in ("", "no", "<think>no</think>", "<answer>no"):
    assert reward(completion, NO) == 0.0
  assert reward(r"\boxed{no}", NO) == 1.0


@pytest.mark.parametrize("gold", ["", "None", "yes or no", "maybe"])
def test_two_that_say_neither_are_not_equal(gold):
  with pytest.raises(ValueError, match="is not yes or no"):
    reward(f"<answer>{gold}</answer>", Example(problem="?", answer=gold))
