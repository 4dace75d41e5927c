"""train.py: killed at any moment, a run ends as it would have undisturbed."""

import json
import random
import resource
import shutil
import subprocess
import time
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from tests.runs import launch_fixture, project_fixture  # noqa: F401


@pytest.fixture(scope="module")
def undisturbed(launch, project, tmp_path_factory):
  """The workdir of a whole run, from a Python of its own without torch."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  done = subprocess.run(
    [*launch.command, launch.config, f"--config.workdir={workdir}"],
    env=launch.env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  assert "trained model" in done.stdout
  return workdir


def records(workdir):
  """metrics.jsonl without what differs from run to run."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [{k: v for k, v in r.items() if k != "timing"} for r in found]


def reached(workdir, stage, step):
  """Whether this step was recorded."""

  def condition():
    file = workdir / "metrics.jsonl"
    place = f'"stage": "{stage}", "step": {step},'
    return file.exists() and place in file.read_text()

  return condition


def last_checkpoint(workdir):
  names = [path.name for path in (workdir / "checkpoints").iterdir()]
  return workdir / "checkpoints" / max(filter(str.isdigit, names), key=int)


def arrays(workdir):
  """All that the last checkpoint holds, by path."""
  with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
    warnings.simplefilter("ignore")  # of the devices that it was saved from
    tree = checkpointer.restore(last_checkpoint(workdir) / "state")
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same_run(workdir, other):
  assert records(workdir) == records(other)
  for name in ("samples.jsonl", "hf/model.safetensors"):
    assert (workdir / name).read_bytes() == (other / name).read_bytes(), name
  ours, theirs = arrays(workdir), arrays(other)
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
  for item in ("loader", "progress"):
    found, expected = (
      json.loads((last_checkpoint(w) / item / "metadata").read_text())
      for w in (workdir, other)
    )
    found.pop("seconds", None), expected.pop("seconds", None)
    assert found == expected


def finish(launch, workdir):
  """The same command again; its stdout and stderr."""
  status, out, err = launch(f"workdir={workdir}").wait()
  assert status == 0, err
  return out, err


def test_the_run_has_what_a_resumed_one_could_get_wrong(undisturbed):
  steps = [r for r in records(undisturbed) if r["kind"] == "train"]
  places = [(r["stage"], r["step"]) for r in steps]
  assert places == [
    *(("warm", i) for i in (1, 2)),
    *(("perceive", i) for i in range(1, 6)),
    *(("reason", i) for i in range(1, 5)),
  ]
  for record in steps[2:]:
    assert record["metrics"]["grad_norm"] > 0
    assert 0 < record["metrics"]["accuracy"] < 1
  assert steps[3]["metrics"]["kl"] > 0  # to the stage's start
  assert steps[7]["metrics"]["kl"] > 1e-3  # to the base, from its first step
  scores = {
    r["global_step"]: r["metrics"]["perceive/mean@2"]
    for r in records(undisturbed)
    if r["kind"] == "eval" and r["stage"] == "perceive"
  }
  assert max(scores, key=scores.get) < 7  # the best is not the latest


def test_killed_in_the_second_stage_it_ends_bit_identical(
  launch, undisturbed, tmp_path
):
  run = launch(f"workdir={tmp_path}")
  run.until(reached(tmp_path, "perceive", 3))
  run.kill()
  saved = last_checkpoint(tmp_path).name
  out, err = finish(launch, tmp_path)
  assert f"Resumed after {saved} steps." in out
  assert err == ""
  assert_same_run(tmp_path, undisturbed)


def test_killed_in_a_save_and_at_a_border_with_bit_rot_it_ends_identical(
  launch, undisturbed, tmp_path
):
  checkpoints = tmp_path / "checkpoints"
  run = launch(f"workdir={tmp_path}")

  def saving():
    return reached(tmp_path, "perceive", 1)() and any(checkpoints.glob("*tmp*"))

  run.until(saving)
  time.sleep(random.uniform(0.0, 0.03))
  run.kill()

  run = launch(f"workdir={tmp_path}")
  run.until((checkpoints / "7").exists)  # handed off to "reason"
  run.kill()

  largest = max(
    (p for p in (checkpoints / "7" / "state").rglob("*") if p.is_file()),
    key=lambda path: path.stat().st_size,
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  out, err = finish(launch, tmp_path)
  assert "The checkpoint of step 7 is unreadable" in err
  assert "Going on from the checkpoint of step 6" in err
  assert "Resumed after 6 steps." in out
  assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_says_so_and_touches_nothing(
  launch, undisturbed, tmp_path
):
  def files():
    return {
      path.relative_to(workdir): (path.stat().st_mtime_ns, path.is_file())
      for path in workdir.rglob("*")
      if path.name != "lock"
    }

  # Nor does it matter where the workdir was moved.
  workdir = tmp_path / "moved"
  shutil.copytree(undisturbed, workdir)
  before = files()
  out, err = finish(launch, workdir)
  assert out == f"This run is finished; its results are in {workdir}."
  assert err == ""
  assert files() == before


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(
  launch, undisturbed, tmp_path
):
  run = launch(f"workdir={tmp_path}")
  run.until((tmp_path / "checkpoints" / "2").exists)
  # As a full disk does, this fails the write itself.
  resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
  status, _, err = run.wait()
  assert status == 1
  (line,) = err.strip().splitlines()
  assert "cannot be written" in line
  assert "Make room, then run the same command again." in line
  finish(launch, tmp_path)
  assert_same_run(tmp_path, undisturbed)


def test_eight_devices_answer_as_one_and_learn_the_same(
  launch, project, tmp_path
):
  """mesh (2, 2, 2) against one device: a greedy and a sampled evaluation,
  one step of rollouts, and what two updates made of the weights."""
  shared = ("schedule=('perceive',)", "stages.perceive.steps=1")
  mesh = [f"mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
  flags = launch.env["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
  one, eight = tmp_path / "one", tmp_path / "eight"
  runs = [
    launch(f"workdir={one}", *shared),
    launch(f"workdir={eight}", *shared, *mesh, XLA_FLAGS=flags),
  ]
  for run in runs:
    status, _, err = run.wait()
    assert status == 0, err

  (start, step, _), (start_8, step_8, _) = records(one), records(eight)
  assert start == start_8
  for name in ("reward", "accuracy", "length", "truncated", "live_groups"):
    assert step["metrics"][name] == step_8["metrics"][name]
  assert (one / "samples.jsonl").read_bytes() == (
    eight / "samples.jsonl"
  ).read_bytes()
  before, after, after_8 = (
    safetensors.numpy.load_file(directory / "model.safetensors")
    for directory in (project / "checkpoint", one / "hf", eight / "hf")
  )
  way = sum(np.square(after[n] - before[n]).sum() for n in before)
  apart = sum(np.square(after[n] - after_8[n]).sum() for n in before)
  assert 0 < apart < 1e-6 * way
