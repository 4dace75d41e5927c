"""main.py: what is wrong is said in one line before any compute is spent."""

import json
import shutil

import pytest
import safetensors.numpy
from PIL import Image

from jaxvlm import workdir
from tests.runs import (  # noqa: F401
  STOPPING,
  launch_fixture,
  project_fixture,
)

DATA = "stages.perceive.data.rows.path"
PERCEIVE = "schedule=('perceive',)"


@pytest.fixture
def refused(launch, tmp_path):
  """refused(*argv): the one line on stderr of a run that does not begin."""

  def refused(*argv):
    workdir = tmp_path / "workdir"
    status, out, err = launch(f"workdir={workdir}", *argv).wait()
    assert status == 1, out + err
    (line,) = err.strip().splitlines()
    assert line.startswith("jaxvlm: ")
    assert not workdir.exists()  # the mended command may use it
    return line.removeprefix("jaxvlm: ")

  return refused


@pytest.mark.parametrize(
  ("argv", "told"),
  [
    (
      ["model.param_dtype=bfloat16"],
      "stages.warm.optimizer.compensated: got False, and model.param_dtype is",
    ),
    (["stages.perceive.stepz=1"], "--config.stages.perceive: no field 'stepz'"),
    (["stages.perceive.stepz=1"], "there are advantage, aggregation"),
    (["seed.x=1"], "--config.seed: no field 'x'; there are none."),
    (["seed=x"], "--config.seed: got 'x'; expected a whole number."),
    (
      ["stages.warm.learning_rate=fast"],
      "--config.stages.warm.learning_rate: got 'fast'; expected a number.",
    ),
    (["--config="], "no --config; give one, as --config=configs/staged.py."),
    (
      ["workdir=s3://mine/run"],
      "s3://mine/run: expected a path of this machine, or gs://BUCKET/...",
    ),
    (["workdir=/proc/run"], "/proc/run: cannot be made a workdir (No such"),
    (["--foo=1"], "Unknown command line flag 'foo'"),
    (["more"], "unexpected arguments: more"),
    (
      ["--config=configs/staged.py:huge"],
      "staged: no size 'huge'; there are ",
    ),
    (["--config=configs/x.py"], "configs/x.py: no such config file."),
    (
      ["schedule=('perceive','seeing')"],
      "schedule: no stage 'seeing'; there are perceive, reason, warm.",
    ),
    (["schedule=()"], "schedule: got (); expected a tuple of stage names"),
    (
      ["stages.perceive.num_completions=1"],
      "stages.perceive.num_completions: got 1; a group of fewer than 2",
    ),
    (
      [
        "stages.reason.update_questions=6",
        "stages.reason.updates_per_rollout=4",
      ],
      "stages.reason.update_questions: got 6; expected a multiple of "
      "updates_per_rollout = 4",
    ),
    (
      ["mesh.data=3"],
      "mesh: {'data': 3, 'fsdp': 1, 'tensor': 1} does not make 1 devices",
    ),
    (
      ["stages.perceive.rewards=(('grades',1.0),)"],
      "stages.perceive.rewards: rewards: no 'grades'. There are: box_iou, count, exact, ",
    ),
    (
      ["stages.perceive.rewards='exact'"],
      "stages.perceive.rewards: got ('exact',); expected (name, weight) of each, as ((",
    ),
    (
      ["stages.perceive.rewards=(('none/mine.py:score',1.0),)"],
      "none/mine.py: no such file",
    ),
    (
      ["stages.perceive.data.rows.rewards=(('exact',1.0),('exact',0.1))"],
      "stages.perceive.data.rows.rewards: got (('exact', 1.0), ('exact', 0.1)); ",
    ),
    (
      ["stages.perceive.data.rows.filter=pass_rate>0", PERCEIVE],
      "stages.perceive.data.rows.filter: 'pass_rate>0': no column 'pass_rate'; "
      "there are answer, ",
    ),
    (
      ["evaluation.sets.perceive.data.rewards=(('exact',1.0),)"],
      "evaluation.sets.perceive.data.rewards: got (('exact', 1.0),); what is ",
    ),
    (
      ["evaluation.capabilities=('seeing',)"],
      "evaluation.capabilities: no set 'seeing'; there are perceive.",
    ),
    (
      ["evaluation.every=0"],
      "stages.perceive.promote: best needs evaluation.every > 0",
    ),
    (
      ["stages.warm.learning_rate=nan"],
      "stages.warm.learning_rate: got nan; expected a finite number.",
    ),
    (
      ["rewards.timeout=inf"],
      "rewards.timeout: got inf; expected a finite number.",
    ),
    (
      ["stages.warm.data.rows.weight=0"],
      "stages.warm.data.rows.weight: got 0.0; expected more than 0.",
    ),
    (
      ["stages.warm.freeze=('tower',)"],
      "stages.warm: freeze: got ('tower',); name some of",
    ),
    (
      ["stages.warm.optimizer.name=sgd"],
      "stages.warm: optimizer: got 'sgd'; there are adamw, muon.",
    ),
    (["model.checkpoint="], "model.checkpoint: got ''; expected a Hugging"),
    (
      ["model.checkpoint=Qwen/Qwen3-VL-8B-Instruct"],
      "model.checkpoint: got 'Qwen/Qwen3-VL-8B-Instruct'; no such directory. "
      "Nothing is downloaded",
    ),
    (["model.dtype=float"], "model.dtype: got 'float'; expected float32 or"),
    (
      ["model.remat=half"],
      "model.remat: got 'half'; expected one of none, dots, offload, full.",
    ),
    (
      ["model.attention=flash"],
      "model.attention: got 'flash'; expected one of auto, plain, fused.",
    ),
    (
      ["model.attention=fused"],
      "model.attention: got 'fused', and the backend is cpu; there are kernels "
      "for gpu, tpu. Set it to plain or auto.",
    ),
    ([f"{DATA}=/no/rows.parquet"], "no such file '/no/rows.parquet'"),
    (
      ["inputs.max_prompt_length=9", PERCEIVE],
      "stages.perceive.data.rows: all 24 rows are too long, 24 of them by "
      "max_prompt_length = 9 (the shortest has ",
    ),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line_that_says_what_there_is(refused, argv, told):
  assert told in refused(*argv)


@pytest.mark.parametrize(
  ("rows", "told"),
  [
    ([], "no rows in "),
    ([{"problem": "a"}], "no column 'answer'; there are problem."),
    ([{"problem": "a", "answer": None}], "[1]: no 'answer'"),
    (
      [{"problem": "<image> <image> a", "answer": "b", "images": ["ok.png"]}],
      "[1]: 2 <image> markers in the problem but 1 pictures",
    ),
    (
      [{"problem": "<image> a", "answer": "b", "images": ["bad.png"]}],
      "[1]: ",
    ),
    (
      [{"problem": "<image> a", "answer": "b", "images": ["none.png"]}],
      "none.png",
    ),
    (
      [
        {
          "problem": [{"role": "user", "content": [{"type": "video"}]}],
          "answer": "b",
        }
      ],
      "[1]: message 1: a part is 'video'",
    ),
  ],
  ids=[
    *("empty", "column", "answer", "markers", "unreadable", "missing"),
    "video",
  ],
)
def test_a_wrong_row_is_one_line_that_names_it(refused, tmp_path, rows, told):
  file = tmp_path / "rows.jsonl"
  good = [{"problem": "a", "answer": "b"}] if "answer" in str(rows) else []
  lines = [json.dumps(row) for row in good + rows]
  file.write_text("\n".join(lines))
  Image.new("RGB", (56, 56)).save(tmp_path / "ok.png")
  (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
  line = refused(f"{DATA}={file}", PERCEIVE)
  assert told in line
  assert str(file) in line


def test_a_checkpoint_of_another_family_is_refused(refused, project, tmp_path):
  directory = tmp_path / "llama"
  shutil.copytree(project / "checkpoint", directory)
  (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
  assert "'llama'" in refused(f"model.checkpoint={directory}")


@pytest.mark.parametrize("broken", ["lacking", "cut"])
def test_a_broken_checkpoint_is_refused_before_a_row_is_read(
  refused, project, tmp_path, broken
):
  directory = tmp_path / broken
  shutil.copytree(project / "checkpoint", directory)
  file = directory / "model.safetensors"
  if broken == "cut":
    file.write_bytes(file.read_bytes()[:-1000])
    told = f"{file}: damaged or cut short"
  else:
    tensors = safetensors.numpy.load_file(file)
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, file)
    told = f"{directory}: lacks model.norm.weight. Expected config.json and"
  line = refused(f"model.checkpoint={directory}", f"{DATA}=/no/rows.parquet")
  assert told in line


def test_a_users_reward_that_cannot_be_imported_is_told(refused, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("import no_such_package\n")
  line = refused(f"stages.perceive.rewards=(('{file}:score',1.0),)")
  assert "fails as it is imported: ModuleNotFoundError" in line


def test_a_sigterm_before_the_run_begins_ends_it_well(launch, tmp_path):
  file, workdir = tmp_path / "stopping.py", tmp_path / "workdir"
  file.write_text(STOPPING)
  run = launch(
    f"workdir={workdir}",
    f"stages.warm.data.rows.source={file}:source",
  )
  status, out, err = run.wait()
  assert (status, err) == (0, "")
  assert "Stopped by SIGTERM before it was under way; the same command" in out
  assert not workdir.exists()


def test_a_workdir_belongs_to_one_process(launch, tmp_path):
  with workdir.lock(tmp_path):
    status, _, err = launch(f"workdir={tmp_path}").wait()
  assert status == 1
  assert "is running there. Wait for it or end it" in err
  assert len(err.splitlines()) == 1


def test_a_changed_config_is_refused_with_the_difference(launch, tmp_path):
  # A first command that gets as far as to make the workdir its own.
  run = launch(f"workdir={tmp_path}")
  run.until((tmp_path / "config.json").exists)
  run.kill()
  status, _, err = launch(
    f"workdir={tmp_path}", "seed=1", "stages.perceive.steps=9"
  ).wait()
  assert status == 1
  assert err.splitlines() == [
    f"jaxvlm: {tmp_path}: was made with another config. Use another workdir, "
    "or the old values of",
    "  seed: 0 -> 1",
    "  stages.perceive.steps: 5 -> 9",
  ]
