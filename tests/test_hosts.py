"""Several processes, and meshes of every shape, run as one device does."""

import json
import os
import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax._src import clusters

from jaxvlm import hosts
from jaxvlm.metrics import read_records
from tests.runs import (  # noqa: F401
  ROOT,
  STOPPING,
  launch_fixture,
  project_fixture,
  write_checkpoint,
)

SCRIPT = ROOT / "tests" / "recorded.py"
# Data, fsdp, tensor; and the processes that share the devices.
MESHES = {
  "one": ((1, 1, 1), 1),
  "data": ((8, 1, 1), 1),
  "fsdp": ((1, 8, 1), 1),
  "mixed": ((2, 2, 2), 1),
  "tensor": ((1, 1, 8), 1),
  "hosts": ((2, 2, 2), 2),
}
PAIR = ((2, 1, 1), 2)  # is only disturbed
EVALUATED = ("one", "hosts")
SLOTS = 16  # a question of four completions in each of four data shards
# Two steps of one stage, with pictures and without anything that costs time.
SMALL = (
  "schedule=('perceive',)",
  "stages.perceive.steps=2",
  "stages.perceive.updates_per_rollout=1",
  "stages.perceive.kl_coef=0.0",
  "stages.perceive.metric=",
  "stages.perceive.promote=latest",
  "limits.blind_every=0",
  "log.tensorboard=False",
  "checkpoint.keep_last=3",
)


SRUN = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "127.0.0.1",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}


@pytest.fixture(scope="session")
def eight_heads(tmp_path_factory):
  """A checkpoint whose heads eight devices share; two of keys and values."""
  directory = tmp_path_factory.mktemp("checkpoint") / "eight"
  write_checkpoint(directory, heads=8, layers=1)
  return f"model.checkpoint={directory}"


@pytest.fixture(scope="session", name="begin")
def begin_fixture(launch, project, eight_heads):
  """begin(mesh, workdir, *argv, **env): the processes of a run on that mesh."""

  def begin(mesh, workdir, *argv, join=by_flags, **env):
    # The same rows in each step: the same shapes.
    rows = f"stages.perceive.data.rows.path={project / 'held_out.parquet'}"
    sizes, hosts = PAIR if mesh == "pair" else MESHES[mesh]
    count = int(np.prod(sizes)) // hosts
    flags = f" --xla_force_host_platform_device_count={count}"
    env["XLA_FLAGS"] = launch.env["XLA_FLAGS"] + flags
    if mesh != "one":
      env["NARROWEST"] = "4"
    slots = SLOTS if mesh in ("mixed", "hosts") else 0
    axes = zip(("data", "fsdp", "tensor"), sizes, strict=True)
    shape = [f"mesh.{axis}={size}" for axis, size in axes]
    every = f"checkpoint.every={1 if mesh == 'mixed' else 2}"
    asked = ("perceive",) if mesh in EVALUATED else ()
    argv = (
      *SMALL,
      every,
      f"evaluation.capabilities={asked}",
      rows,
      eight_heads,
      f"sampler.slots={slots}",
      f"workdir={workdir}",
      *shape,
      *argv,
    )
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    processes = []
    for host in range(hosts):
      flags, found = join(port, hosts, host) if hosts > 1 else ((), {})
      processes.append(launch(*argv, *flags, script=SCRIPT, **env, **found))
    return processes

  return begin


def by_flags(port, hosts, host):
  """What tells a process of the others: flags and environment."""
  return (
    f"--coordinator_address=127.0.0.1:{port}",
    f"--num_processes={hosts}",
    f"--process_id={host}",
  ), {}


def by_srun(port, hosts, host):
  return (), SRUN | {
    "SLURM_NTASKS": str(hosts),
    "SLURM_PROCID": str(host),
    "JAX_COORDINATOR_PORT": str(port),
  }


def finish(processes):
  """What the first of them printed; all succeed."""
  ends = [process.wait() for process in processes]
  for status, _, err in ends:
    assert status == 0, err
  return ends[0][1]


def sampled(workdir):
  """By step and question: ids, mask and logprobs [G C]."""
  found = {}
  for file in sorted((workdir / "sampled").glob("*.npz")):
    step = file.name.partition(".")[0]
    with np.load(file) as arrays:
      for q, question in enumerate(arrays["questions"]):
        found[step, int(question)] = [
          arrays[name][q] for name in ("ids", "mask", "logprobs")
        ]
  return found


