"""Tables, picture and JSON of arms, from runs that were written by hand."""

import gzip
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jaxvlm import comparison, equality

START = {"see": 0.25, "think": 0.125}
# mean@8 of two capabilities by arm and seed; greedy is 10 points above.
SCORES = {
  "staged": [(0.50, 0.70), (0.60, 0.80), (0.55, 0.75)],
  "merged": [(0.52, 0.73), (0.63, 0.85), (0.58, 0.79)],
  "reversed": [(0.40, 0.71), (0.65, 0.78)],
}


def metrics(values):
  found = {}
  for name, value in values.items():
    found |= {
      f"{name}/mean@8": value,
      f"{name}/greedy": value + 0.1,
      f"{name}/length": 10 * value,
      f"{name}/pass@8": 1.0,
    }
  return found


def write_run(workdir, scores, *, tokens=1000.0, freeze=()):
  """A finished run of one stage."""
  stage = {
    "kind": "grpo",
    "freeze": freeze,
    "rows": {"rows": {"reward": "1 exact"}},
  }
  files = {
    "config": {
      "seed": 0,
      "allows": ["trained_tokens"],
      "schedule": ["all"],
      "stages": {"all": {"kind": "grpo"}},
    },
    "summary": {
      "stages": {"all": stage},
      "ledger": {"all": dict.fromkeys(equality.LEDGER, 1000.0)},
      "held_out": {},
      "schedule": {
        "updates": 1000,
        "restarts": [0],
        "sum_of_rates": 1.0,
        "sha256": "ab",
      },
      "seconds": 90.0,
      "evaluations": [
        {"stage": "start", "metrics": metrics(START)},
        {
          "stage": "all",
          "metrics": metrics(dict(zip(START, scores, strict=True))),
        },
      ],
    },
  }
  files["summary"]["ledger"]["all"]["trained_tokens"] = tokens
  workdir.mkdir(parents=True)
  for name, content in files.items():
    (workdir / f"{name}.json").write_text(json.dumps(content))
  rows = {"train": {"all": {"rows": {"ids": ["a"], "draws": [1]}}}}
  (workdir / "rows.json.gz").write_bytes(
    gzip.compress(json.dumps(rows).encode())
  )
  return workdir


@pytest.fixture
def runs(tmp_path):
  return {
    arm: {
      seed: write_run(
        tmp_path / arm / f"{seed}",
        scores,
        tokens=1500.0 if arm == "merged" else 1000.0,
      )
      for seed, scores in enumerate(each)
    }
    for arm, each in SCORES.items()
  }


def cells(found, title, row):
  """A row's cells by its column, of the table whose title has these words."""
  (table,) = [t for t in comparison.tables(found) if title in t.title]
  (line,) = [line for line in table.rows if line[0] == row]
  return dict(zip(table.header, line, strict=True))


def test_scores_are_means_and_deviations_over_seeds(runs):
  found = comparison.summarize(runs)
  see = found["arms"]["staged"]["scores"]["see"]["mean@8"]
  assert see["mean"] == pytest.approx(0.55)
  assert see["sd"] == pytest.approx(0.05)
  overall = found["arms"]["staged"]["scores"]["overall"]["mean@8"]
  assert overall["values"] == pytest.approx([0.6, 0.7, 0.65])
  start = cells(found, "Held-out", "start")
  assert start["see"] == "25.0 ± 0.0"
  staged = cells(found, "Held-out", "staged")
  assert (staged["see"], staged["overall"]) == ("55.0 ± 5.0", "65.0 ± 5.0")


