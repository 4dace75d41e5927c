"""launch_tpu.sh takes a run through what a cloud does to it; gcloud is a fake."""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
POD = ("--name=pod", "--zone=here-a")
WORKDIR = "gs://bucket/run"
FLAGS = (
  "--config=configs/staged.py",
  f"--config.workdir={WORKDIR}",
  "--config.schedule=('a b', \"c\")",
)
DONE = "echo 'step 1'; finish"
STATUS = "--command=bash ~/jaxvlm/run/tree/tools/tpu_worker.sh status"
LONG = "echo 'step 1'; last 30"


def life(*runs, queue=("ACTIVE",), nodes=("READY",)):
  """Of a pod: what its workers run, and what is told of it."""
  return {"runs": runs, "queue": queue, "nodes": nodes}


@dataclasses.dataclass
class Cloud:
  """A repository to launch from, and a directory in place of the cloud."""

  home: pathlib.Path
  repository: pathlib.Path
  path: str = os.environ["PATH"]  # behind the fake's

  def without_gcloud(self):
    """Leaves of the PATH what the launcher begins with."""
    (self.home / "bin" / "gcloud").unlink()
    for name in ("env", "bash", "dirname", "sed", "tail", "git"):
      (self.home / "bin" / name).symlink_to(shutil.which(name))
    self.path = ""

  def play(self, *lives, **more):
    scenario = {"lives": lives, "fails": {}} | more
    (self.home / "scenario.json").write_text(json.dumps(scenario))

  def start(self, *arguments):
    env = os.environ | {
      "FAKE_CLOUD": str(self.home),
      "PATH": f"{self.home / 'bin'}:{self.path}".rstrip(":"),
    }
    return subprocess.Popen(
      # Tests that run in the background ignore it, and so would the launcher.
      [
        "env",
        "--default-signal=INT",
        self.repository / "launch_tpu.sh",
        *arguments,
      ],
      env=env,
      cwd=self.home,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def launch(self, *options, flags=FLAGS):
    """(exit code, stdout, stderr), the latter's lines joined by blanks."""
    arguments = [
      "--poll=0.05",
      *POD,
      *options,
      *(["--", *flags] if flags else []),
    ]
    process = self.start(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, " ".join(err.split())

  @property
  def calls(self):
    file = self.home / "calls.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]

  def called(self, verb):
    return [call for call in self.calls if verb in call]

  def worker(self, worker, life=0, node="pod"):
    return self.home / str(life) / f"{node}-w-{worker}"

  def until(self, condition):
    limit = time.monotonic() + 30
    while not condition():
      assert time.monotonic() < limit
      time.sleep(0.02)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  """With what the launcher needs, committed."""
  home = tmp_path_factory.mktemp("repository")
  (home / "tools").mkdir()
  shutil.copytree(ROOT / "configs", home / "configs")
  for name in ("launch_tpu.sh", "tools/tpu_pod.sh", "tools/tpu_worker.sh"):
    shutil.copy(ROOT / name, home / name)
  git = ("git", "-C", home, "-c", "user.name=x", "-c", "user.email=x@x")
  for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "all")):
    subprocess.run([*git, *command], check=True)
  return home


@pytest.fixture
def cloud(tmp_path, repository):
  program = tmp_path / "bin" / "gcloud"
  program.parent.mkdir()
  fake = pathlib.Path(__file__).with_name("fake_gcloud.py")
  program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {fake} "$@"\n')
  program.chmod(0o755)
  yield Cloud(tmp_path, repository)
  for file in tmp_path.glob("*/*/jaxvlm/run/supervisor"):
    subprocess.run(["pkill", "-s", file.read_text().strip()])


NEW = ("--accelerator=v6e-16", "--spot")


def test_a_pod_is_requested_awaited_and_run_on(cloud):
  waits = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  cloud.play(life(DONE, DONE, queue=waits, nodes=("", "CREATING", "READY")))
  code, out, err = cloud.launch(*NEW, "--project=mine")
  assert code == 0, err
  assert "step 1" in out
  (create,) = cloud.called("create")
  assert create == [
    *("compute", "tpus", "queued-resources", "create", "pod"),
    *("--node-id=pod", "--accelerator-type=v6e-16"),
    *("--runtime-version=v2-alpha-tpuv6e", "--spot"),
    *("--zone=here-a", "--project=mine"),
  ]
  for state in (*waits, "CREATING"):
    assert state in err
  assert f"finished; its results are in {WORKDIR}" in err
  assert "still there, and paid for" in err and not cloud.called("delete")


