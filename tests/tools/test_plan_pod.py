"""The command as one types it, for this machine's own devices."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parents[2]
STAGE = "--config.stages.visual_perception."
EVALUATION = "--config.evaluation."


@pytest.fixture
def plan(tmp_path):
  """plan(flags ...): the finished command, for a model of 0.1 M weights."""
  raw = conftest.TINY["qwen2_5_vl"]
  (tmp_path / "config.json").write_text(json.dumps(raw))

  def run(*flags):
    command = [
      *(
        sys.executable,
        "tools/plan_pod.py",
        "--config=configs/staged.py:files",
      ),
      *(f"--config.model.checkpoint={tmp_path}", "--config.mesh.tensor=2"),
      *("--config.inputs.max_prompt_length=96", "--prompt=24", "--visual=8"),
      *(f"{STAGE}max_completion_length=32", "--completion=16"),
      *(f"{STAGE}rollout_questions=8", f"{STAGE}update_questions=8"),
      *(f"{STAGE}microbatch_tokens=512", f"{STAGE}logprob_chunk=64", *flags),
    ]
    return subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, check=False
    )

  return run


def test_the_command_ends_with_a_verdict_and_its_status_says_it(plan):
  done = plan(
    *("--topology=local", "--json", f"{EVALUATION}num_completions=2"),
    *(
      f"{EVALUATION}capabilities=('visual_perception',)",
      f"{EVALUATION}batch_questions=8",
    ),
    f"{EVALUATION}max_completion_length=32",
  )
  assert done.returncode == 0, done.stdout
  *programs, summary = (
    json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")
  )
  named = {one["program"]: one for one in programs}
  assert {"gradient", "evaluation: decode"} <= named.keys()
  decode = named["decode"]
  assert decode["live"] > decode["peak"]  # the optimizer lies beside
  assert summary["fits"] and summary["step_seconds"] > 0
  assert done.stdout.splitlines()[-1] == summary["verdict"]
  assert summary["verdict"].startswith("fits: 0.0 of 8.0 GiB")


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    ([], "plan_pod: --topology: expected chips, as v5e:4x4"),
    (["--topology=abacus"], "plan_pod: topology: got 'abacus'"),
    (
      ["--topology=local", "--stage=dreaming"],
      "plan_pod: stage: no 'dreaming'",
    ),
    (["--parts=roof"], "jaxvlm: flag --parts=roof"),
    (["--efficiency=2"], "jaxvlm: flag --efficiency=2"),
    (
      ["--config.roof=3"],
      "jaxvlm: --config: no field 'roof'; there are allows",
    ),
    (
      ["--topology=local", "--config.model.checkpoint=/nowhere"],
      "plan_pod: [Errno 2]",
    ),
  ],
)
def test_what_is_wrong_is_refused_in_a_line(plan, flags, told):
  done = plan(*flags)
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith(told), done.stderr
  assert "Traceback" not in done.stderr


def test_a_part_is_not_the_whole(plan):
  done = plan("--topology=local", "--parts=evaluation")
  assert done.returncode == 0, done.stdout
  verdict = done.stdout.splitlines()[-1]
  assert verdict.startswith("fits as far as evaluation goes: 0.0 of 8.0 GiB")
