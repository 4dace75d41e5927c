"""train.py: killed at any moment, a run ends as it would have undisturbed."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from configs import presets
from jaxvlm import models, train
from jaxvlm.data.processor import Processor
from jaxvlm.data.sources import files
from jaxvlm.rollout.sampler import Draws, Sampler
from jaxvlm.sharding import AXES
from tests.runs import ROOT, launch_fixture, project_fixture  # noqa: F401


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


def timings(workdir):
  """Of each stage's last step."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return {r["stage"]: r["timing"] for r in found if r["kind"] == "train"}


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


def test_sigterm_saves_and_the_same_command_ends_bit_identical(
  launch, undisturbed, tmp_path
):
  """At any moment of a step, or of the evaluation before it."""
  run = launch(f"workdir={tmp_path}")
  run.until(reached(tmp_path, "perceive", 2))
  time.sleep(random.uniform(0.0, 0.3))
  os.kill(run.pid, signal.SIGTERM)
  status, out, err = run.wait()
  assert (status, err) == (0, "")
  stopped = re.search(r"Stopped by SIGTERM after (\d+) steps", out)
  assert last_checkpoint(tmp_path).name == stopped[1]
  assert not (tmp_path / "hf").exists()
  out, _ = finish(launch, tmp_path)
  assert f"Resumed after {stopped[1]} steps." in out
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


def test_a_stage_draws_by_its_name_wherever_it_stands():
  def data(name, step, seed=0):
    job = types.SimpleNamespace(config={"seed": seed})
    stage = types.SimpleNamespace(name=name)
    return tuple(jax.random.key_data(train.step_key(job, stage, step)).tolist())

  keys = {
    data(name, step, seed)
    for name in ("perceive", "reason")
    for step in (0, 1)
    for seed in (0, 1)
  }
  assert len(keys) == 8
  assert data("perceive", 1) in keys


def test_the_export_loads_in_transformers_and_answers_greedily_as_here(
  undisturbed, project
):
  """The trained weights, in torch's own generate and in our sampler."""
  export = undisturbed / "hf"
  processor = Processor.from_directory(
    export,
    min_pixels=None,
    max_pixels=None,
    prompt_suffix="",
    system_prompt=None,
  )
  rows = files.source(path=str(project / "held_out.parquet"))
  questions = [processor.question(rows[i], i) for i in range(4)]
  network = models.load_network(
    export,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    attention="plain",
  )
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
  sampler = Sampler(
    network=network,
    mesh=mesh,
    eos_ids=processor.eos_ids,
    pad_id=processor.pad_id,
    banned=processor.banned_ids(network.config.vocab_size),
    layout=processor.layout,
  )
  rollout = sampler.sample(
    sampler.weights(models.load_params(network, export, mesh)),
    questions,
    key=jax.random.key(0),
    draws=Draws(
      num_completions=1,
      max_completion_length=6,
      temperature=0.0,
      top_k=0,
      top_p=1.0,
    ),
  )

  model = AutoModelForImageTextToText.from_pretrained(export)
  tokenizer = AutoTokenizer.from_pretrained(export)
  assert tuple(model.generation_config.eos_token_id) == processor.eos_ids
  for q, question in enumerate(questions):
    ids = torch.tensor(question.prompt_ids)[None].long()
    answer = model.generate(
      input_ids=ids,
      mm_token_type_ids=(ids == network.config.image_token_id).int(),
      pixel_values=torch.tensor(question.pixel_values),
      image_grid_thw=torch.tensor(question.image_grid_thw).long(),
      max_new_tokens=6,
      do_sample=False,
    )[0, ids.shape[1] :]
    ours = rollout.completion_ids[q, 0][rollout.completion_mask[q, 0]]
    np.testing.assert_array_equal(ours, answer.numpy())
    # transformers' tokenizer writes the prompt as our processor does.
    content = [{"type": "image"}, {"type": "text", "text": " which?"}]
    text = tokenizer.apply_chat_template(
      [{"role": "user", "content": content}],
      tokenize=False,
      add_generation_prompt=True,
    )
    count = int((question.prompt_ids == network.config.image_token_id).sum())
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    np.testing.assert_array_equal(
      tokenizer(text).input_ids, question.prompt_ids
    )


