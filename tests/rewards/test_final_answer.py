"""rewards/__init__.py: which part of a completion is the answer."""

import time

import pytest

from jaxvlm.rewards import boxes, final_answer


@pytest.mark.parametrize(
  ("completion", "answer"),
  [
    ("<answer> 3 </answer>", "3"),
    (r"so \boxed{7}.", "7"),
    ("<think> 1 </think> <answer>2</answer>", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed {4}", "4"),
    (r"<answer>it is \boxed{5}</answer>", "5"),
    (r"\boxed{\boxed{6}}", "6"),
    ("<answer>a\nb</answer>", "a\nb"),
  ],
)
def test_the_answer_is_found(completion, answer):
  assert final_answer(completion) == answer


@pytest.mark.parametrize(
  ("completion", "answer"),
  [
    ("<answer>1</answer> no, <answer>2</answer>", "2"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{1} <answer>2</answer>", "2"),
    (r"<answer>2</answer> \boxed{1}", "1"),
    ("<answer><answer>b</answer>", "b"),
    ("<answer>a</answer></answer>", "a"),
    (r"\boxed{1} \boxed{2", "1"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
  ],
)
def test_the_last_closed_one_counts(completion, answer):
  assert final_answer(completion) == answer


@pytest.mark.parametrize(
  "completion",
  [
    "",
    "3",
    "<answer>3",
    "3</answer>",
    "<answer> </answer>",
    r"\boxed{}",
    r"\boxed{3",
    r"\boxed{ {3}",
    "<think><answer>3</answer></think>",
    "<think><answer>3</answer>",
    r"<think> a </think> <think> \boxed{3}",
  ],
)
def test_no_answer_is_none_and_never_a_string(completion):
  assert final_answer(completion) is None


@pytest.mark.parametrize("piece", [r"\boxed{", "<answer>", "{", "}", "\\"])
def test_a_long_unclosed_text_is_read_in_linear_time(piece):
  start = time.perf_counter()
  assert final_answer(piece * 20_000) is None
  assert time.perf_counter() - start < 2.0


def test_boxes_come_in_order_of_closing():
  found = boxes(r"\boxed{a} \boxed{b \boxed{c}}")
  assert [content for _, _, content in found] == ["a", "c", r"b \boxed{c}"]
