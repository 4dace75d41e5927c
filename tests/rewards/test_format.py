"""rewards/format.py and rewards/think_format.py: the same form, but one."""

import pytest

from jaxvlm.rewards import format as any_format
from jaxvlm.rewards import think_format
from jaxvlm.types import Example

ROW = Example(problem="?", answer="3")

WITH_THOUGHT = [
  "<think> 1 + 2 </think> <answer> 3 </answer>",
  "  <think>a\nb</think>\n\n<answer>3</answer>\n",
  r"<think>1 + 2</think> The answer is \boxed{3}.",
  r"<think>\boxed{2}?</think> <answer>\boxed{3}</answer>",
]
WITHOUT = ["<answer> 3 </answer>", r"So it is \boxed{\frac{1}{2}}."]
BAD = {
  "nothing": "",
  "no answer": "<think> 1 + 2 </think> 3",
  "empty answer": "<think>a</think> <answer> </answer>",
  "empty box": r"<think>a</think> \boxed{}",
  "open thought": "<think> 1 + 2 <answer>3</answer>",
  "unopened thought": "1 + 2 </think> <answer>3</answer>",
  "late thought": "<answer>3</answer> <think>a</think>",
  "text first": "So: <think>a</think> <answer>3</answer>",
  "two thoughts": "<think>a</think> <think>b</think> <answer>3</answer>",
  "nested thought": "<think><think>a</think></think> <answer>3</answer>",
  "answer in thought": "<think>a <answer>3</answer></think>",
  "answer across": "<think>a <answer></think>3</answer>",
  "open answer": "<think>a</think> <answer>3",
  "open box": r"<think>a</think> \boxed{3",
  "two answers": "<think>a</think> <answer>3</answer> <answer>4</answer>",
  "two boxes": r"<think>a</think> \boxed{3} or \boxed{4}",
  "nested answers": "<think>a</think> <answer><answer>3</answer></answer>",
  "nested boxes": r"<think>a</think> \boxed{\boxed{3}}",
  "box beside answer": r"<think>a</think> <answer>3</answer> \boxed{3}",
  "text behind": "<think>a</think> <answer>3</answer> Good luck!",
  "wrong tag": "<thinking>a</thinking> 3",
}


@pytest.mark.parametrize("completion", WITH_THOUGHT)
def test_a_thought_and_an_answer_are_good(completion):
  assert any_format.reward(completion, ROW) == 1.0
  assert think_format.reward(completion, ROW) == 1.0


@pytest.mark.parametrize("completion", WITHOUT)
def test_only_think_format_asks_for_a_thought(completion):
  assert any_format.reward(completion, ROW) == 1.0
  assert think_format.reward(completion, ROW) == 0.0


@pytest.mark.parametrize("completion", BAD.values(), ids=BAD.keys())
def test_broken_forms_score_nothing(completion):
  assert any_format.reward(completion, ROW) == 0.0
  assert think_format.reward(completion, ROW) == 0.0


@pytest.mark.parametrize(
  ("completion", "whole"),
  [
    (r"<think>a</think> So \boxed{3}", 1.0),
    ("<think>a</think> $\\boxed{3}$.\n", 1.0),
    (r"<think>a</think> \(\boxed{3}\)", 1.0),
    ("<think>a</think> <answer>3</answer>", 1.0),
    (r"<think>a</think> \boxed{3} apples", 0.0),
    (r"<think>a</think> \boxed{3}. Or so.", 0.0),
    (r"<think>a</think> \boxed{3}}", 0.0),
  ],
)
def test_text_after_a_box_counts_where_the_config_says_so(completion, whole):
  for module in (any_format, think_format):
    assert module.reward(completion, ROW) == 1.0
    assert module.reward(completion, ROW, text_after=False) == whole


def test_a_wrong_answer_may_have_the_right_form():
  assert any_format.reward("<answer>4</answer>", ROW) == 1.0
