"""What a terminal shows, and what a log file shows."""

import io
import re

import pytest
from rich.console import Console

from jaxvlm import display
from jaxvlm.display import Display, make_console


def plain_console():
  return Console(file=io.StringIO(), width=100, highlight=False)


def terminal():
  return Console(
    file=io.StringIO(), width=80, force_terminal=True, color_system=None
  )


def text_of(console):
  return console.file.getvalue()


def last_frame(console):
  """The lines that stay on the screen, without control codes."""
  frame = text_of(console).split("\x1b[2K")[-1]
  lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", frame).splitlines()
  return [line.rstrip() for line in lines if line.strip()]


def train_record(step, *, stage="visual_perception", **metrics):
  return {
    "kind": "train",
    "stage": stage,
    "step": step,
    "global_step": step,
    "metrics": metrics,
    "timing": {"tokens_per_second": 1234.5},
  }


NUMBERS = {"reward": 0.5, "accuracy": 0.25, "length": 9.5, "kl": 0.0125}


@pytest.fixture
def clock(monkeypatch):
  """Seconds that the display believes have passed."""
  now = [0.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  return now


def test_a_step_is_a_plain_line_with_every_number(clock):
  console = plain_console()
  with Display(console) as shown, shown.stage("vision", steps=10, done=0):
    shown.show(train_record(1, stage="vision", **NUMBERS))
  [line] = text_of(console).splitlines()
  assert line.startswith("vision             1/10")
  for word in (
    *("reward 0.500", "accuracy 25.0%", "length 9.5", "KL 0.0125"),
    *("tokens/s 1,23", "elapsed"),
  ):
    assert word in line


def test_plain_lines_are_rare_but_the_last_is_always_there(clock):
  console = plain_console()
  with Display(console) as shown, shown.stage("a", steps=8, done=0):
    for step in range(1, 9):
      clock[0] += display.LINE_SECONDS / 2
      shown.show(train_record(step, stage="a", reward=0.0))
  lines = text_of(console).splitlines()
  assert [line.split()[1] for line in lines] == [
    "1/8",
    "3/8",
    "5/8",
    "7/8",
    "8/8",
  ]


def test_the_loss_is_shown_where_there_is_no_reward(clock):
  console = plain_console()
  with Display(console) as shown, shown.stage("a", steps=2, done=0):
    shown.show(train_record(1, stage="a", loss=1.5))
    shown.show(train_record(2, stage="a", loss=1.5, reward=None))
  first, second = text_of(console).splitlines()
  assert "loss 1.500" in first
  assert "loss" not in second and "reward nan" in second


def test_a_resumed_stage_counts_from_where_it_was(clock):
  console = plain_console()
  with Display(console) as shown, shown.stage("a", steps=9, done=6):
    shown.show(train_record(7, stage="a", reward=0.0))
  assert "7/9" in text_of(console)


def test_an_evaluation_is_said_in_percent():
  console = plain_console()
  metrics = {
    "perception/mean@8": 0.25,
    "perception/greedy": 0.5,
    "perception/length": 4.0,
    "perception/task/color/greedy": 0.125,
    "textual_reasoning/greedy": None,
  }
  with Display(console) as shown:
    shown.show(
      {"kind": "eval", "stage": "b", "global_step": 9, "metrics": metrics}
    )
  assert text_of(console).split() == (
    [
      "evaluation",
      "after",
      "step",
      "9",
      "(b):",
      "perception",
      "mean@8",
      "25.0",
      "greedy",
      "50.0",
      "textual_reasoning",
      "greedy",
      "nan",
    ]
  )


def test_progress_hands_on_every_item_and_ends_with_a_line(clock):
  console = plain_console()
  with Display(console) as shown:
    assert list(shown.progress("abc", "read rows", total=3)) == list("abc")
  [line] = text_of(console).splitlines()
  assert line.startswith("read rows          3/3")


def test_resumed_work_counts_from_where_it_was(clock):
  console = plain_console()
  with (
    Display(console) as shown,
    shown.task("answer", total=9, done=6) as advance,
  ):
    advance(3)
  assert "9/9" in text_of(console)


def test_brackets_in_a_message_are_text():
  console = plain_console()
  with Display(console) as shown:
    shown.print("reward [red] failed in row [7]")
  assert text_of(console) == "reward [red] failed in row [7]\n"


def test_a_terminal_of_80_columns_shows_a_bar_and_the_numbers_below():
  console = terminal()
  with Display(console) as shown:
    stage = shown.stage("visual_perception", steps=100, done=0)
    with stage:
      shown.show(train_record(40, **NUMBERS))
  bar, numbers = last_frame(console)
  assert bar.startswith("visual_perception")
  assert "40/100" in bar and "left" in bar and "…" not in bar
  assert numbers.startswith("  reward 0.500  accuracy 25.0%  length 9.5")
  assert "KL 0.0125  tokens/s 1,23" in numbers


def test_finished_stages_keep_their_bars_and_tasks_do_not():
  console = terminal()
  with Display(console) as shown:
    for stage in ("first", "second"):
      with shown.stage(stage, steps=1, done=0):
        shown.show(train_record(1, stage=stage, reward=0.5))
    list(shown.progress("abc", "evaluate", total=3))
  words = [line.split()[0] for line in last_frame(console)]
  assert words == ["first", "reward", "second", "reward"]


def test_without_a_terminal_the_console_has_one_width(capsys):
  make_console().print("x" * (display.PLAIN_WIDTH + 1))
  assert len(capsys.readouterr().out.splitlines()) == 2
