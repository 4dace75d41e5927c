"""The files of docs/clusters do what they say, with stand-ins for the cluster."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from jaxvlm import main

ROOT = pathlib.Path(__file__).parents[1]
CLUSTERS = ROOT / "docs" / "clusters"
SIZE = "--config=configs/staged.py:qwen2_5_vl_7b"

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")

# Notes how it was called; a run of jaxvlm then does what the test says.
PYTHON = """#!/bin/bash
[[ $1 == -c ]] && exec {python} "$@"
printf '%s\\n' "$@" >argv
{script}
"""
FINISH = 'mkdir -p "$PWD/run/hf"; touch "$PWD/run/hf/config.json"'


def read(name):
  return list(yaml.safe_load_all((CLUSTERS / name).read_text()))


def stand_in(place, script, python=".venv/bin/python"):
  """A project whose Python plays a run by this script."""
  file = place / python
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(PYTHON.format(python=sys.executable, script=script))
  file.chmod(0o755)


def program(place, name, script):
  file = place / name
  file.write_text(f"#!/bin/bash\n{script}\n")
  file.chmod(0o755)


def argv(place):
  return (place / "argv").read_text().splitlines()


def check_flags(arguments):
  """jaxvlm.main takes them all; gives its config."""
  assert arguments[:3] == ["-u", "-m", "jaxvlm.main"]
  config = [a for a in arguments if a.startswith("--config")]
  own = flags.FLAGS.flags_by_module_dict()[main.__name__]
  for other in set(arguments[3:]) - set(config):
    name = re.fullmatch(r"--(\w+)=.+", other)[1]
    assert name in {flag.name for flag in own}
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setattr("sys.argv", ["main", *config])  # where ml_collections looks
    values(["main", *config])
  return values.config


# -- Slurm ---------------------------------------------------------------------


def slurm(place, script):
  stand_in(place, script)
  program(place, "srun", 'echo "$1" >step; exec "${@:2}"')
  program(place, "scontrol", 'echo "$@" >queue')
  return subprocess.run(
    [CLUSTERS / "slurm.sh", SIZE],
    cwd=place,
    env=os.environ
    | {
      "PATH": f"{place}:{os.environ['PATH']}",
      "WORKDIR": f"{place}/run",
      "SLURM_JOB_ID": "7",
    },
  ).returncode


def test_slurm_runs_the_flags_on_all_nodes_of_the_step(tmp_path):
  assert slurm(tmp_path, FINISH) == 0
  assert (tmp_path / "step").read_text() == "--kill-on-bad-exit=1\n"
  assert check_flags(argv(tmp_path)).workdir == f"{tmp_path}/run"
  assert not (tmp_path / "queue").exists()


def test_slurm_queues_a_run_again_that_is_not_finished(tmp_path):
  assert slurm(tmp_path, "exit 0") == 0
  assert (tmp_path / "queue").read_text() == "requeue 7\n"


def test_slurm_lets_a_run_that_failed_be(tmp_path):
  assert slurm(tmp_path, "exit 3") == 3
  assert not (tmp_path / "queue").exists()


def test_slurm_starts_one_process_a_node_and_signals_it():
  options = re.findall(r"#SBATCH (\S+)", (CLUSTERS / "slurm.sh").read_text())
  assert {"--ntasks-per-node=1", "--signal=TERM@600", "--requeue"} <= {*options}


# -- SkyPilot ------------------------------------------------------------------


def sky(place, script):
  (task,) = read("skypilot.yaml")
  stand_in(place, script)
  return subprocess.run(
    ["bash", "-c", task["run"]],
    cwd=place,
    env=os.environ
    | {
      "BUCKET": str(place),
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NUM_NODES": "2",
      "SKYPILOT_NODE_RANK": "1",
    },
  ).returncode


def test_sky_tells_each_node_of_the_others(tmp_path):
  done = FINISH.replace("run/", "runs/staged/")
  assert sky(tmp_path, done) == 0
  config = check_flags(argv(tmp_path))
  assert config.workdir == f"{tmp_path}/runs/staged"
  assert {
    "--coordinator_address=10.0.0.1:8476",
    "--num_processes=2",
    "--process_id=1",
  } <= set(argv(tmp_path))


@pytest.mark.parametrize("script, code", [("exit 0", 75), ("exit 3", 3)])
def test_sky_recovers_a_run_that_saved_and_no_other(tmp_path, script, code):
  (task,) = read("skypilot.yaml")
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
  assert sky(tmp_path, script) == code


# -- Kubernetes ----------------------------------------------------------------


def pod():
  job = read("jobset.yaml")[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]
  return job, job["template"]["spec"]


def kubernetes(place, script):
  container = pod()[1]["containers"][0]
  stand_in(place, script, python="python")
  return subprocess.Popen(
    [*container["command"], *container["args"]],
    cwd=place,
    env=os.environ
    | {
      "PATH": f"{place}:{os.environ['PATH']}",
      "WORKDIR": f"{place}/run",
    },
  )


@pytest.mark.parametrize(
  "script, code", [(FINISH, 0), ("exit 0", 75), ("exit 3", 3)]
)
def test_a_pod_succeeds_only_when_the_run_is_finished(tmp_path, script, code):
  assert kubernetes(tmp_path, script).wait(timeout=30) == code
  assert check_flags(argv(tmp_path)).workdir == f"{tmp_path}/run"


def test_a_pod_hands_its_signal_on_and_waits(tmp_path):
  script = "trap 'sleep 0.2; touch saved; exit 0' TERM; touch up; while :; do sleep 0.05; done"
  process = kubernetes(tmp_path, script)
  limit = time.monotonic() + 30
  while not (tmp_path / "up").exists():
    assert time.monotonic() < limit
    time.sleep(0.02)
  process.terminate()
  assert process.wait(timeout=30) == 75
  assert (tmp_path / "saved").exists()


def test_the_hosts_of_a_jobset_can_find_each_other():
  *_, jobset = documents = read("jobset.yaml")
  job, spec = pod()
  assert job["completionMode"] == "Indexed"
  assert job["parallelism"] == job["completions"] > 1
  assert job["backoffLimit"] == 0 and jobset["spec"]["failurePolicy"]
  by_kind = {one["kind"]: one for one in documents}
  assert (
    spec["serviceAccountName"] == by_kind["ServiceAccount"]["metadata"]["name"]
  )
  (subject,) = by_kind["RoleBinding"]["subjects"]
  assert subject["name"] == spec["serviceAccountName"]
  assert (
    by_kind["RoleBinding"]["roleRef"]["name"]
    == by_kind["Role"]["metadata"]["name"]
  )
  allowed = {
    (name, verb)
    for rule in by_kind["Role"]["rules"]
    for name in rule["resources"]
    for verb in rule["verbs"]
  }
  assert {("pods", "list"), ("jobs", "get")} <= allowed
  assert spec["terminationGracePeriodSeconds"] >= 600
  assert "jax[k8s]" in (CLUSTERS / "Dockerfile").read_text()