def test_every_worker_has_the_same_commit_and_flags(cloud):
  cloud.play(life(DONE, DONE))
  assert cloud.launch(*NEW, "--extras=tpu,tfds")[0] == 0
  tree = subprocess.run(
    ["git", "-C", cloud.repository, "rev-parse", "--short=12", "HEAD^{tree}"],
    capture_output=True,
    text=True,
  ).stdout.strip()
  for worker in (0, 1):
    home = cloud.worker(worker)
    argv = (home / "argv").read_text().splitlines()
    assert argv == ["-u", "-m", "jaxvlm.main", *FLAGS]
    files = home / "jaxvlm" / tree
    script = files / "launch_tpu.sh"
    assert script.read_bytes() == (ROOT / "launch_tpu.sh").read_bytes()
    assert f"{files} pip install" in (home / "uv").read_text()
    assert ".[tpu,tfds]" in (home / "uv").read_text()


def test_a_failing_worker_ends_the_run_with_its_code(cloud):
  cloud.play(life(LONG, "echo 'no such file'; exit 3", LONG))
  code, _, err = cloud.launch(*NEW)
  assert code == 3
  assert "pod-w-1 failed with code 3; its log ends with no such file" in err
  for worker in (0, 2):
    log = cloud.worker(worker) / "jaxvlm" / "run" / "log"
    assert "noticed" in log.read_text()
  assert len(cloud.called("create")) == 1


def test_a_preempted_run_goes_on_from_its_checkpoint(cloud):
  lost = ("READY", "READY", "READY", "PREEMPTED")
  cloud.play(life(f"checkpoint 20; {LONG}", LONG, nodes=lost), life(DONE, DONE))
  code, _, err = cloud.launch(*NEW)
  assert code == 0
  assert "PREEMPTED. The run ended early and is taken up after step 20." in err
  verbs = [c[3] for c in cloud.calls if c[3:4] in (["create"], ["delete"])]
  assert verbs == ["create", "delete", "create"]
  (deleted,) = cloud.called("delete")
  assert {"queued-resources", "pod", "--force", "--quiet"} <= set(deleted)
  first, second = cloud.called("create")
  assert first == second
  argv = (cloud.worker(1, life=1) / "argv").read_text().splitlines()
  assert argv[3:] == list(FLAGS)


def test_a_suspended_request_is_a_preemption(cloud):
  states = ("ACTIVE", "ACTIVE", "SUSPENDING")
  cloud.play(life(LONG, queue=states), life(DONE))
  assert cloud.launch(*NEW)[0] == 0
  assert len(cloud.called("create")) == 2


@pytest.mark.parametrize("end", ["exit 0", "exit 1"])
def test_workers_that_end_before_their_pod_were_preempted(cloud, end):
  lost = ("READY", "READY", "READY", "PREEMPTED")
  cloud.play(life(end, end, nodes=lost), life(DONE, DONE))
  assert cloud.launch(*NEW)[0] == 0
  assert len(cloud.called("create")) == 2


def test_a_run_that_ends_well_unfinished_is_taken_up_where_it_is(cloud):
  again = "[[ -e ~/before ]] && finish; touch ~/before"
  cloud.play(life(again))
  code, _, err = cloud.launch(*NEW)
  assert code == 0
  assert "taken up from its start" in err
  assert len(cloud.called("create")) == 1 and not cloud.called("delete")


def test_restarts_without_a_new_checkpoint_are_bounded(cloud):
  cloud.play(life("checkpoint 20"))
  code, _, err = cloud.launch(*NEW, "--max-restarts=1")
  assert code == 1
  # One for the checkpoint that was new, one without.
  assert err.count("taken up after step 20") == 2
  assert "2. time without a new checkpoint" in err


def test_an_existing_tpu_is_neither_made_nor_deleted(cloud):
  cloud.play(life(DONE), existing="pod")
  code, _, err = cloud.launch("--existing")
  assert code == 0
  assert "--delete" not in err
  assert {c[3] for c in cloud.calls if "tpus" in c} == {"list", "ssh", "scp"}
  assert not cloud.called("queued-resources")


def test_an_existing_tpu_that_is_preempted_is_left(cloud):
  cloud.play(life(LONG, nodes=("READY", "PREEMPTED")), existing="pod")
  code, _, err = cloud.launch("--existing")
  assert code == 75
  assert "was not made here" in err


def test_a_request_that_fails_is_told(cloud):
  cloud.play(life(DONE, queue=("CREATING", "FAILED")))
  code, _, err = cloud.launch(*NEW)
  assert code == 1
  assert "state: no capacity" in err and "request for pod failed" in err


def test_a_request_that_is_refused_is_told(cloud):
  cloud.play(life(DONE), fails={"queued-resources create": 1})
  code, _, err = cloud.launch(*NEW)
  assert code == 1
  assert "ERROR" in err and "cannot be requested" in err