# Neither a reference nor a look at whether the model sees.
PLAIN = ("stages.reason.kl_coef=0.0", "limits.blind_every=0")

FRAGILE = """
import time

def score(completion, example):
  if example.answer == "A":
    raise ValueError("no A")
  if example.answer == "B":
    time.sleep(60)
  if example.answer == "C":
    return float("nan")
  return len(completion) % 3
"""


def test_a_reward_that_fails_is_named_until_there_are_too_many(
  launch, undisturbed, tmp_path
):
  file = tmp_path / "fragile.py"
  file.write_text(FRAGILE)
  status, out, err = launch(
    f"workdir={tmp_path / 'run'}",
    "schedule=('reason',)",
    f"stages.reason.rewards=(('{file}:score',1.0),)",
    "evaluation.capabilities=()",
    "stages.reason.metric=",
    "rewards.timeout=0.3",
    "limits.failed_groups=10",
    *PLAIN,
  ).wait()
  for why in ("raised ValueError: no A", "hung for more than", "returned nan"):
    assert f"reward '{file}:score' {why}" in out
  assert "train.parquet[" in out
  (line,) = err.strip().splitlines()
  assert status == 1
  assert line.startswith("jaxvlm: stopped: stage reason: the rewards of ")
  assert "limits.failed_groups is 10" in line
  # Of 24 rows 18 fail, so the first steps went on without them.
  steps = records(tmp_path / "run")
  assert steps[0]["metrics"]["failed_groups"] > 0
  assert steps[0]["metrics"]["grad_norm"] > 0
  assert len(steps) >= 2


def test_updates_that_are_not_finite_are_skipped_until_there_are_too_many(
  launch, undisturbed, tmp_path
):
  status, _, err = launch(
    f"workdir={tmp_path}",
    "schedule=('reason',)",
    "stages.reason.learning_rate=1e38",
    "evaluation.capabilities=()",
    "stages.reason.metric=",
    "limits.skipped_updates=1",
    *PLAIN,
  ).wait()
  assert status == 1
  (line,) = err.strip().splitlines()
  assert "2 updates had a gradient that is not finite" in line
  skipped = [r["metrics"]["update_skipped"] for r in records(tmp_path)]
  assert skipped == [0.0, 1.0, 1.0]
  with np.load(tmp_path / "not_finite_3.npz") as batch:
    assert f"{tmp_path / 'not_finite_3.npz'}" in line
    assert batch["completion_mask"].shape == (8, 4, 6)
    assert batch["advantages"].shape == batch["rewards"].shape == (8, 4)


@pytest.mark.parametrize(
  ("changes", "where", "steps"),
  [
    ([], "evaluation of start", 0),
    (
      ["evaluation.capabilities=()", "stages.perceive.promote=latest"],
      "stage perceive",
      3,
    ),
  ],
)
def test_a_run_of_too_many_shapes_stops_and_names_them(
  launch, tmp_path, changes, where, steps
):
  """An evaluation has programs of its own, and so has a stage."""
  status, _, err = launch(
    f"workdir={tmp_path}", "limits.programs=1", *changes
  ).wait()
  assert status == 1
  (line,) = err.strip().splitlines()
  told = f"{where}: .* was compiled for 2 shapes; limits.programs is 1"
  assert re.search(told, line)
  assert re.search(r"The last ones: \w+ \d+, .*; \w+ \d+", line)
  done = [r for r in records(tmp_path) if r["kind"] == "train"]
  assert len(done) == steps


