"""Pairs, timers, and records that survive kills."""

import importlib.util
import io
import json
import math
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxvlm.metrics import (
  Logger,
  Sample,
  Timers,
  add,
  means,
  read_records,
)


def make_logger(workdir, *, resume_step=-1, **overrides):
  arguments = {
    "tensorboard": False,
    "wandb_project": None,
    "primary": True,
    "show": lambda record: None,
  }
  return Logger(workdir, resume_step=resume_step, **arguments | overrides)


def log_step(logger, step, *, stage="a", reward=0.5):
  logger.step(
    stage=stage,
    step=step,
    global_step=step,
    metrics={"reward": reward},
    timing={"seconds": 1.0},
  )


def log_evaluation(logger, step, *, stage="a", greedy=0.5):
  logger.evaluation(
    stage=stage,
    global_step=step,
    metrics={"perception/greedy": greedy},
    timing={},
  )


def make_sample(*images):
  return Sample(
    question_id=np.uint32(7),
    problem="<image>What?",
    answer="red",
    completion="<answer> réd </answer>",
    reward=np.float64(0.1),
    parts={"exact": 0.0, "format": 1.0},
    images=images,
  )


def test_the_mean_of_added_pairs_weighs_each_part_by_its_count():
  total = add({"reward": (1.0, 1), "only_a": (3.0, 2)}, {"reward": (0.0, 3)})
  assert total == {"reward": (1.0, 4), "only_a": (3.0, 2)}
  assert means(total) == {"reward": 0.25, "only_a": 1.5}


def test_adding_changes_neither_part():
  a, b = {"x": (1.0, 1.0)}, {"x": (2.0, 1.0)}
  add(a, b)
  assert (a, b) == ({"x": (1.0, 1.0)}, {"x": (2.0, 1.0)})


def test_a_pair_that_counts_nothing_has_no_mean():
  assert means({"correct_length": (0.0, 0)}) == {}


def test_timers_add_up_a_phase_and_start_anew(monkeypatch):
  clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
  monkeypatch.setattr("time.perf_counter", lambda: next(clock))
  timers = Timers()
  for _ in range(2):
    with timers("rollout"):
      pass
  assert timers.take() == {"rollout": 3.0}
  with pytest.raises(KeyError), timers("update"):
    raise KeyError
  assert timers.take() == {"update": 0.5}
  assert timers.take() == {}


def test_a_step_is_one_json_object_a_line_with_the_clock_apart(tmp_path):
  shown = []
  logger = make_logger(tmp_path / "run", show=shown.append)
  log_step(logger, 1)
  log_evaluation(logger, 1)
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {
      "kind": "train",
      "stage": "a",
      "step": 1,
      "global_step": 1,
      "metrics": {"reward": 0.5},
      "timing": {"seconds": 1.0},
    },
    {
      "kind": "eval",
      "stage": "a",
      "global_step": 1,
      "metrics": {"perception/greedy": 0.5},
      "timing": {},
    },
  ]
  assert shown == [json.loads(line) for line in lines]


def test_numbers_are_read_back_bit_for_bit(tmp_path):
  logger = make_logger(tmp_path)
  values = [0.1 + 0.2, np.float32(1 / 3), 1e-300, -0.0]
  for step, value in enumerate(values, start=1):
    log_step(logger, step, reward=value)
  records = read_records(tmp_path / "metrics.jsonl")
  got = [r["metrics"]["reward"] for r in records]
  assert [x.hex() for x in got] == [float(x).hex() for x in values]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(tmp_path, value):
  log_step(make_logger(tmp_path), 1, reward=value)
  [record] = read_records(tmp_path / "metrics.jsonl")
  assert record["metrics"]["reward"] is None


def test_resuming_cuts_records_of_later_steps_and_keeps_the_rest(tmp_path):
  logger = make_logger(tmp_path)
  log_evaluation(logger, 0, stage="start")
  for step in (1, 2, 3):
    log_step(logger, step)
    logger.samples(
      stage="a", step=step, global_step=step, samples=[make_sample()]
    )
  before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
  log_step(make_logger(tmp_path, resume_step=2), 3, reward=0.75)
  after = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
  assert after[:3] == before[:3]
  assert [json.loads(x)["global_step"] for x in after] == [0, 1, 2, 3]
  assert json.loads(after[3])["metrics"]["reward"] == 0.75
  samples = read_records(tmp_path / "samples.jsonl")
  assert [record["global_step"] for record in samples] == [1, 2]


def test_a_run_without_a_checkpoint_starts_with_no_records(tmp_path):
  log_evaluation(make_logger(tmp_path), 0, stage="start")
  make_logger(tmp_path, resume_step=-1)
  assert read_records(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, lost):
  logger = make_logger(tmp_path)
  log_step(logger, 1)
  log_step(logger, 2)
  file = tmp_path / "metrics.jsonl"
  whole = file.read_bytes()
  file.write_bytes(whole[:-lost])
  assert [r["global_step"] for r in read_records(file)] == [1]
  log_step(make_logger(tmp_path, resume_step=1), 2)
  assert file.read_bytes() == whole