def weights(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def distance(a, b):
  """Between two trees of weights; an empty one is 0 everywhere."""
  return sum(np.square(a[n] - b.get(n, 0)).sum() for n in a) ** 0.5


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, begin):
  """The workdir of two processes, one of which got a SIGTERM in the last step,
  and the ends of both: status, stdout, stderr."""
  workdir = tmp_path_factory.mktemp("stopped") / "run"
  processes = begin("hosts", workdir, MISHAP="1 1 stop")
  ends = [process.wait() for process in processes]
  return workdir, ends


@pytest.fixture(scope="session")
def finished(tmp_path_factory, begin, stopped):
  """The workdirs of finished runs on all meshes, by name."""
  home = tmp_path_factory.mktemp("meshes")
  workdirs = {mesh: home / mesh for mesh in MESHES}
  shutil.copytree(stopped[0], workdirs["hosts"])
  for mesh, workdir in workdirs.items():
    told = finish(begin(mesh, workdir, join=by_srun))
    workdir.with_suffix(".out").write_text(told)
  return workdirs


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "one"])
def test_a_mesh_samples_the_same_tokens_and_learns_the_same(
  finished, eight_heads, mesh
):
  """Weights differ by less than a ten-thousandth of the way that they went."""
  one, other = sampled(finished["one"]), sampled(finished[mesh])
  assert one.keys() == other.keys() and len(one) == 16
  for question, (ids, mask, logprobs) in one.items():
    np.testing.assert_array_equal(other[question][0], ids)
    np.testing.assert_array_equal(other[question][1], mask)
    np.testing.assert_allclose(other[question][2], logprobs, atol=1e-4)
  start = weights(pathlib.Path(eight_heads.partition("=")[2]))
  end, got = weights(finished["one"] / "hf"), weights(finished[mesh] / "hf")
  assert distance(end, got) < 1e-4 * distance(start, end)


def test_hosts_answer_as_one_device_and_record_the_same(finished):
  """A greedy and a sampled evaluation, and the step before any update."""
  (start, step, *_), (start_8, step_8, *_) = (
    read_records(finished[mesh] / "metrics.jsonl") for mesh in EVALUATED
  )
  assert start["kind"] == "eval" and start["metrics"] == start_8["metrics"]
  for name in ("reward", "accuracy", "length", "truncated", "live_groups"):
    assert step["metrics"][name] == step_8["metrics"][name]
  one, hosts = (
    (finished[mesh] / "samples.jsonl").read_bytes() for mesh in EVALUATED
  )
  assert one == hosts


def test_the_start_says_what_each_device_holds_whole(finished):
  told = {
    mesh: finished[mesh].with_suffix(".out").read_text() for mesh in MESHES
  }
  whole = "2 of 'kv_heads' do not divide among 'tensor'; each device holds them"
  assert [mesh for mesh, text in told.items() if whole in text] == ["tensor"]


def resumed(finished, mesh, workdir):
  """A finished run of two steps, as it was after the first."""
  shutil.copytree(finished[mesh], workdir)
  for name in ("hf", "checkpoints/2", "sampled"):
    shutil.rmtree(workdir / name)
  return workdir


def test_a_checkpoint_goes_on_bit_for_bit_on_its_mesh(
  finished, begin, tmp_path
):
  workdir = resumed(finished, "mixed", tmp_path / "run")
  finish(begin("mixed", workdir))
  assert_same_bits(weights(workdir / "hf"), weights(finished["mixed"] / "hf"))


def test_a_checkpoint_goes_on_on_another_mesh_and_says_so(
  finished, begin, tmp_path
):
  workdir = resumed(finished, "mixed", tmp_path / "run")
  # It is the checkpoint that knows: a config may leave sizes open.
  config = json.loads((workdir / "config.json").read_text())
  config["mesh"] |= {"data": 8, "fsdp": 1, "tensor": 1}
  (workdir / "config.json").write_text(json.dumps(config))
  (process,) = begin("data", workdir, "checkpoint.every=1")
  status, out, err = process.wait()
  assert status == 0, err
  assert (
    "Another mesh, so not bit for bit from here on: data: 2 -> 8, fsdp: 2 -> 1, "
    "tensor: 2 -> 1." in out
  )
  assert "Resumed after 1 steps." in out
  before, after = (weights(w / "hf") for w in (finished["mixed"], workdir))
  assert 0 < distance(before, after) < 1e-4 * distance(before, {})