def test_shapes_of_several_stages_do_not_add_up(launch, tmp_path):
  status, _, err = launch(f"workdir={tmp_path}", "limits.programs=2").wait()
  assert (status, err) == (0, "")


def test_what_was_compiled_stands_beside_each_step(undisturbed):
  lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
  steps = [r for r in map(json.loads, lines) if r["kind"] == "train"]
  first, last = steps[0]["timing"], steps[-1]["timing"]
  assert "record" not in first and last["record"] > 0  # of the step before
  assert first["programs"] > 0 and first["compile"] > 0
  assert last["compile"] < first["compile"]


def convert(*arguments):
  tool = [sys.executable, ROOT / "tools" / "convert_hf.py"]
  done = subprocess.run(
    [*tool, *arguments], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""


def weights_in(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def test_a_run_goes_on_from_an_orbax_checkpoint_as_from_its_source(
  launch, undisturbed, project, tmp_path
):
  convert("to-orbax", project / "checkpoint", tmp_path / "orbax")
  status, _, err = launch(
    f"workdir={tmp_path / 'run'}",
    f"model.checkpoint={tmp_path / 'orbax'}",
    "schedule=('warm',)",
    "stages.warm.steps=1",
    "stages.warm.metric=",
    "evaluation.capabilities=()",
    "checkpoint.export_stages=True",
  ).wait()
  assert (status, err) == (0, "")
  (first,) = records(tmp_path / "run")
  assert first in records(undisturbed)
  # What it hands over after a stage, here the last.
  stage, end = (weights_in(tmp_path / "run" / d) for d in ("hf_warm", "hf"))
  assert stage.keys() == end.keys()
  for name, tensor in end.items():
    np.testing.assert_array_equal(stage[name], tensor)


def test_a_runs_checkpoint_becomes_a_hugging_face_directory(
  undisturbed, tmp_path
):
  convert("to-hf", last_checkpoint(undisturbed), tmp_path / "hf")
  expected, got = (weights_in(d) for d in (undisturbed / "hf", tmp_path / "hf"))
  assert got.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(got[name], tensor)


def test_a_model_that_does_not_see_is_stopped(
  launch, undisturbed, project, tmp_path
):
  blind = shutil.copytree(project / "checkpoint", tmp_path / "blind")
  file = blind / "model.safetensors"
  weights = safetensors.numpy.load_file(file)
  weights["visual.merger.mlp.2.weight"][:] = 0
  safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})
  status, _, err = launch(
    f"workdir={tmp_path / 'run'}", f"model.checkpoint={blind}"
  ).wait()
  assert status == 1
  (line,) = err.strip().splitlines()
  assert "the model is blind" in line and "picture_effect" in line

  def effects(workdir):
    metrics = [record["metrics"] for record in records(workdir)]
    return [m["picture_effect"] for m in metrics if "picture_effect" in m]

  assert effects(tmp_path / "run") == [0.0]
  assert min(effects(undisturbed)) > 0


def test_every_preset_trains(launch, project, tmp_path):
  """Two of them with a frozen tower, which is asked once a rollout."""
  frozen = {"gspo": ("vision_tower", "merger"), "dapo": ("vision_tower",)}
  status, _, err = launch(
    f"--config={project / 'config.py'}:presets",
    f"workdir={tmp_path}",
    "evaluation.capabilities=()",
    *(f"stages.{name}.freeze={parts}" for name, parts in frozen.items()),
  ).wait()
  assert status == 0, err
  steps = {
    r["stage"]: r["metrics"] for r in records(tmp_path) if r["kind"] == "train"
  }
  spent = timings(tmp_path)
  assert steps.keys() == presets.PRESETS.keys()
  for name, metrics in steps.items():
    assert (spent[name]["encode"] > 0.002) == (name in frozen), name
    assert 0 <= spent[name]["host_stall"] < spent[name]["seconds"]
    assert 0 < metrics["padding/columns"] < 1
    assert ("grad_norm/vision_tower" in metrics) == (name not in frozen), name
    trained = "merger" not in frozen.get(name, ())
    assert ("grad_norm/merger" in metrics) == trained, name
    assert metrics["grad_norm/decoder"] > 0, name
    assert metrics["update_skipped"] == 0, name
    assert ("kl" in metrics) == (presets.load(name)["kl_coef"] > 0), name
    assert ("rollouts" in metrics) == (name == "dapo")
    assert ("importance_capped" in metrics) == (name == "trl")