def test_a_broken_line_within_is_an_error_that_names_it(tmp_path):
  file = tmp_path / "metrics.jsonl"
  file.write_text('{"kind": "eval"}\n{"ki\n{"kind": "eval"}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON record"):
    read_records(file)


def test_records_can_be_read_by_kind_and_a_missing_file_has_none(tmp_path):
  logger = make_logger(tmp_path)
  log_step(logger, 1)
  log_evaluation(logger, 1)
  [record] = read_records(tmp_path / "metrics.jsonl", kind="eval")
  assert record["kind"] == "eval"
  assert read_records(tmp_path / "missing.jsonl") == []


def test_an_evaluation_that_stands_already_is_not_repeated(tmp_path):
  logger = make_logger(tmp_path)
  log_evaluation(logger, 4, greedy=0.5)
  log_evaluation(logger, 4, greedy=0.6)
  resumed = make_logger(tmp_path, resume_step=4)
  log_evaluation(resumed, 4, greedy=0.7)
  log_evaluation(resumed, 4, stage="b", greedy=0.8)
  records = read_records(tmp_path / "metrics.jsonl")
  assert [r["metrics"]["perception/greedy"] for r in records] == [0.5, 0.8]


def test_only_the_primary_host_writes(tmp_path):
  logger = make_logger(tmp_path / "run", primary=False, tensorboard=True)
  log_step(logger, 1)
  logger.samples(stage="a", step=1, global_step=1, samples=[make_sample()])
  logger.close()
  assert not (tmp_path / "run").exists()


def test_pictures_of_every_form_become_png_and_are_stored_once(tmp_path):
  pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  encoded = io.BytesIO()
  Image.fromarray(pixels).save(encoded, format="BMP")
  path = tmp_path / "picture.bmp"
  path.write_bytes(encoded.getvalue())
  logger = make_logger(tmp_path)
  for step in (1, 2):
    logger.samples(
      stage="a",
      step=step,
      global_step=step,
      samples=[make_sample(pixels, encoded.getvalue(), str(path))],
    )
  first, second = read_records(tmp_path / "samples.jsonl")
  assert first["question_id"] == 7 and first["reward"] == 0.1
  assert first["parts"] == {"exact": 0.0, "format": 1.0}
  assert first["completion"] == "<answer> réd </answer>"
  assert first["images"] == second["images"] and len(first["images"]) == 3
  assert (
    len(list((tmp_path / "samples").iterdir())) == 2
  )  # bytes are the path's
  for name in first["images"]:
    np.testing.assert_array_equal(
      np.asarray(Image.open(tmp_path / name)), pixels
    )


def test_pictures_with_equal_bytes_and_other_shapes_differ(tmp_path):
  flat = np.zeros((2, 8, 3), np.uint8)
  logger = make_logger(tmp_path)
  logger.samples(
    stage="a",
    step=1,
    global_step=1,
    samples=[make_sample(flat, flat.reshape(4, 4, 3))],
  )
  [record] = read_records(tmp_path / "samples.jsonl")
  assert len(set(record["images"])) == 2


def read_events(directory):
  """Events of all files, oldest file first (TFRecord framing)."""
  for file in sorted(directory.iterdir(), key=lambda f: f.stat().st_mtime_ns):
    content = io.BytesIO(file.read_bytes())
    while header := content.read(12):
      [length] = struct.unpack("<Q", header[:8])
      yield Event.FromString(content.read(length))
      content.read(4)


def test_tensorboard_holds_each_step_at_once_and_is_purged(tmp_path):
  logger = make_logger(tmp_path, tensorboard=True)
  log_step(logger, 1)
  log_step(logger, 2)  # not closed: a kill
  resumed = make_logger(tmp_path, resume_step=1, tensorboard=True)
  log_evaluation(resumed, 2)
  resumed.close()
  events = list(read_events(tmp_path / "tensorboard"))
  tags = [(e.step, v.tag) for e in events for v in e.summary.value]
  assert tags == [
    (1, "train/reward"),
    (1, "timing/seconds"),
    (2, "train/reward"),
    (2, "timing/seconds"),
    (2, "eval/perception/greedy"),
  ]
  starts = [e.step for e in events if e.session_log.status == SessionLog.START]
  assert starts == [0, 2]
  logger.close()


@pytest.mark.skipif(
  importlib.util.find_spec("wandb") is not None, reason="wandb is installed"
)
def test_asking_for_wandb_where_it_is_missing_says_what_to_do(tmp_path):
  with pytest.raises(ValueError, match="pip install wandb"):
    make_logger(tmp_path, wandb_project="jaxvlm")


def test_wandb_gets_the_numbers_under_one_id(tmp_path, monkeypatch):
  starts, logged = [], []

  class Run:
    def define_metric(self, name, step_metric):
      assert (name, step_metric) == ("*", "global_step")

    def log(self, numbers):
      logged.append(numbers)

    def finish(self):
      logged.append("finished")

  def init(**arguments):
    starts.append(arguments)
    return Run()

  fake = types.ModuleType("wandb")
  fake.init = init
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for resume_step in (-1, 1):
    logger = make_logger(
      tmp_path, resume_step=resume_step, wandb_project="mine"
    )
    log_step(logger, resume_step + 2)
    logger.close()
  assert starts[0] == starts[1] and starts[0]["project"] == "mine"
  assert logged[0] == {
    "train/reward": 0.5,
    "timing/seconds": 1.0,
    "global_step": 1,
  }
  assert logged[1] == "finished"
