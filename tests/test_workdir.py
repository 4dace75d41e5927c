"""workdir.py: one run at a time, of one config."""

import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxvlm import hosts
from jaxvlm.workdir import check_config, check_hosts, lock, write_config

ROOT = pathlib.Path(__file__).parents[1]

LOCKS = """
  import sys, time
  from jaxvlm.workdir import lock

  with lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_on_a_workdir_is_refused_until_the_first_dies(
  tmp_path,
):
  command = [sys.executable, "-c", textwrap.dedent(LOCKS), str(tmp_path)]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, cwd=ROOT
  ) as process:
    assert process.stdout.readline() == "locked\n"
    with (
      pytest.raises(ValueError, match=f"process {process.pid} is running"),
      lock(tmp_path),
    ):
      raise AssertionError("locked twice")
    process.kill()
  for _ in range(2):
    with lock(tmp_path):
      assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_workdir_is_taken_away_if_it_was_made_for_nothing(tmp_path):
  for name, mine in (("made", False), ("used", True)):
    with lock(tmp_path / name):
      if mine:
        (tmp_path / name / "config.json").write_text("{}")
  (tmp_path / "there").mkdir()
  with lock(tmp_path / "there"):
    pass
  assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "used"]


def test_an_unchanged_config_passes(tmp_path):
  config = {"seed": 0, "schedule": ("a", "b"), "stages": {"a": {"lr": 1e-3}}}
  check_config(tmp_path, config)
  write_config(tmp_path, config)
  check_config(tmp_path, config)


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
  before = {"seed": 0, "gone": 1, "stages": {"a": {"lr": 0.1, "steps": 5}}}
  after = {"seed": 0, "stages": {"a": {"lr": 0.2, "steps": 5, "new": [1]}}}
  write_config(tmp_path, before)
  with pytest.raises(ValueError, match="another config") as caught:
    check_config(tmp_path, after)
  lines = str(caught.value).splitlines()[1:]
  assert lines == [
    "  gone: 1 -> absent",
    "  stages.a.lr: 0.1 -> 0.2",
    "  stages.a.new: absent -> [1]",
  ]
  check_config(tmp_path, before)


def test_another_layout_passes_and_is_told(tmp_path):
  stage = {"microbatch_tokens": 512, "logprob_chunk": 256, "steps": 2}
  before = {
    "seed": 0,
    "mesh": {"data": 1, "fsdp": 8},
    "limits": {"host_wait": 600.0, "heartbeat": 100.0, "programs": 64},
    "sampler": {"slots": 0},
    "model": {"remat": "dots", "dtype": "float32"},
    "stages": {"see": stage},
    "evaluation": {"batch_questions": 64},
  }
  write_config(tmp_path, before)
  after = before | {
    "mesh": {"data": 8, "fsdp": 1},
    "limits": before["limits"] | {"host_wait": 60.0, "heartbeat": 5.0},
    "sampler": {"slots": 32},
    "model": before["model"] | {"remat": "full"},
    "stages": {"see": stage | {"microbatch_tokens": 1, "logprob_chunk": 2}},
    "evaluation": {"batch_questions": 8},
  }
  assert check_config(tmp_path, after) == [
    "  evaluation.batch_questions: 64 -> 8",
    '  model.remat: "dots" -> "full"',
    "  sampler.slots: 0 -> 32",
    "  stages.see.logprob_chunk: 256 -> 2",
    "  stages.see.microbatch_tokens: 512 -> 1",
  ]
  with pytest.raises(ValueError, match=r"of\n  seed: 0 -> 1$"):
    check_config(tmp_path, after | {"seed": 1})
  for other in (
    {"limits": after["limits"] | {"programs": 65}},
    {"model": after["model"] | {"dtype": "bfloat16"}},
    {"stages": {"see": stage | {"steps": 3}}},
  ):
    with pytest.raises(ValueError) as raised:
      check_config(tmp_path, after | other)
    assert len(str(raised.value).splitlines()) == 2


def test_a_workdir_that_hosts_do_not_share_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  with (
    pytest.raises(ValueError, match="process 1 does not see that; expected a"),
    lock(tmp_path),
  ):
    raise AssertionError("nothing is there")
  (tmp_path / "lock").write_text("7")
  with lock(tmp_path):
    pass


def test_hosts_with_different_configs_are_refused(monkeypatch):
  check_hosts({"seed": 0})
  monkeypatch.setattr(
    hosts, "exchange", lambda said: np.array([said, said + 1])
  )
  with pytest.raises(ValueError, match="were given different configs"):
    check_hosts({"seed": 0})