RARE = """
def score(completion, example):
  return float(sum(completion.encode()) % 13 == 0)
"""


def test_groups_of_one_reward_are_replaced_and_no_stop_changes_anything(
  launch, tmp_path
):
  """Few groups are alive: in some steps more rollouts are made, in others some
  groups wait. Those outlive SIGTERM and kills, whenever checkpoints are saved.
  """
  (tmp_path / "rare.py").write_text(RARE)
  flags = (
    "schedule=('reason',)",
    "evaluation.capabilities=()",
    f"stages.reason.rewards=(('{tmp_path}/rare.py:score', 1.0),)",
    "stages.reason.max_rollouts=4",
    "stages.reason.metric=''",
    "stages.reason.steps=4",
    *PLAIN,
  )
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  status, out, err = launch(
    *flags,
    f"workdir={whole}",
    "checkpoint.every=100",
    script=ROOT / "tests" / "recorded.py",
  ).wait()
  assert status == 0, err
  # Decoding's weights are made once a step, however many rollouts it has.
  made = (whole / "sampled" / "weights.host0").read_text()
  assert made == "reason\n" * 4
  found = [r["metrics"] for r in records(whole) if r["kind"] == "train"]
  assert {2.0, 3.0, 4.0} & {metrics["rollouts"] for metrics in found}
  for metrics in found:
    assert metrics["idle_groups"] == 0 or metrics["rollouts"] == 4
  short = any(metrics["idle_groups"] for metrics in found)
  assert out.count("ran out after 4 rollouts of 8 questions") == short

  flags = (*flags, f"workdir={stopped}", "checkpoint.every=2")
  run = launch(*flags)
  run.until(reached(stopped, "reason", 1))
  os.kill(run.pid, signal.SIGTERM)
  status, _, err = run.wait()
  assert status == 0, err
  kept = last_checkpoint(stopped) / "host" / "0-of-1"
  assert kept.stat().st_size > 0
  run = launch(*flags)
  run.until(reached(stopped, "reason", 3))
  run.kill()
  status, _, err = launch(*flags).wait()
  assert status == 0, err
  assert_same_run(whole, stopped)


def test_rows_are_chosen_ordered_and_counted_as_the_config_says(
  launch, undisturbed, project, tmp_path
):
  rows = pyarrow.parquet.read_table(project / "train.parquet").to_pylist()
  for i, row in enumerate(rows):
    row["number"] = i
    row["problem"] += "long" * 20 * (i < 3)
  file = tmp_path / "rows.parquet"
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  status, out, err = launch(
    f"workdir={tmp_path / 'run'}",
    "schedule=('reason',)",
    "stages.reason.steps=1",
    f"stages.reason.data.rows.path={file}",
    "evaluation.capabilities=()",
    "stages.reason.metric=",
    "stages.reason.data.rows.filter=number != 23",
    "stages.reason.data.rows.limit=20",
    "stages.reason.order=-number",
    "inputs.max_prompt_length=80",
    *PLAIN,
  ).wait()
  assert status == 0, err
  assert (
    "dropped 1 outside the filter, 3 beyond limit 20, 3 over "
    "max_prompt_length 80; 17 stay."
  ) in out
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["dropped"] == {
    "stages.reason.data.rows": {
      "outside the filter": 1,
      "beyond limit 20": 3,
      "over max_prompt_length 80": 3,
    }
  }
