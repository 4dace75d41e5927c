"""What summary.json and rows.json.gz say of a run's rows and knobs."""

import gzip
import hashlib
import json
import types

import numpy as np
import pytest

from jaxvlm import account
from jaxvlm.data.loader import Loader, Source
from jaxvlm.data.rows import row_id
from jaxvlm.stages import hold_schedule
from jaxvlm.types import Example
from tests.test_stages import make_stage


def examples(count, start=0):
  return [
    Example(problem=f"{i}?", answer=str(i)) for i in range(start, start + count)
  ]


def make_source(rows, weight=1.0):
  ids = [row_id(row) for row in rows]
  sizes = np.ones((len(ids), 2), int)
  return Source(weight, rows, np.arange(len(rows)), ids, sizes)


def make_job(*stages, sources, seed=0):
  held_out = types.SimpleNamespace(
    capability="seeing",
    reward="exact",
    source=make_source(examples(3, 100)),
  )
  return types.SimpleNamespace(
    config={"seed": seed, "allows": ("order",)},
    make_loader=lambda i: Loader(
      sources[stages[i].name],
      None,  # nothing is prepared
      batch_size=stages[i].rollout_questions,
      seed=seed,
      process_index=0,
      process_count=1,
      shuffle=True,
      total=None,
    ),
    schedule=stages,
    sources=sources,
    held_out=[held_out],
  )


def stage_of(sources, **changes):
  data = {name: {"rewards": ()} for name in sources}
  return make_stage(**{"data": data, "steps": 3} | changes)


def write(tmp_path, job):
  ledgers = {
    stage.name: {"questions": float(stage.steps * stage.rollout_questions)}
    for stage in job.schedule
  }
  found = json.loads(json.dumps(account.write(tmp_path, job, ledgers)))
  rows = gzip.decompress((tmp_path / "rows.json.gz").read_bytes())
  return found, json.loads(rows)


def test_rows_are_told_by_id_hash_and_how_often_they_are_asked(tmp_path):
  sources = {
    "some": make_source(examples(20), 3.0),
    "more": make_source(examples(30, 50)),
  }
  job = make_job(stage_of(sources), sources={"seeing": sources})
  found, rows = write(tmp_path, job)

  listed = rows["train"]["seeing"]["some"]
  assert listed["ids"] == [row_id(e) for e in examples(20)]
  assert sum(listed["draws"]) == 36  # 3 of 4 parts of 3 steps x 16
  assert set(listed["draws"]) == {1, 2}  # an epoch, and most of another
  digest = hashlib.sha256("\n".join(sorted(listed["ids"])).encode())
  assert found["stages"]["seeing"]["rows"]["some"] == {
    "rows": 20,
    "sha256": digest.hexdigest(),
    "questions": 36,
    "reward": "1 exact",
  }
  assert rows["held_out"]["seeing"] == [row_id(e) for e in examples(3, 100)]
  assert found["held_out"]["seeing"]["rows"] == 3
  assert found["held_out"]["seeing"]["reward"] == "exact"
  assert found["allows"] == ["order"]


def test_the_same_rows_in_another_order_have_the_same_hash(tmp_path):
  rows = examples(5)
  for name, each in (("a", rows), ("b", rows[::-1]), ("c", rows[:4])):
    sources = {name: make_source(each)}
    job = make_job(stage_of(sources), sources={"seeing": sources})
    found, _ = write(tmp_path, job)
    told = found["stages"]["seeing"]["rows"][name]["sha256"]
    if name == "a":
      first = told
    assert (told == first) is (name != "c")


def test_rewards_are_a_formula_and_a_source_may_have_its_own(tmp_path):
  sources = {"some": make_source(examples(4)), "own": make_source(examples(4))}
  stage = stage_of(
    sources,
    rewards=(("math", 0.9), ("think_format", 0.1)),
    data={
      "some": {"rewards": ()},
      "own": {"rewards": (("number(absolute=1)", 1.0),)},
    },
    freeze=("vision_tower",),
  )
  found, _ = write(tmp_path, make_job(stage, sources={"seeing": sources}))
  told = found["stages"]["seeing"]
  assert told["reward"] == "0.9 math + 0.1 think_format"
  assert told["rows"]["some"]["reward"] == told["reward"]
  assert told["rows"]["own"]["reward"] == "1 number(absolute=1)"
  assert (told["kind"], told["steps"]) == ("grpo", 3)
  assert told["freeze"] == ["vision_tower"]


def test_supervised_stages_have_no_reward(tmp_path):
  sources = {"some": make_source(examples(4))}
  stage = stage_of(sources, kind="sft")
  found, _ = write(tmp_path, make_job(stage, sources={"seeing": sources}))
  assert found["stages"]["seeing"]["reward"] == "none"


def test_the_same_rows_are_written_as_the_same_bytes(tmp_path):
  sources = {"some": make_source(examples(4))}
  job = make_job(stage_of(sources), sources={"seeing": sources})
  written = set()
  for _ in range(2):
    write(tmp_path, job)
    written.add((tmp_path / "rows.json.gz").read_bytes())
  assert len(written) == 1


@pytest.mark.parametrize("lr_schedule", ["constant", "linear"])
def test_a_held_schedule_is_that_of_one_stage_and_restarts_are_not(lr_schedule):
  parts = [
    make_stage(name=name, steps=steps, lr_schedule=lr_schedule)
    for name, steps in (("a", 4), ("b", 6))
  ]
  whole = account.schedule([make_stage(steps=10, lr_schedule=lr_schedule)])
  assert account.schedule(hold_schedule(parts, ("a", "b"))) == whole
  assert (whole["updates"], whole["restarts"]) == (20, [0])
  apart = account.schedule(parts)
  assert apart["restarts"] == [0, 8]
  assert apart["sha256"] != whole["sha256"]
