"""Options are moved with their letters, or the row is left alone."""

import collections

import pytest

from jaxvlm.data.options import read_choices, shuffled, with_options
from jaxvlm.types import Example

STEM = "<image>What is left of the dog?"
BLOCK = "A. cat\nB. a cow\nC. hen, 3\nD. it is above"
PROBLEM = f"{STEM}\n{BLOCK}"
TEXTS = ["cat", "a cow", "hen, 3", "it is above"]


def row(problem=PROBLEM, answer="C", **changes):
  return Example(problem=problem, answer=answer, images=(b"",), **changes)


def said(example):
  """The option that a row's answer names, read afresh."""
  choices = read_choices(example)
  return choices.options.texts[choices.right]


@pytest.mark.parametrize(
  "problem",
  [
    PROBLEM,
    PROBLEM.replace(". ", ") "),
    "\n".join(
      [STEM, *(f"  ({line[0]}) {line[3:]}" for line in BLOCK.split("\n"))]
    ),
    f"{STEM}\nOptions:\n{BLOCK}\nAnswer with the option letter only.",
    f"{BLOCK}\n\n{STEM}",
    f"Hint: choose.\n\n{STEM}\n\n{BLOCK}\n",
  ],
)
def test_the_right_option_keeps_its_text_wherever_it_moves(problem):
  example = row(problem)
  assert said(example) == "hen, 3"
  letters = collections.Counter()
  for i in range(200):
    moved = shuffled(example, f"0 row {i}")
    assert said(moved) == "hen, 3"
    assert sorted(read_choices(moved).options.texts) == sorted(TEXTS)
    assert len(moved.problem) == len(problem)
    lines = problem.split("\n")
    kept = [line for line in lines if not any(text in line for text in TEXTS)]
    lines = moved.problem.split("\n")
    assert [line for line in lines if line in kept] == kept
    letters[moved.answer] += 1
  assert set(letters) == set("ABCD")
  assert min(letters.values()) > 25  # of 50


def test_an_order_is_a_function_of_its_key():
  moved = [shuffled(row(), f"0 row {i}") for i in range(9)]
  assert moved == [shuffled(row(), f"0 row {i}") for i in range(9)]
  assert len({example.problem for example in moved}) > 3


@pytest.mark.parametrize(
  ("answer", "form"),
  [
    ("(C)", "({})"),
    ("C.", "{}."),
    ("C. hen, 3", "{}. hen, 3"),
    ("(C) hen, 3", "({}) hen, 3"),
    ("hen, 3", "hen, 3"),
  ],
)
def test_the_answer_keeps_its_form(answer, form):
  for i in range(8):
    moved = shuffled(row(answer=answer), str(i))
    choices = read_choices(moved)
    assert choices.options.texts[choices.right] == "hen, 3"
    assert moved.answer == form.format("ABCD"[choices.right])


def test_messages_are_changed_where_the_options_stand():
  system = {"role": "system", "content": "Choose well."}
  parts = [
    {"type": "image"},
    {"type": "text", "text": "Look."},
    {"type": "text", "text": f"What is left?\n{BLOCK}"},
  ]
  example = row(
    problem=f"<image>Look.What is left?\n{BLOCK}",
    messages=(system, {"role": "user", "content": parts}),
  )
  moved = shuffled(example, "4")
  text = moved.messages[1]["content"][2]["text"]
  assert text != parts[2]["text"]
  assert moved.problem == f"<image>Look.{text}"
  assert moved.messages[0] == system
  assert moved.messages[1]["content"][:2] == parts[:2]
  assert said(moved) == "hen, 3"
  plain = row(problem=PROBLEM, messages=({"role": "user", "content": PROBLEM},))
  moved = shuffled(plain, "4")
  assert moved.messages[0]["content"] == moved.problem != PROBLEM


@pytest.mark.parametrize(
  "problem",
  [
    STEM,
    f"{STEM}\nA. cat",
    f"{STEM} A. cat B. dog C. cow",
    f"{STEM}\nB. cat\nC. dog",
    f"{STEM}\nA. cat\nC. dog",
    f"{STEM}\nA. cat\nB) dog\nC. cow",
    f"{STEM}\nA. cat\nB. cat\nC. cow",
    f"{STEM}\nA. cat\nB. dog\nC. a cow\nthat is brown",
    f"{STEM}\nA. cat\nB. dog\nwith a tail\nC. cow",
    f"{BLOCK}\n{BLOCK}",
    f"{STEM}\nA. cat\nB. dog\nC. none of the above",
    f"{STEM}\nA. cat\nB. dog\nC. All of these",
    f"{STEM}\nA. cat\nB. dog\nC. both A and B",
    f"{STEM}\nA. cat\nB. dog\nC. A, B",
    f"{STEM}\nA. cat\nB. dog\nC. Only B",
    f"{STEM}\nA. cat\nB. dog\nC. (A) is wrong",
    f"{STEM}\nA. cat\nB. dog\nC. option two",
    f"{STEM}\nA. <image>\nB. <image>\nC. cow",
    f"Is option A right?\n{BLOCK}",
  ],
)
def test_what_is_not_certain_is_not_read(problem):
  assert read_choices(row(problem)) is None


@pytest.mark.parametrize(
  ("answer", "problem"),
  [
    ("E", PROBLEM),
    ("c", PROBLEM),
    ("", PROBLEM),
    ("dog", PROBLEM),
    ("C. cat", PROBLEM),
    ("A or C", PROBLEM),
    ("A", f"{STEM}\nA. C\nB. A\nC. B"),
  ],
)
def test_an_answer_that_is_not_one_option_is_not_read(answer, problem):
  assert read_choices(row(problem, answer)) is None


def test_a_written_response_or_an_earlier_answer_may_name_letters():
  assert read_choices(row(response="It is C.")) is None
  turns = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "A."},
    {"role": "user", "content": PROBLEM},
  ]
  assert read_choices(row(messages=tuple(turns))) is None
  assert read_choices(row(messages=tuple(turns[2:]))) is not None


def test_options_of_a_column_become_lines():
  assert (
    with_options(STEM, ["cat", "a cow", "hen, 3", "it is above"]) == PROBLEM
  )
  for wrong in (["cat"], ["cat", ""], ["x"] * 11):
    with pytest.raises(ValueError, match="expected 2 to 10"):
      with_options(STEM, wrong)
