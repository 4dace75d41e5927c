"""tools/compare_arms.py: two arms, two seeds, and what goes wrong."""

import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import sys

import pytest

from jaxvlm.display import Display, make_console
from tests.runs import ROOT, launch_fixture, project_fixture  # noqa: F401

spec = importlib.util.spec_from_file_location(
  "compare_arms", ROOT / "tools" / "compare_arms.py"
)
compare_arms = importlib.util.module_from_spec(spec)
sys.modules["compare_arms"] = compare_arms  # where dataclasses look
spec.loader.exec_module(compare_arms)
Run = compare_arms.Run

STAGES = ("visual_perception", "visual_reasoning", "textual_reasoning")

# Stages of unequal learning rates, whose rows are the same.
BASE = """
from configs import common

HERE = {here!r}
REWARD = HERE + "/my_rewards.py:score"


def get_config():
  config = common.base(workdir="runs/base", schedule=("warm_start", *{stages}))
  config.model.checkpoint = HERE + "/checkpoint"
  config.rewards.num_workers = 1
  config.log.update({{"samples_every": 0, "tensorboard": False}})
  config.limits.blind_every = 0
  config.evaluation.update({{
    "capabilities": ("perceive",),
    "sets": {{"perceive": {{"reward": REWARD, "data": rows("held_out")}}}},
    "batch_questions": 8,
    "num_completions": 2,
    "max_completion_length": 6,
  }})
  shared = {{
    "data": {{"rows": rows("train")}},
    "rewards": ((REWARD, 1.0),),
    "rollout_questions": 8,
    "update_questions": 8,
    "updates_per_rollout": 1,
    "microbatch_tokens": 2048,
    "num_completions": 2,
    "max_completion_length": 6,
    "kl_coef": 0.0,
    "lr_schedule": "linear",
    "lr_warmup": 1,
    "logprob_chunk": 32,
  }}
  config.stages.warm_start = common.stage(**shared | {{
    "kind": "sft",
    "data": {{"rows": rows("train", response_key="response")}},
    "steps": 2,
    "max_completion_length": 12,
  }})
  for i, name in enumerate({stages}):
    config.stages[name] = common.stage(
      **shared, steps=2, learning_rate=1e-3 * (1 + i)
    )
  return config


def rows(name, **fields):
  return common.data("files", path=f"{{HERE}}/{{name}}.parquet", **fields)
"""


@pytest.fixture(scope="module", name="base")
def base_fixture(project, tmp_path_factory):
  file = tmp_path_factory.mktemp("base") / "base.py"
  file.write_text(BASE.format(here=str(project), stages=STAGES))
  return file


class Forked:
  """A Popen of a run of main, forked with its imports made.

  Only seed 0 is really run; another leaves the same files, but for its seed.
  """

  def __init__(self, launch, commands, command, **_):
    commands.append(command)
    assert command[1:3] == ("-m", "jaxvlm.main")
    if "--config.seed=0" in command:
      self._run = launch(*command[3:])
    else:
      self._run = None
      (workdir,) = (w for w in command if w.startswith("--config.workdir="))
      workdir = pathlib.Path(workdir.partition("=")[2])
      shutil.copytree(workdir.with_name("seed0"), workdir)
      file = workdir / "config.json"
      config = file.read_text().replace('"seed": 0', '"seed": 1')
      file.write_text(config.replace("seed0", "seed1"))

  def poll(self):
    self.returncode, _, err = self._run.wait() if self._run else (0, "", "")
    assert not self.returncode, err
    return self.returncode

  def wait(self):
    pass

  terminate = wait


@pytest.fixture(scope="module", name="compared")
def compared_fixture(base, launch, tmp_path_factory):
  """(workdir, commands run) of staged and merged on two seeds, held."""
  root = tmp_path_factory.mktemp("arms")
  commands = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      compare_arms.subprocess,
      "Popen",
      lambda command, **k: Forked(launch, commands, command, **k),
    )
    compare_arms.main(arguments(base, root))
  return root, commands


def arguments(base, root):
  return [
    *("--arms=staged,merged", "--seeds=2", "--hold_schedule"),
    *(f"--base={base}", f"--workdir={root}"),
  ]


