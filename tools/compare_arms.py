"""Runs arms over seeds and compares them: table, picture, JSON, paired tests.

  python tools/compare_arms.py --arms=staged,merged --seeds=3
  python tools/compare_arms.py --arms=all --seeds=3 --hold_schedule
  python tools/compare_arms.py --arms=staged,merged --base=my.py --print

Arms are files of configs/, made of --base: a size of configs/staged.py, or a
config of your own with its stages (configs/arms.py). The first arm is what the
others are compared with. Runs go one after another; the same command again
goes on where it stood, and what is finished is not run again. --print prints
the commands instead, for a cluster; run this again there once they are done.

What a base runs before its three stages (the warm start of `tiny`) is the same
for all arms of a seed. It is run once, and each arm starts from its export
with the stages that are left: the staged arm so made is the one-command run,
bit for bit. Arms that sort rows by their pass rate have it measured by
tools/annotate.py with the weights that they start from, once per seed.

Under --workdir: ARM/seedS of each run and its .log, and comparison.md, .png and
.json. What differs between arms without being allowed by name (`allows` of the
arm's config, or --allow) is printed and is exit status 1, as a failed run is.
Flags --config.FIELD=VALUE go to every run; fields of a stage, which not every
arm has, belong into the file of --base.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

# Where the configs are.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from configs import arms
from jaxvlm import comparison, paths
from jaxvlm.display import Display, make_console
from jaxvlm.metrics import read_records

ROOT = pathlib.Path(__file__).resolve().parents[1]
_POLL = 0.2  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A command that leaves something behind."""

  name: str
  command: tuple[str, ...]
  leaves: pathlib.Path  # there once it is finished
  workdir: pathlib.Path | None = None  # None: no run of jaxvlm.main
  steps: int = 1
  needs: tuple["Run", ...] = ()

  @property
  def log(self) -> pathlib.Path:
    place = self.workdir or self.leaves
    return place.with_name(f"{place.name}.log")

  @property
  def told(self) -> pathlib.Path:
    """Where the command of a finished run stands."""
    return self.log.with_suffix(".command.json")

  def finished(self) -> bool:
    """Whether this very command was run to its end."""
    return (
      self.leaves.exists()
      and self.told.exists()
      and json.loads(self.told.read_text()) == list(self.command)
    )

  def done(self) -> int:
    """Steps done."""
    if self.workdir is None or self.finished():
      return self.steps * self.finished()
    records = read_records(self.workdir / "metrics.jsonl", kind="train")
    return min(len(records), self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is to be run, from the flags."""

  base: str
  root: pathlib.Path
  hold_schedule: bool
  completions: int
  extra: tuple[str, ...]  # --config.FIELD=VALUE

  def runs(self, names: Sequence[str], seeds: int) -> dict[int, list[Run]]:
    """All runs by seed, each after those that it needs."""
    configs = {name: load_arm(name, self.base) for name in names}
    return {seed: self._of_seed(configs, seed) for seed in range(seeds)}

  def _of_seed(self, configs: Mapping[str, ConfigDict], seed: int) -> list[Run]:
    base = arms.load(self.base)
    shared = _shared(base)
    warm: list[Run] = []
    start: list[str] = []
    if shared:
      name, flags = "_".join(shared), [f"--config.schedule={_tuple(shared)}"]
      warm = [self._run(name, "staged", base, shared, seed, flags, ())]
      start = [f"--config.model.checkpoint={warm[0].leaves}"]
    rates: dict[str, Run] = {}
    if any(map(_ordered, configs.values())):
      rates = self._annotations(base, seed, start, tuple(warm))
    found = [*warm, *rates.values()]
    for name, config in configs.items():
      stages = tuple(n for n in config.schedule if n not in shared)
      flags = [f"--config.schedule={_tuple(stages)}"] * bool(shared) + start
      if self.hold_schedule:
        flags += self._held(base, stages)
      needs = warm
      if _ordered(config):
        needs = [*warm, *rates.values()]
        flags += _annotation_flags(config, rates)
      found.append(
        self._run(name, name, config, stages, seed, flags, tuple(needs))
      )
    return found

  def _run(
    self,
    name: str,
    arm: str,
    config: ConfigDict,
    stages: Sequence[str],
    seed: int,
    flags: Sequence[str],
    needs: tuple[Run, ...],
  ) -> Run:
    workdir = self.root / name / f"seed{seed}"
    return Run(
      name=f"{name}, seed {seed}",
      command=(
        *(sys.executable, "-m", "jaxvlm.main"),
        f"--config={config_file(arm, self.base)}",
        *(f"--config.seed={seed}", f"--config.workdir={workdir}"),
        *flags,
        *self.extra,
      ),
      leaves=workdir / "hf",
      workdir=workdir,
      steps=sum(config.stages[stage].steps for stage in stages),
      needs=needs,
    )

  def _held(self, base: ConfigDict, stages: tuple[str, ...]) -> list[str]:
    """One schedule over the stages, at the rate of the base's perception."""
    rate = base.stages[arms.CAPABILITIES[0]].learning_rate
    return [
      f"--config.hold_schedule={_tuple(stages)}",
      *(f"--config.stages.{name}.learning_rate={rate!r}" for name in stages),
    ]

  def _annotations(
    self,
    base: ConfigDict,
    seed: int,
    start: Sequence[str],
    needs: tuple[Run, ...],
  ) -> dict[str, Run]:
    """Runs of tools/annotate.py by STAGE_SOURCE."""
    runs = {}
    for stage in arms.CAPABILITIES:
      for source in base.stages[stage].data:
        name = f"{stage}_{source}"
        output = self.root / "annotations" / f"seed{seed}" / f"{name}.parquet"
        runs[name] = Run(
          name=f"pass rates of {name}, seed {seed}",
          command=(
            *(sys.executable, os.path.relpath(ROOT / "tools" / "annotate.py")),
            f"--config={config_file('staged', self.base)}",
            f"--config.seed={seed}",
            *start,
            *(f"--stage={stage}", f"--source={source}"),
            *(f"--completions={self.completions}", f"--output={output}"),
            *self.extra,
          ),
          leaves=output,
          needs=needs,
        )
    return runs


def _tuple(names: Sequence[str]) -> str:
  """As a flag takes it, in quotes that a shell leaves alone."""
  return f"({','.join(json.dumps(name) for name in names)},)"


def load_arm(name: str, base: str) -> ConfigDict:
  if name == "staged":
    return arms.load(base)
  return importlib.import_module(f"configs.{name}").get_config(base)


def config_file(arm: str, base: str) -> str:
  """What --config takes for an arm."""
  if arm == "staged" and base.partition(":")[0].endswith(".py"):
    return base
  return f"{os.path.relpath(ROOT / 'configs' / arm)}.py:{base}"


def _shared(config: ConfigDict) -> tuple[str, ...]:
  """What stands before the stages that arms are made of."""
  return tuple(n for n in config.schedule if n not in arms.CAPABILITIES)


def _ordered(config: ConfigDict) -> bool:
  return any(config.stages[name].order for name in config.schedule)


def _annotation_flags(
  config: ConfigDict, rates: Mapping[str, Run]
) -> list[str]:
  """Hands the files to the sources of ordered stages.

  A merged stage calls a source STAGE_SOURCE already.
  """
  flags = []
  for name in config.schedule:
    stage = config.stages[name]
    for source in stage.data if stage.order else ():
      run = rates.get(source) or rates[f"{name}_{source}"]
      field = f"stages.{name}.data.{source}.annotations"
      flags.append(f"--config.{field}={run.leaves}")
  return flags


# Running.


def run_all(runs: Sequence[Run], display: Display) -> dict[str, str]:
  """Runs what is not finished; returns why by the name of what failed."""
  failed: dict[str, str] = {}
  total = sum(run.steps for run in runs)
  done = sum(run.done() for run in runs)
  with display.task("all runs", total=total, done=done) as advance:
    for i, run in enumerate(runs):
      if run.finished():
        continue
      missing = [need.name for need in run.needs if not need.finished()]
      if missing:
        failed[run.name] = f"not started, for {missing[0]} failed"
        continue
      started = time.monotonic()
      label = f"{i + 1} of {len(runs)}: {run.name}"
      with display.task(label, total=run.steps, done=run.done()) as step:
        why = _execute(
          run, lambda count, step=step: (step(count), advance(count))
        )
      if why is None:
        seconds = time.monotonic() - started
        display.print(f"{label}: done in {seconds / 60:.1f} min")
      else:
        failed[run.name] = why
        display.print(f"{label}: {why}")
  return failed


def _execute(run: Run, advance: Callable[[int], object]) -> str | None:
  """Runs a command to its end; None, or why it failed."""
  run.log.parent.mkdir(parents=True, exist_ok=True)
  done = run.done()
  places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  with contextlib.ExitStack() as stack:
    log = stack.enter_context(run.log.open("wb"))
    process = subprocess.Popen(
      run.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)  # where this is interrupted
    while process.poll() is None:
      time.sleep(_POLL)
      now = run.done()
      if now > done:
        advance(now - done)
        done = now
  if process.returncode or not run.leaves.exists():
    lines = run.log.read_text(errors="replace").strip().splitlines()
    return (
      f"failed with exit status {process.returncode}: "
      f"{lines[-1] if lines else 'it said nothing'} (all of it in {run.log})"
    )
  run.told.write_text(json.dumps(run.command))
  advance(run.steps - done)
  return None


def print_commands(runs: Mapping[int, Sequence[Run]]) -> None:
  for seed, each in runs.items():
    print(f"# seed {seed}")
    needed = {need.name for run in each for need in run.needs}
    homes = {str(run.leaves.parent) for run in each if run.workdir is None}
    for home in sorted(homes):
      print(shlex.join(("mkdir", "-p", home)))
    for run in each:
      after = "" if run.name not in needed else "  # before those below"
      print(shlex.join(("python", *run.command[1:])) + after)


def compare(
  runs: Mapping[int, Sequence[Run]],
  names: Sequence[str],
  root: pathlib.Path,
  allows: Sequence[str],
  display: Display,
) -> list[str]:
  """Writes and prints the comparison; returns what is unequal."""
  finished: dict[str, dict[int, Any]] = {name: {} for name in names}
  for seed, each in runs.items():
    for run in each:
      arm = run.workdir.parent.name if run.workdir else ""
      if arm in finished and run.finished():
        finished[arm][seed] = run.workdir
  present = {name: seeds for name, seeds in finished.items() if seeds}
  if names[0] not in present:
    return [f"no run of {names[0]} is finished; nothing to compare with"]
  found = comparison.summarize(present, allows=allows)
  comparison.write(root, found)
  comparison.print_tables(found, display.console)
  for kind in ("md", "png", "json"):
    display.print(f"{root / f'comparison.{kind}'}")
  hint = (
    "what may differ is named by --allow; few questions or steps round "
    "mixtures, and so draws, apart"
  )
  return [*found["errors"], hint] if found["errors"] else []


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--arms", default="staged,merged", help=f"all, or of {', '.join(arms.ARMS)}"
  )
  parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... so many")
  parser.add_argument("--base", default="tiny", help="a size, or FILE.py")
  parser.add_argument(
    "--workdir", type=paths.local_path, default=pathlib.Path("runs/arms")
  )
  parser.add_argument(
    "--hold_schedule",
    action="store_true",
    help="one learning-rate schedule and optimizer state over all stages",
  )
  parser.add_argument(
    "--completions", type=int, default=8, help="of a row, for its pass rate"
  )
  parser.add_argument(
    "--allow", default="", help="names of what may differ, as draws,patches"
  )
  parser.add_argument("--print", action="store_true", dest="only_print")
  given, extra = parser.parse_known_args(arguments)
  names = list(arms.ARMS if given.arms == "all" else given.arms.split(","))
  for name in names:
    if name not in arms.ARMS:
      parser.error(f"no arm {name!r}; there are {', '.join(arms.ARMS)}")
  if wrong := [each for each in extra if not each.startswith("--config.")]:
    parser.error(f"unknown flag {wrong[0]}")
  if given.seeds < 1:
    parser.error(f"--seeds: got {given.seeds}; expected 1 or more")
  names = list(dict.fromkeys(names))
  try:
    runs = Plan(
      base=given.base,
      root=given.workdir,
      hold_schedule=given.hold_schedule,
      completions=given.completions,
      extra=tuple(extra),
    ).runs(names, given.seeds)
  except ValueError as error:
    sys.exit(f"compare_arms: {error}")
  if given.only_print:
    print_commands(runs)
    return
  allows = tuple(filter(None, given.allow.split(",")))
  with Display(make_console()) as display:
    try:
      failed = run_all([r for each in runs.values() for r in each], display)
    except KeyboardInterrupt:
      sys.exit("compare_arms: stopped; the same command goes on.")
    try:
      unequal = compare(runs, names, given.workdir, allows, display)
    except ValueError as error:
      sys.exit(f"compare_arms: {error}")
  problems = [f"{name} {why}" for name, why in failed.items()] + unequal
  if problems:
    sys.exit("\n".join(f"compare_arms: {each}" for each in problems))


if __name__ == "__main__":
  main()