def test_an_install_that_fails_is_told_and_nothing_is_started(cloud):
  cloud.play(life(DONE), fails={"tpu-vm scp": 1})
  code, _, err = cloud.launch(*NEW)
  assert code == 1
  assert "cannot be started on pod" in err
  assert not (cloud.worker(0) / "argv").exists()


def test_silence_is_endured_for_some_time(cloud):
  cloud.play(life(DONE), fails={"tpu-vm list": 9})
  assert cloud.launch(*NEW)[0] == 0


def test_a_longer_silence_leaves_the_run(cloud):
  cloud.play(life(DONE), fails={"tpu-vm list": 10})
  code, _, err = cloud.launch(*NEW)
  assert code == 1
  assert "does not say how pod is" in err and not cloud.called("delete")


def test_cleanup_deletes_the_pod_at_the_end(cloud):
  cloud.play(life("exit 4"))
  assert cloud.launch(*NEW, "--cleanup")[0] == 4
  assert cloud.calls[-1][3] == "delete"


def test_delete_deletes_and_runs_nothing(cloud):
  cloud.play(life(DONE))
  assert cloud.launch("--delete", flags=())[0] == 0
  (call,) = cloud.calls
  assert call[2:5] == ["queued-resources", "delete", "pod"]


def test_slices_are_nodes_of_one_request(cloud):
  cloud.play(life(DONE, nodes=("READY", "READY\nREADY")))
  code, _, err = cloud.launch(*NEW, "--slices=2")
  assert code == 0, err
  (create,) = cloud.called("create")
  assert {"--node-count=2", "--node-prefix=pod"} <= set(create)
  for node in ("pod-0", "pod-1"):
    assert (cloud.worker(0, node=node) / "argv").exists()


def begin(cloud, times=1):
  """Starts a run and waits until it is followed, for so many-th time."""
  process = cloud.start("--poll=0.05", *POD, *NEW, "--", *FLAGS)
  follow = STATUS.replace("status", "follow")
  cloud.until(lambda: sum(follow in call for call in cloud.calls) == times)
  return process


WAITING = "echo 'step 1'; until [[ -e ~/go ]]; do sleep 0.05; done; finish"


def test_ctrl_c_leaves_the_run_and_the_same_command_follows_it(cloud):
  cloud.play(life(WAITING))
  process = begin(cloud)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert "left pod and its run" in err and "--delete" in err
  process = begin(cloud, times=2)
  (cloud.worker(0) / "go").touch()
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and "step 1" in out
  argv = (cloud.worker(0) / "argv").read_text().splitlines()
  assert argv.count("jaxvlm.main") == 1  # it was not started again
  assert len(cloud.called("create")) == 1


def test_another_run_on_the_pod_is_not_disturbed(cloud):
  cloud.play(life(WAITING))
  process = begin(cloud)
  code, _, err = cloud.launch(*NEW, flags=(*FLAGS, "--config.seed=1"))
  assert code == 1
  assert "another run is on" in err
  (cloud.worker(0) / "go").touch()
  process.communicate(timeout=60)
  assert process.returncode == 0


def test_stop_ends_the_run_and_what_follows_it(cloud):
  cloud.play(life(LONG, LONG))
  process = begin(cloud)
  code, out, _ = cloud.launch("--status", flags=())
  assert code == 0
  assert out.splitlines() == ["pod-w-0 running", "pod-w-1 running"]
  assert cloud.launch("--stop", flags=())[0] == 0
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0
  assert "noticed" in out and "stopped as asked" in err
  assert len(cloud.called("create")) == 1


def test_a_dry_run_prints_every_command_and_calls_none(cloud):
  code, out, err = cloud.launch(*NEW, "--dry-run", "--cleanup")
  assert code == 0, err
  assert not cloud.calls
  verbs = [line.split()[3:5] for line in out.splitlines() if "tpus" in line]
  told = [" ".join(pair) for pair in verbs]
  once = ["queued-resources create", "tpu-vm scp", "tpu-vm ssh"]
  for verb in (*once, "queued-resources list", "tpu-vm list"):
    assert told.count(verb) >= 2  # before and after a preemption
  assert told.count("queued-resources delete") == 2
  assert f"gcloud storage ls '{WORKDIR}/checkpoints/*/seal.json'" in out
  assert "git -C" in out


def test_a_dry_run_of_slices_prints_whole_commands_and_waits_for_nothing(cloud):
  began = time.monotonic()
  code, out, err = cloud.launch(*NEW, "--dry-run", "--slices=3", "--poll=60")
  assert code == 0, err
  assert time.monotonic() - began < 30
  lines = out.splitlines()
  assert {line.split()[0] for line in lines} == {"gcloud", "git"}
  assert not [line for line in lines if " gcloud " in line]
  for node in ("pod-0", "pod-1", "pod-2"):
    assert [line for line in lines if f"tpu-vm ssh {node} " in line]
  assert "nothing was run" in err and "paid for" not in err


