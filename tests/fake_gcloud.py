"""A cloud of TPUs in a directory, for tests of launch_tpu.sh: its gcloud.

FAKE_CLOUD names the directory. scenario.json there has
  existing: the name of a TPU that is there from the start, in the first life
  lives: of each pod that is created, one after the other:
    queue: states of its queued resource, one for each look; the last one stays
    nodes: states of its TPU, likewise, "" for none; from the first look on at
      which the queue is ACTIVE
    runs: the shell script that each worker has for a run of jaxvlm
  fails: {"GROUP VERB": how often that command fails at first}
calls.jsonl has the arguments of each call, gs the bucket's objects, and
LIFE/NODE-w-N the home directory of each worker, gone with the pod. Runs find
helpers there: `checkpoint STEP`, `finish`, `last N` (alive until SIGTERM).
"""

import json
import os
import sys

# Few imports: it is started some thirty times in a test.
CLOUD = os.environ["FAKE_CLOUD"]
STATE = f"{CLOUD}/state.json"

RUN = """
checkpoint() {{
  mkdir -p {gs}/run/checkpoints/$1; touch {gs}/run/checkpoints/$1/seal.json; }}
finish() {{ mkdir -p {gs}/run/hf; touch {gs}/run/hf/config.json; }}
last() {{ trap 'echo noticed; exit 0' TERM
  for ((i = 0; i < 20 * $1; i++)); do sleep 0.05; done; }}
{script}
"""
# What uv makes of a tree: a Python that knows jaxvlm alone.
UV = """#!/bin/bash
echo "$PWD $*" >>~/uv
[[ $1 == venv ]] || exit 0
mkdir -p .venv/bin
cp ~/python .venv/bin/python
"""
PYTHON = """#!/bin/bash
printf '%s\\n' "$@" >>~/argv
exec bash ~/run.sh
"""


def main(arguments):
  with open(f"{CLOUD}/calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\n")
  words = [a for a in arguments if a[0] != "-"]
  flags = dict(a.partition("=")[::2] for a in arguments if a[0] == "-")
  if words[:2] == ["storage", "ls"]:
    return list_objects(words[2])
  scenario = json.loads(read(f"{CLOUD}/scenario.json"))
  state = {"life": -1, "alive": False, "looks": {}, "failed": {}}
  if os.path.exists(STATE):
    state |= json.loads(read(STATE))
  command = " ".join(words[2:4])
  if state["failed"].get(command, 0) < scenario["fails"].get(command, 0):
    state["failed"][command] = state["failed"].get(command, 0) + 1
    write(STATE, json.dumps(state))
    sys.exit(f"ERROR: (gcloud) {command}: no answer")
  status = COMMANDS[command](scenario, state, words[4:], flags)
  if command.split()[1] not in ("ssh", "scp"):  # these are many at once
    write(STATE, json.dumps(state))
  return status


def create(scenario, state, words, flags):
  state |= {"life": state["life"] + 1, "alive": True, "looks": {}}
  count = int(flags.get("--node-count", 1))
  prefix = flags.get("--node-prefix")
  nodes = [f"{prefix}-{i}" for i in range(count)] if prefix else words
  for node in nodes:
    make_workers(scenario, state, node)


def make_workers(scenario, state, node):
  for worker, script in enumerate(life(scenario, state)["runs"]):
    home = home_of(state, node, worker)
    os.makedirs(f"{home}/bin")
    write(f"{home}/run.sh", RUN.format(gs=f"{CLOUD}/gs", script=script))
    for name, text in (("bin/uv", UV), ("python", PYTHON)):
      write(f"{home}/{name}", text)
      os.chmod(f"{home}/{name}", 0o755)


def delete(scenario, state, words, flags):
  state["alive"] = False
  shut_down(state)


def shut_down(state):
  """Takes the machines away, and what runs on them."""
  import contextlib
  import glob
  import shutil

  for home in glob.glob(f"{CLOUD}/{state['life']}/*"):
    for name in ("supervisor", "pid"):
      if os.path.exists(file := f"{home}/jaxvlm/run/{name}"):
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(read(file)), 9)
    shutil.rmtree(home)


def list_queue(scenario, state, words, flags):
  assert flags["--format"] == "value(state.state)"
  if state["alive"]:
    print(look(scenario, state, "queue"))


def list_nodes(scenario, state, words, flags):
  assert flags["--format"] == "value(state)"
  if "existing" in scenario and state["life"] < 0:
    state |= {"life": 0, "alive": True}
    make_workers(scenario, state, scenario["existing"])
  if state["alive"] and (told := look(scenario, state, "nodes")):
    print(told)
    if told == "PREEMPTED":
      shut_down(state)


def look(scenario, state, kind):
  states = life(scenario, state)[kind]
  at = state["looks"].get(kind, 0)
  state["looks"][kind] = at + 1
  return states[min(at, len(states) - 1)]


def ssh(scenario, state, words, flags):
  status = 0
  for worker in chosen(scenario, state, flags):
    home = home_of(state, words[0], worker)
    if not os.path.exists(home):
      return 255
    env = {
      "HOME": home,
      "HOSTNAME": os.path.basename(home),
      "PATH": f"{home}/bin:{os.environ['PATH']}",
    }
    command = ["bash", "-c", flags["--command"]]
    status = os.spawnvpe(os.P_WAIT, "bash", command, env) or status
  return status


def scp(scenario, state, words, flags):
  *files, place = words
  for worker in chosen(scenario, state, flags):
    home = home_of(state, place.removesuffix(":"), worker)
    os.spawnvp(os.P_WAIT, "cp", ["cp", *files, home])


def chosen(scenario, state, flags):
  if flags["--worker"] != "all":
    return [int(flags["--worker"])]
  return range(len(life(scenario, state)["runs"]))


def describe(scenario, state, words, flags):
  print("state: no capacity")


def list_objects(address):
  import glob

  gs = f"{CLOUD}/gs/"
  if "//" in address.removeprefix("gs://"):
    return 1  # to a bucket a//b is not a/b, which a file system has it be
  found = sorted(glob.glob(gs + address.removeprefix("gs://bucket/")))
  for path in found:
    print(f"gs://bucket/{path.removeprefix(gs)}")
  return int(not found)


def life(scenario, state):
  return scenario["lives"][state["life"]]


def home_of(state, node, worker):
  return f"{CLOUD}/{state['life']}/{node}-w-{worker}"


def read(file):
  with open(file) as opened:
    return opened.read()


def write(file, text):
  """At once: gclouds that run beside each other never read half of it."""
  part = f"{file}.{os.getpid()}"
  with open(part, "w") as opened:
    opened.write(text)
  os.replace(part, file)


COMMANDS = {
  "queued-resources create": create,
  "queued-resources delete": delete,
  "queued-resources describe": describe,
  "queued-resources list": list_queue,
  "tpu-vm list": list_nodes,
  "tpu-vm ssh": ssh,
  "tpu-vm scp": scp,
}

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
