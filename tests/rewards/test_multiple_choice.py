"""rewards/multiple_choice.py: which option a text names."""

import pytest

from jaxvlm.rewards.multiple_choice import letter, reward
from jaxvlm.types import Example


@pytest.mark.parametrize(
  "text",
  [
    "B",
    "b",
    "(B)",
    "B.",
    "B)",
    "B:",
    "B. cat",
    "(B) cat",
    "B: a cat and a dog",
    "B. A cat",
    "B. vitamin C",
    r"\text{(B)}",
    r"\textbf{B}",
    r"\mathrm{B}. cat",
    "$B$",
    "**B**",
    "option B",
    "Option (B)",
    "Answer: B",
    "The answer is (B).",
    "The correct option is B. cat",
  ],
)
def test_one_option_is_read(text):
  assert letter(text) == "B"


@pytest.mark.parametrize(
  "text",
  [
    "",
    "A or B",
    "A or B or C",
    "A and B",
    "A, B",
    "A/B",
    "AB",
    "(A)(B)",
    "A) or B)",
    "A) or b",
    "A. or B.",
    "A. cat B. dog",
    "A: B",
    "A. cat or B",
    "(A) (B)",
    "not B",
    "A cat",
    "3",
    "None",
    "cat",
  ],
)
def test_none_or_several_options_are_no_answer(text):
  assert letter(text) is None


@pytest.mark.parametrize("gold", ["B", "(B)", "B. cat"])
def test_the_letter_decides(gold):
  row = Example(problem="?", answer=gold)
  assert reward("<answer>B. dog</answer>", row) == 1.0
  assert reward(r"<think>A?</think> \boxed{\text{(B)}}", row) == 1.0
  assert reward("<answer>C</answer>", row) == 0.0
  assert reward("<answer>A or B</answer>", row) == 0.0
  assert reward("B", row) == 0.0


@pytest.mark.parametrize("gold", ["", "7", "A or B"])
def test_a_row_whose_answer_is_no_option_is_refused(gold):
  with pytest.raises(ValueError, match="names no option"):
    reward("<answer>B</answer>", Example(problem="?", answer=gold))