def test_a_machine_without_gcloud_is_told_at_once(cloud):
  cloud.without_gcloud()
  code, _, err = cloud.launch(*NEW)
  assert code == 1
  assert "gcloud is not on PATH" in err


def documented():
  """The launcher's commands in the documents."""
  text = "".join(
    (ROOT / name).read_text().replace("\\\n", " ")
    for name in ("README.md", "docs/pods.md")
    if (ROOT / name).exists()
  )
  lines = [line.strip() for line in text.splitlines() if line[:4] == 4 * " "]
  return [shlex.split(x)[1:] for x in lines if x.startswith("./launch_tpu.sh")]


def test_the_commands_of_the_documents_are_taken(cloud):
  commands = documented()
  assert commands
  for command in commands:
    process = cloud.start("--dry-run", "--poll=0.01", *command)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "gcloud compute tpus" in out and not cloud.calls


@pytest.mark.parametrize(
  "options, flags, why",
  [
    (("--name=Pod", *NEW), FLAGS, "--name: got 'Pod'"),
    (("--zone=", *NEW), FLAGS, "--zone"),
    ((), FLAGS, "--accelerator"),
    (("--accelerator=v9-8",), FLAGS, "--runtime: none is known for 'v9-8'"),
    (("--accelerator=v5e-16",), FLAGS, "gcloud calls v5e-16 v5litepod-16"),
    (("--sport", *NEW), FLAGS, "--sport: no such option"),
    (("--status", "--stop"), (), "--stop: got --status too"),
    (("--config=configs/staged.py", *NEW), (), "come after --"),
    (NEW, (), "no run"),
    (NEW, FLAGS[:1], "expected --config.workdir=gs://BUCKET/DIRECTORY"),
    (("--existing", *NEW), FLAGS, "--existing takes a TPU as it is"),
    (("--existing", "--delete"), (), "not deleted here"),
    (("--stop",), FLAGS, "--stop takes no flags"),
    (("--poll=soon", *NEW), FLAGS, "--poll: got 'soon'"),
    (("--slices=0", *NEW), FLAGS, "--slices: got '0'"),
    (("--max-restarts=-1", *NEW), FLAGS, "--max-restarts: got '-1'"),
    (("--max-restarts=08", *NEW), FLAGS, "--max-restarts: got '08'"),
    (("--existing",), FLAGS[:1], "--config.workdir: got ''"),
    *(
      (("--existing",), (*FLAGS, f"--config.workdir={where}"), f"got '{where}'")
      for where in ("runs/x", "~/x", "s3://bucket/x")
    ),
    (NEW, (*FLAGS, "--config=no.py:size"), "--config: got 'no.py'"),
    (NEW, (*FLAGS, "--config=configs"), "--config: got 'configs'"),
  ],
)
def test_a_mistake_is_told_before_anything_is_done(cloud, options, flags, why):
  code, _, err = cloud.launch(*options, flags=flags)
  assert code == 2
  assert why in err
  assert not cloud.calls


@pytest.mark.parametrize("options", [("--existing",), NEW])
def test_a_workdir_of_this_machine_is_taken_if_that_is_said(
  cloud, tmp_path, options
):
  workdir = tmp_path / "my run"
  mine = f"mkdir -p '{workdir}/hf'; touch '{workdir}/hf/config.json'"
  cloud.play(life(mine), **({} if options == NEW else {"existing": "pod"}))
  code, _, err = cloud.launch(
    *(*options, "--max-restarts=0"),
    flags=(FLAGS[0], f"--config.workdir={workdir}/"),
  )
  assert code == 0, err
  assert f"finished; its results are in {workdir}" in err


def test_slashes_that_name_nothing_hide_no_results(cloud):
  cloud.play(life(DONE))
  flags = (FLAGS[0], "--config.workdir=gs://bucket//run//")
  code, _, err = cloud.launch(*NEW, "--max-restarts=0", flags=flags)
  assert code == 0, err
  assert f"finished; its results are in {WORKDIR}." in err


def test_a_dirty_tree_is_refused_unless_asked_for(cloud, tmp_path):
  cloud.repository = shutil.copytree(cloud.repository, tmp_path / "dirty")
  (cloud.repository / "mine.py").write_text("x = 1\n")
  cloud.play(life(DONE))
  code, _, err = cloud.launch(*NEW)
  assert code == 2
  assert "?? mine.py" in err and "--dirty" in err
  assert not cloud.calls
  assert cloud.launch(*NEW, "--dirty")[0] == 0
  (file,) = cloud.worker(0).glob("jaxvlm/*/mine.py")
  assert file.read_text() == "x = 1\n"
  status = ["git", "-C", cloud.repository, "status", "--porcelain"]
  assert subprocess.check_output(status, text=True) == "?? mine.py\n"
