"""books.py: steps are written down beside the devices' work."""

import contextlib
import threading
import types

import pytest

from jaxvlm.books import Books, Progress
from jaxvlm.metrics import Logger, read_records

STAGE = types.SimpleNamespace(name="reason")


@pytest.fixture
def gate(monkeypatch):
  """Opened, it lets steps be written."""
  opened = threading.Event()
  write = Logger.step

  def step(*args, **kwargs):
    assert opened.wait(30)
    write(*args, **kwargs)

  monkeypatch.setattr(Logger, "step", step)
  return opened


@pytest.fixture
def books(tmp_path):
  log = {"tensorboard": False, "wandb_project": None, "samples_every": 0}
  job = types.SimpleNamespace(
    workdir=tmp_path,
    primary=True,
    devices={},
    config={
      "checkpoint": {"keep_last": 1, "keep_best": 0},
      "log": {**log, "samples": 0},
    },
  )
  display = types.SimpleNamespace(
    show=lambda record: None,
    task=lambda *args, **kwargs: contextlib.nullcontext(lambda count: None),
  )
  with Books(job, display, None) as made:
    assert made.restore()[0] is None
    yield made


def record(books, step):
  progress = Progress(step=step, global_step=step)
  books.step(STAGE, progress, None, {"reward": 0.5}, {})


def test_a_step_is_written_while_the_next_one_runs(books, gate, tmp_path):
  record(books, 1)  # returns though nothing is written
  file = tmp_path / "metrics.jsonl"
  assert not read_records(file)
  second = threading.Thread(target=record, args=(books, 2))
  second.start()
  second.join(0.2)
  assert second.is_alive()  # one step at a time
  gate.set()
  second.join()
  books.__exit__()
  assert [r["step"] for r in read_records(file)] == [1, 2]


def test_what_was_recorded_is_written_before_a_checkpoint(
  books, gate, tmp_path, monkeypatch
):
  written = []
  monkeypatch.setattr(
    books._checkpoints,
    "save",
    lambda *args, **kwargs: written.extend(
      read_records(tmp_path / "metrics.jsonl")
    ),
  )
  record(books, 1)
  threading.Timer(0.2, gate.set).start()
  books.save(None, Progress(step=1, global_step=1), {}, None)
  assert [r["step"] for r in written] == [1]


def test_a_record_that_cannot_be_written_ends_the_run(books, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Logger, "step", full)
  record(books, 1)
  with pytest.raises(OSError, match="No space"):
    record(books, 2)


def test_what_was_recorded_is_written_before_a_failure_goes_on(
  books, gate, tmp_path
):
  """Where there are other hosts, nothing of this process would outlive it."""
  record(books, 1)
  threading.Timer(0.2, gate.set).start()
  with pytest.raises(KeyError), books.recording():
    raise KeyError("no such picture")
  assert len(read_records(tmp_path / "metrics.jsonl")) == 1


def test_what_was_recorded_comes_before_an_evaluation(
  books, gate, tmp_path, monkeypatch
):
  books._job.held_out = (None,)
  books._job.config["limits"] = {"programs": 1000}
  books._evaluator = types.SimpleNamespace(
    batches=lambda: 1, run=lambda params, advance: {"reason/greedy": 0.5}
  )
  record(books, 1)
  threading.Timer(0.2, gate.set).start()
  books.evaluate("reason", None, Progress(step=1, global_step=1), None)
  kinds = [r["kind"] for r in read_records(tmp_path / "metrics.jsonl")]
  assert kinds == ["train", "eval"]
