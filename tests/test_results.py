"""The tables at the end of a run, and summary.json."""

import io
import json

import pytest
from rich.console import Console

from jaxvlm.metrics import Logger
from jaxvlm.results import print_results, stage_ends, versions, write_summary


def scores(perception, reasoning, *, color=0.5):
  return {
    "perception/mean@8": perception,
    "perception/greedy": perception + 0.125,
    "perception/length": 4.0,
    "perception/truncated": 0.25,
    "perception/task/color/greedy": color,
    "perception/task/color/majority": 0.25,
    "visual_reasoning/mean@8": reasoning,
    "visual_reasoning/greedy": reasoning,
    "visual_reasoning/length": 9.5,
    "visual_reasoning/truncated": 0.0,
    "visual_reasoning/task/sum/greedy": reasoning,
    "visual_reasoning/task/sum/majority": 0.5,
  }


@pytest.fixture
def workdir(tmp_path):
  logger = Logger(
    tmp_path,
    resume_step=-1,
    tensorboard=False,
    wandb_project=None,
    primary=True,
    show=lambda record: None,
  )
  for stage, step, metrics in (
    ("start", 0, scores(0.0, 0.0, color=0.0)),
    ("visual_perception", 5, scores(0.9, 0.9)),  # within: not in the table
    ("visual_perception", 10, scores(0.5, 0.25)),
    ("visual_reasoning", 20, scores(0.375, 0.75)),
  ):
    logger.evaluation(stage=stage, global_step=step, metrics=metrics, timing={})
  return tmp_path


def printed(workdir, *, width=100, **artefacts):
  console = Console(file=io.StringIO(), width=width, highlight=False)
  print_results(workdir, console, artefacts=artefacts)
  return [line.split() for line in console.file.getvalue().splitlines()]


def test_a_stage_ends_with_its_last_evaluation(workdir):
  ends = stage_ends(workdir)
  assert [(e["stage"], e["global_step"]) for e in ends] == [
    ("start", 0),
    ("visual_perception", 10),
    ("visual_reasoning", 20),
  ]


@pytest.mark.parametrize("width", [80, 100])
def test_each_cell_has_the_score_and_its_change_in_points(workdir, width):
  lines = printed(workdir, width=width)
  at = lines.index(["start", "mean@8", "0.0", "0.0"])
  assert [line for line in lines[at : at + 11] if line] == [
    ["start", "mean@8", "0.0", "0.0"],
    ["greedy", "12.5", "0.0"],
    ["length", "4.0", "25%", "9.5"],
    ["visual_perception", "mean@8", "50.0", "+50.0", "25.0", "+25.0"],
    ["greedy", "62.5", "+50.0", "25.0", "+25.0"],
    ["length", "4.0", "25%", "9.5"],
    ["visual_reasoning", "mean@8", "37.5", "-12.5", "75.0", "+50.0"],
    ["greedy", "50.0", "-12.5", "75.0", "+50.0"],
    ["length", "4.0", "25%", "9.5"],
  ]


def test_the_majority_answer_stands_beside_every_task(workdir):
  lines = printed(workdir)
  assert ["color", "25.0", "0.0", "50.0", "50.0"] in lines
  assert ["sum", "50.0", "0.0", "25.0", "75.0"] in lines


def test_a_narrow_table_of_tasks_keeps_the_newest_stages(workdir):
  assert ["sum", "50.0", "25.0", "75.0"] in printed(workdir, width=62)


def test_artefacts_are_listed_where_they_are(workdir):
  lines = printed(workdir, export="/elsewhere/hf")
  assert ["records", str(workdir / "metrics.jsonl")] in lines
  assert ["export", "/elsewhere/hf"] in lines
  assert not [line for line in lines if line[:1] == ["curves"]]


def test_a_run_without_evaluations_prints_no_table(tmp_path):
  assert printed(tmp_path, export="x") == [["export", "x"]]


def test_the_summary_says_what_was_done_with_which_versions(workdir):
  write_summary(
    workdir,
    seconds=1.5,
    given={"stages": {"visual_perception": {"steps": 10}}},
    ledger={"visual_perception": {"questions": 320}},
    dropped={"train": {"too long": 2}},
  )
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["seconds"] == 1.5
  assert summary["stages"] == {"visual_perception": {"steps": 10}}
  assert summary["ledger"]["visual_perception"]["questions"] == 320
  assert summary["dropped"] == {"train": {"too long": 2}}
  assert summary["evaluations"][-1]["metrics"] == scores(0.375, 0.75)
  assert summary["versions"] == versions()
  assert summary["versions"]["jax"]
