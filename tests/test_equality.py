"""What must be equal in two arms: each kind of difference is caught by name."""

import copy
import gzip
import json

import pytest

from jaxvlm import equality
from jaxvlm.equality import Account, differences, read_account

LEDGER = dict.fromkeys(equality.LEDGER, 1000.0)


def make_account():
  """Two stages of 1,000 of everything; 400 rows asked once, 4 never."""
  stage = {
    "kind": "grpo",
    "freeze": [],
    "rows": {"worlds": {"reward": "1 exact"}},
  }
  knobs = {
    "kind": "grpo",
    "data": {},
    "steps": 5,
    "temperature": 1.0,
    "microbatch_tokens": 64,
    "learning_rate": 1e-3,
    "order": "",
  }
  ids = [f"{i:016x}" for i in range(202)]
  draws = [1] * 200 + [0, 0]
  return Account(
    config={
      "seed": 0,
      "allows": [],
      "schedule": ["see", "think"],
      "hold_schedule": [],
      "stages": {"see": knobs, "think": copy.deepcopy(knobs), "unused": {}},
      "inputs": {"max_pixels": 784, "min_pixels": None},
      "log": {"samples": 4},
      "checkpoint": {"every": 10},
    },
    summary={
      "ledger": {"see": dict(LEDGER), "think": dict(LEDGER)},
      "stages": {"see": stage, "think": copy.deepcopy(stage)},
      "held_out": {"see": {"reward": "exact", "rows": 8, "sha256": "ab"}},
      "schedule": {
        "updates": 10,
        "restarts": [0],
        "sum_of_rates": 0.01,
        "sha256": "cd",
      },
    },
    rows={
      "train": {
        "see": {"worlds": {"ids": ids, "draws": draws}},
        "think": {
          "worlds": {"ids": [f"t{one}" for one in ids], "draws": list(draws)}
        },
      }
    },
  )


def names(other, **allows):
  return [each.name for each in differences(make_account(), other, **allows)]


def test_equal_arms_differ_in_nothing():
  assert names(make_account()) == []


def test_stages_of_other_names_and_number_may_be_equal():
  """As merged is to staged: the same totals, rows and draws in one stage."""
  other = make_account()
  other.config["schedule"][:] = ["merged"]
  other.config["stages"]["merged"] = other.config["stages"].pop("see")
  other.summary["ledger"] = {"merged": dict.fromkeys(LEDGER, 2000.0)}
  other.summary["stages"] = {"merged": other.summary["stages"]["see"]}
  train = other.rows["train"]
  train["merged"] = {
    "see_worlds": train.pop("see")["worlds"],
    "think_worlds": train.pop("think")["worlds"],
  }
  assert names(other) == []


@pytest.mark.parametrize("name", ["updates", "questions"])
def test_updates_and_questions_are_equal_to_the_last_one(name):
  other = make_account()
  other.summary["ledger"]["see"][name] += 1
  assert names(other) == [name]


@pytest.mark.parametrize(
  "name",
  [name for name in equality.LEDGER if name not in ("updates", "questions")],
)
def test_other_totals_may_be_off_by_one_percent(name):
  other = make_account()
  other.summary["ledger"]["see"][name] = 1020.0  # of 2,000 in all
  assert names(other) == []
  other.summary["ledger"]["see"][name] = 1021.0
  (found,) = differences(make_account(), other)
  assert str(found) == f"{name}: 2,021, not 2,000"
  other.summary["ledger"]["see"][name] = 979.0
  assert names(other) == [name]


def change(account, path, value):
  *parents, last = path
  for key in parents:
    account = account[key]
  account[last] = value


@pytest.mark.parametrize(
  ("path", "value", "name"),
  [
    (("summary", "stages", "see", "freeze"), ["vision_tower"], "freeze"),
    (
      ("summary", "stages", "see", "rows", "worlds", "reward"),
      "0.9 math + 0.1 format",
      "rewards",
    ),
    (("summary", "held_out", "see", "sha256"), "ef", "held_out"),
    (("summary", "schedule", "sha256"), "ef", "schedule"),
    (("config", "stages", "see", "temperature"), 0.5, "temperature"),
    (("config", "stages", "see", "kind"), "sft", "kind"),
    (("config", "stages", "see", "order"), "-pass_rate", "order"),
    (("config", "inputs", "max_pixels"), 3136, "inputs.max_pixels"),
    (("config", "seed"), 1, "seed"),
  ],
)
def test_each_setting_is_compared_and_allowed_by_name(path, value, name):
  other = make_account()
  change(vars(other), path, value)
  assert names(other) == [name]
  (found,) = differences(make_account(), other, allows=(name,))
  assert found.allowed
  other.config["allows"].append(name)
  (found,) = differences(make_account(), other)
  assert found.allowed


@pytest.mark.parametrize(
  "path",
  [
    ("config", "stages", "see", "microbatch_tokens"),
    ("config", "stages", "see", "learning_rate"),  # told by the schedule
    ("config", "stages", "see", "steps"),
    ("config", "stages", "unused", "temperature"),
    ("config", "log", "samples"),
    ("config", "checkpoint", "every"),
  ],
)
def test_what_decides_no_result_may_differ(path):
  other = make_account()
  change(vars(other), path, 1)
  assert names(other) == []


def test_another_row_is_a_difference_though_it_is_never_asked():
  other = make_account()
  other.rows["train"]["see"]["worlds"]["ids"][-1] = "other"
  assert names(other) == ["rows"]


def test_the_same_rows_asked_otherwise_are_a_difference_beyond_one_percent():
  other = make_account()
  draws = other.rows["train"]["see"]["worlds"]["draws"]
  draws[:4], draws[4:8] = [0] * 4, [2] * 4  # 4 of 400 questions
  assert names(other) == []
  draws[8], draws[9] = 0, 2
  (found,) = differences(make_account(), other)
  assert found.name == "draws"
  assert found.found == "98.8%"


def test_one_difference_that_is_allowed_hides_no_other():
  other = make_account()
  other.config["allows"].append("kind")
  other.config["stages"]["see"]["kind"] = "sft"
  other.summary["ledger"]["see"]["patches"] = 0
  found = {d.name: d.allowed for d in differences(make_account(), other)}
  assert found == {"patches": False, "kind": True}


def test_what_the_baseline_allows_is_allowed_too():
  baseline, other = make_account(), make_account()
  baseline.config["allows"].append("freeze")
  other.summary["stages"]["see"]["freeze"] = ["merger"]
  (found,) = differences(baseline, other)
  assert found.allowed


def test_a_name_that_nothing_has_is_refused():
  with pytest.raises(ValueError, match="nothing called 'row' is compared"):
    differences(make_account(), make_account(), allows=("row",))


def test_a_finished_run_is_read_and_an_unfinished_one_named(tmp_path):
  account = make_account()
  for name in ("config", "summary"):
    (tmp_path / f"{name}.json").write_text(json.dumps(getattr(account, name)))
  rows = gzip.compress(json.dumps(account.rows).encode())
  (tmp_path / "rows.json.gz").write_bytes(rows)
  assert read_account(tmp_path) == account
  (tmp_path / "rows.json.gz").write_bytes(rows[:20])
  with pytest.raises(ValueError, match="no finished run can be read"):
    read_account(tmp_path)
  with pytest.raises(ValueError, match="nowhere: no finished run"):
    read_account(tmp_path / "nowhere")