def rates(workdir):
  """Learning rates of all training steps."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  steps = [r for r in map(json.loads, lines) if r["kind"] == "train"]
  return [step["metrics"]["learning_rate"] for step in steps]


def test_the_warm_start_is_run_once_a_seed_and_the_arms_once_each(compared):
  root, commands = compared
  assert len(commands) == 6
  assert sum('("warm_start",)' in " ".join(each) for each in commands) == 2
  assert (root / "comparison.md").exists()
  assert (root / "comparison.png").exists()


def test_equal_arms_are_compared_seed_by_seed(compared):
  root, _ = compared
  found = json.loads((root / "comparison.json").read_text())
  assert found["errors"] == []
  assert list(found["arms"]) == ["staged", "merged"]
  merged = found["arms"]["merged"]
  assert list(merged["runs"]) == ["0", "1"]
  assert merged["tests"]["overall"]["mean@2"]["seeds"] == 2
  for name in ("updates", "questions", "patches", "prompt_tokens"):
    assert merged["ledger_ratio"][name] == 1.0
  assert "schedule" not in merged["runs"]["0"]["differences"]
  assert merged["runs"]["0"]["stages"]["merged"]["reward"].endswith(":score")


def test_held_arms_have_one_learning_rate_after_another(compared):
  root, _ = compared
  merged = rates(root / "merged" / "seed0")
  assert rates(root / "staged" / "seed0") == merged
  assert merged == pytest.approx([1e-3 * (1 - i / 5) for i in (0, *range(5))])


def test_an_arm_from_the_shared_warm_start_is_the_one_command_run(
  compared, base, launch, tmp_path
):
  root, _ = compared
  status, _, err = launch(
    f"--config={base}",
    *(f"workdir={tmp_path}", f"hold_schedule={STAGES!r}"),
    *(f"stages.{name}.learning_rate=0.001" for name in STAGES),
  ).wait()
  assert status == 0, err
  export = "hf/model.safetensors"
  ours, merged = (
    (root / arm / "seed0" / export).read_bytes() for arm in ("staged", "merged")
  )
  assert ours == (tmp_path / export).read_bytes()
  assert ours != merged


def test_what_is_finished_is_not_run_again(compared, base, monkeypatch):
  root, _ = compared
  before = (root / "comparison.json").read_bytes()
  monkeypatch.setattr(compare_arms.subprocess, "Popen", None)
  compare_arms.main(arguments(base, root))
  assert (root / "comparison.json").read_bytes() == before


def test_a_difference_is_exit_status_1_unless_it_is_allowed(
  compared, base, monkeypatch
):
  root, _ = compared
  monkeypatch.setattr(compare_arms.subprocess, "Popen", None)
  file = root / "merged" / "seed0" / "summary.json"
  summary = json.loads(file.read_text())
  other = json.loads(file.read_text())
  other["ledger"]["merged"]["questions"] += 8
  file.write_text(json.dumps(other))
  with pytest.raises(SystemExit, match="merged, seed 0: questions: 56, not 48"):
    compare_arms.main(arguments(base, root))
  compare_arms.main([*arguments(base, root), "--allow=questions"])
  file.write_text(json.dumps(summary))


def test_commands_are_printed_for_a_cluster(base, tmp_path, capsys):
  compare_arms.main(
    [*arguments(base, tmp_path), "--print", "--config.log.samples=2"]
  )
  lines = capsys.readouterr().out.splitlines()
  commands = [shlex.split(x, comments=True) for x in lines if x[0] != "#"]
  assert len(commands) == 6
  for command in commands:
    assert command[1:3] == ["-m", "jaxvlm.main"]
    assert command[-1] == "--config.log.samples=2"
  start = f"--config.model.checkpoint={tmp_path}/warm_start/seed1/hf"
  assert [start in command for command in commands] == [False] * 4 + [True] * 2
  assert not any(tmp_path.iterdir())


def test_ordered_arms_have_their_rows_annotated_by_their_start(tmp_path):
  plan = compare_arms.Plan(
    base="tiny", root=tmp_path, hold_schedule=False, completions=4, extra=()
  )
  runs = plan.runs(("staged", "difficulty", "staged_difficulty"), 1)[0]
  annotations = [run for run in runs if run.workdir is None]
  assert len(annotations) == 6  # three stages' rows, and what is rehearsed
  warm = tmp_path / "warm_start" / "seed0" / "hf"
  for run in annotations:
    assert f"--config.model.checkpoint={warm}" in run.command
    assert "--completions=4" in run.command
    assert run.needs == (runs[0],)
  flags = {run.name: " ".join(run.command) for run in runs}
  files = {run.leaves.name: run.leaves for run in annotations}
  perception = files["textual_reasoning_rehearse_perception.parquet"]
  for flag in (
    f"stages.merged.data.textual_reasoning_rehearse_perception.annotations={perception}",
    f"stages.merged.data.visual_perception_worlds.annotations={files['visual_perception_worlds.parquet']}",
  ):
    assert flag in flags["difficulty, seed 0"]
  assert (
    f"stages.textual_reasoning.data.rehearse_perception.annotations={perception}"
    in flags["staged_difficulty, seed 0"]
  )
  assert "annotations" not in flags["staged, seed 0"]
  needs = {run.name: run.needs for run in runs}
  assert needs["staged, seed 0"] == (runs[0],)
  assert needs["difficulty, seed 0"] == (runs[0], *annotations)


def test_printed_annotations_have_a_directory_made_for_them(tmp_path, capsys):
  compare_arms.main(
    ["--arms=difficulty", "--seeds=1", f"--workdir={tmp_path}", "--print"]
  )
  lines = capsys.readouterr().out.splitlines()
  assert lines[1] == f"mkdir -p {tmp_path}/annotations/seed0"


def test_a_base_without_a_warm_start_has_its_arms_start_from_the_checkpoint(
  tmp_path,
):
  plan = compare_arms.Plan(
    base="files", root=tmp_path, hold_schedule=False, completions=4, extra=()
  )
  runs = plan.runs(("staged", "merged"), 1)[0]
  assert [run.name for run in runs] == ["staged, seed 0", "merged, seed 0"]
  assert not any("schedule" in word for run in runs for word in run.command)


def script(name, home, text, needs=()):
  leaves = home / name
  command = (sys.executable, "-c", text.format(leaves=str(leaves)))
  return Run(name=name, command=command, leaves=leaves, needs=needs)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
  good = script("good", tmp_path, "open({leaves!r}, 'w')")
  bad = script("bad", tmp_path, "print('so far'); raise SystemExit('no rows')")
  after = script("after", tmp_path, "open({leaves!r}, 'w')", needs=(bad,))
  last = script("last", tmp_path, "open({leaves!r}, 'w')", needs=(good,))
  with Display(make_console()) as display:
    failed = compare_arms.run_all([good, bad, after, last], display)
  assert list(failed) == ["bad", "after"]
  assert "failed with exit status 1: no rows" in failed["bad"]
  assert str(tmp_path / "bad.log") in failed["bad"]
  assert "so far" in (tmp_path / "bad.log").read_text()
  assert failed["after"] == "not started, for bad failed"
  assert last.finished() and not after.leaves.exists()
  assert "2 of 4: bad: failed" in " ".join(capsys.readouterr().out.split())


def test_a_command_that_has_changed_is_run_again(tmp_path):
  first = script("run", tmp_path, "open({leaves!r}, 'w').write('1')")
  other = script("run", tmp_path, "open({leaves!r}, 'w').write('2')")
  with Display(make_console()) as display:
    compare_arms.run_all([first], display)
    assert first.finished() and not other.finished()
    compare_arms.run_all([other], display)
  assert other.leaves.read_text() == "2"


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--arms=staged,mixed"], "no arm 'mixed'; there are staged, merged"),
    (["--sedes=3"], "unknown flag --sedes=3"),
  ],
)
def test_a_wrong_flag_is_refused_by_name(flags, said, capsys):
  with pytest.raises(SystemExit) as error:
    compare_arms.main(flags)
  assert error.value.code == 2
  assert said in capsys.readouterr().err


def test_a_base_that_is_none_is_refused_in_a_line():
  with pytest.raises(SystemExit, match="compare_arms: staged: no size 'huge'"):
    compare_arms.main(["--base=huge"])


def test_the_docstring_names_the_files_that_are_written(compared):
  root, _ = compared
  words = re.findall(r"comparison\.\w+", compare_arms.__doc__)
  assert words and all((root / word).exists() for word in words)