def test_arms_are_tested_in_pairs_on_the_seeds_that_both_have(runs):
  found = comparison.summarize(runs)
  test = found["arms"]["merged"]["tests"]["see"]["mean@8"]
  assert test["seeds"] == 3
  assert test["mean"] == pytest.approx(100 * np.mean([0.02, 0.03, 0.03]))
  # t = 8 at 2 degrees of freedom; doubled for two arms.
  assert test["p"] == pytest.approx(1 - 8 / math.sqrt(2 + 64))
  assert test["p_holm"] == pytest.approx(2 * test["p"])
  test = found["arms"]["reversed"]["tests"]["see"]["mean@8"]
  assert (test["seeds"], test["mean"]) == (2, pytest.approx(-2.5))
  assert found["arms"]["staged"]["tests"] == {}
  merged = cells(found, "Points of mean@8", "merged")
  assert merged["see"] == "+2.7 ± 1.4*"
  assert merged["think"] == "+4.0 ± 2.5*"
  assert merged["seeds for 1.5"] == "5"
  assert cells(found, "Points of mean@8", "reversed")["see"].startswith(
    "-2.5 ±"
  )


def test_the_ledger_is_told_in_multiples_with_what_is_allowed(runs):
  found = comparison.summarize(runs)
  assert found["errors"] == []
  merged = cells(found, "Ledger", "merged")
  assert (merged["trained"], merged["updates"]) == ("1.500", "1.000")
  assert merged["minutes"] == "1.5"
  staged = cells(found, "Ledger", "staged")
  assert (staged["trained"], staged["updates"]) == ("1k", "1k")
  (ledger,) = [t for t in comparison.tables(found) if "Ledger" in t.title]
  assert "merged in trained_tokens" in ledger.caption
  assert "reversed in" not in ledger.caption


def test_what_is_not_allowed_is_an_error_that_names_arm_and_seed(
  runs, tmp_path
):
  runs["merged"][1] = write_run(
    tmp_path / "other", SCORES["merged"][1], freeze=("vision_tower",)
  )
  (error,) = comparison.summarize(runs)["errors"]
  assert error.startswith("merged, seed 1: freeze: ")
  page = comparison.to_markdown(comparison.summarize(runs))
  assert page.startswith("**Unequal:** merged, seed 1")
  assert comparison.summarize(runs, allows=("freeze",))["errors"] == []


@pytest.mark.parametrize(
  ("value", "short"),
  [
    (0, "0"),
    (420, "420"),
    (999.6, "1k"),
    (40320, "40.3k"),
    (1.516e12, "1.52T"),
  ],
)
def test_totals_have_three_digits_and_a_unit(value, short):
  assert comparison._short(value) == short


def test_one_seed_has_no_deviation_and_no_test(runs):
  runs = {arm: {0: seeds[0]} for arm, seeds in runs.items()}
  found = comparison.summarize(runs)
  assert cells(found, "Held-out", "merged")["see"] == "52.0"
  merged = cells(found, "Points of mean@8", "merged")
  assert (merged["see"], merged["p"], merged["seeds for 1.5"]) == (
    "+2.0",
    "–",
    "–",
  )


def test_files_hold_everything_and_the_picture_is_drawn(runs, tmp_path):
  comparison.write(tmp_path, comparison.summarize(runs))
  content = (tmp_path / "comparison.json").read_text()
  assert "NaN" not in content and "Infinity" not in content
  found = json.loads(content)
  assert found["arms"]["merged"]["runs"]["2"]["ledger"]["updates"] == 1000
  picture = Image.open(tmp_path / "comparison.png")
  assert min(picture.size) > 200
  assert len(np.unique(np.asarray(picture.convert("L")))) > 50
  page = (tmp_path / "comparison.md").read_text()
  assert "| merged | mean@8 | 57.7 ± 5.5 | 79.0 ± 6.0 |" in page


def test_a_terminal_shows_every_table(runs):
  console = Console(file=io.StringIO(), width=100, highlight=False)
  comparison.print_tables(comparison.summarize(runs), console)
  shown = " ".join(console.file.getvalue().split())
  for table in comparison.tables(comparison.summarize(runs)):
    assert table.title in shown
  assert "55.0 ± 5.0" in shown


def test_runs_without_evaluations_have_their_ledger_compared(runs):
  for seeds in runs.values():
    for workdir in seeds.values():
      file = workdir / "summary.json"
      summary = json.loads(file.read_text()) | {"evaluations": []}
      file.write_text(json.dumps(summary))
  found = comparison.summarize(runs)
  assert [table.header[0] for table in comparison.tables(found)] == ["arm"]