def assert_same_bits(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_sigterm_on_one_host_ends_the_step_of_all(stopped):
  """`finished` goes on from there, and is as if nothing had been."""
  workdir, ends = stopped
  for status, out, err in ends:
    assert status == 0, err
    assert (
      "Stopped by SIGTERM after 2 steps, which are saved; the same command "
      "goes on."
    ) in out
  own = {file.name for file in (workdir / "checkpoints/2/host").iterdir()}
  assert own >= {"0-of-2", "1-of-2"}
  assert not (workdir / "hf").exists()


def test_a_sigterm_on_one_host_ends_all_while_they_prepare(begin, tmp_path):
  file, began = tmp_path / "stopping.py", time.monotonic()
  file.write_text(STOPPING)
  rows = f"stages.perceive.data.rows.source={file}:source"
  ends = [p.wait() for p in begin("hosts", tmp_path / "run", rows)]
  assert [status for status, _, _ in ends] == [0, 0], ends
  (_, _, heard), (_, said, _) = ends
  assert "process 1 has ended: Stopped by SIGTERM before it was under" in heard
  assert "Stopped by SIGTERM before it was under way" in said
  assert time.monotonic() - began < 50


def test_a_sigterm_ends_a_host_that_waits_for_the_first(launch):
  with socket.create_server(("127.0.0.1", 0)) as first:
    flags, _ = by_flags(first.getsockname()[1], 2, 1)
    waiting = launch(*flags)
    connection, _ = first.accept()  # which never answers
    os.kill(waiting.pid, signal.SIGTERM)
    status, out, err = waiting.wait()
    connection.close()
  assert status == 0, err
  assert "Stopped by SIGTERM before it was under way; the same command" in out


@pytest.mark.parametrize(
  ("mishap", "told"),
  [
    ("fail", "process 1 failed: KeyError: 'no such picture'"),
    ("sleep", "waited 2 s for process 1, which may hang or be slow"),
  ],
)
def test_one_host_that_fails_or_hangs_ends_all_within_a_bound(
  begin, tmp_path, mishap, told
):
  processes = begin(
    "hosts", tmp_path, "limits.host_wait=2", MISHAP=f"1 0 {mishap}"
  )
  (first, second), began = processes, time.monotonic()
  status, _, err = first.wait()
  assert (status, told in err) == (1, True), err
  status, _, err = second.wait()
  assert (status, told.partition(": ")[2] in err) == (1, True), err
  assert time.monotonic() - began < 50


SILENT = "jaxvlm: process 1 gave no sign of life for 5 s (limits.heartbeat);"


@pytest.mark.parametrize(
  ("mesh", "killed", "where", "told", "lines"),
  [
    ("hosts", 1, "0", SILENT, 1),
    ("hosts", 1, "update", SILENT, 1),
    # What both compute fails at once, and says so first.
    ("pair", 1, "update", SILENT, 2),
    # jax aborts the others when the first is gone.
    ("hosts", 0, "0", "leader task was preempted/died", None),
  ],
)
def test_a_killed_host_is_missed_within_a_bound(
  begin, tmp_path, mesh, killed, where, told, lines
):
  """On a machine that is free it takes 6 s, and 0.3 s for the first."""
  processes = begin(
    mesh,
    tmp_path,
    "limits.heartbeat=5",
    "evaluation.capabilities=()",
    MISHAP=f"{killed} {where} kill",
  )
  assert processes.pop(killed).wait()[0] == -signal.SIGKILL
  since = time.monotonic()
  (left,) = processes
  status, _, err = left.wait()
  assert status != 0 and told in err, err
  assert time.monotonic() - since < 30
  assert lines in (None, len(err.strip().splitlines())), err


class Client:
  """What the coordinator is asked for signs of life, and what it answers."""

  def __init__(self):
    self.said = {}

  def key_value_dir_get(self, place):
    return [(f"{place}/{i:06}", what) for i, what in self.said.items()]


def test_silence_is_counted_in_looks_and_ends_with_a_word(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(hosts, "_silence", 3 * hosts._LISTEN)
  client, others, found = Client(), hosts._Others(), []
  client.said[3] = hosts._DONE
  for look in range(6):
    client.said[0] = str(look)
    if look < 2:
      client.said[1] = str(look)
    found.append(others.silent(client))
  assert found == [[], [], [2], [2], [1, 2], [1, 2]]
  client.said[1] = "6"
  client.said[0] = "6"
  assert others.silent(client) == [2]


@pytest.fixture
def joined(monkeypatch):
  """joined(*arguments, **environment): what jax is told then; None: nothing."""
  for name in list(os.environ):
    if name.startswith(("KUBERNETES_", "JOB_COMPLETION", "SLURM_")):
      monkeypatch.delenv(name)

  def joined(*arguments, **environment):
    told = []
    monkeypatch.setattr(
      jax.distributed,
      "initialize",
      lambda *given, **options: told.append((given, options)),
    )
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    hosts.join(*arguments, heartbeat=60.0)
    return told[0] if told else None

  return joined


NOTHING = (None, None, None)


@pytest.mark.parametrize(
  ("environment", "several"),
  [
    ({}, False),
    (SRUN, True),
    (SRUN | {"SLURM_NTASKS": "1"}, False),
    # sbatch's own script, outside srun.
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    (
      {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
      True,
    ),
  ],
)
def test_the_cluster_around_is_found_where_there_is_one(
  joined, environment, several
):
  told = joined(*NOTHING, **environment)
  assert (told is not None) == several
  if several:
    assert told[0] == NOTHING and told[1]["cluster_detection_method"] is None


@pytest.mark.parametrize(
  ("count", "platforms", "several"),
  [(4, "tpu,cpu", True), (1, "tpu,cpu", False), (4, "cpu", False)],
)
def test_the_hosts_of_a_tpu_pod_are_found(
  joined, monkeypatch, count, platforms, several
):
  pod = clusters.GkeTpuCluster
  monkeypatch.setattr(pod, "is_env_present", lambda: True)
  monkeypatch.setattr(pod, "get_process_count", lambda: count)
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  assert (joined(*NOTHING) is not None) == several


def test_flags_go_before_what_is_found_and_one_process_is_alone(joined):
  given = ("10.0.0.1:1234", 2, 1)
  told, options = joined(*given, **SRUN)
  assert told == given
  assert options["cluster_detection_method"] == "deactivate"
  # Else jax takes the signal, and what loads its rows cannot be ended.
  assert not jax.config.values["jax_enable_preemption_service"]
  # Half of it is what jax may take to abort; before that, hosts are told.
  assert options["heartbeat_timeout_seconds"] > 2 * (60 + hosts._LINGER)
  assert joined(None, 1, None) is None
  with pytest.raises(ValueError, match="expected all three, or none where"):
    joined("10.0.0.1:1234", None, 1)


@pytest.mark.parametrize("address", ["", "nonsense", "host:", ":1", "host:x"])
def test_an_address_without_host_or_port_is_refused(joined, address):
  told = f"got '{address}'; expected HOST:PORT of process 0"
  with pytest.raises(ValueError, match=told):
    joined(address, 2, 0)
  assert joined("[::1]:1234", 2, 0) is not None


@pytest.mark.parametrize(
  ("tasks", "gpus", "taken"),
  [("1(x2)", "4", [0, 1, 2, 3]), ("4(x2)", "4", None), ("1(x2)", "1", None)],
)
def test_one_process_of_a_slurm_node_takes_all_its_gpus(
  joined, tasks, gpus, taken
):
  node = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": gpus}
  assert joined(*NOTHING, **SRUN, **node)[1]["local_device_ids"] == taken


def test_what_jax_cannot_find_is_told_with_the_remedy(joined, monkeypatch):
  def fail(*_, **__):
    raise ValueError("coordinator_address should be defined.")

  joined(None, 1, None)
  monkeypatch.setattr(jax.distributed, "initialize", fail)
  monkeypatch.setattr(hosts, "_surrounded", lambda: True)
  with pytest.raises(ValueError, match=r"cannot be joined: .*jax\[k8s\]"):
    hosts.join(None, None, None, heartbeat=60.0)
  with pytest.raises(ValueError, match=r"defined\. --num_processes=1 runs al"):
    hosts.join("10.0.0.1:1234", 2, 1, heartbeat=60.0)
