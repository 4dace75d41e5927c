"""`python -m jaxvlm.main --config=configs/staged.py` runs a schedule."""

import contextlib
import errno
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

# Without PyTorch, transformers says that it has no models; none is asked for.
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from jaxvlm import (
  books,
  checkpoint,
  compiling,
  heap,
  hosts,
  job,
  paths,
  train,
  workdir,
)
from jaxvlm.display import Display, make_console

CONFIG = config_flags.DEFINE_config_file(
  "config", lock_config=True, help_string="A file of configs/, and its size."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0. Like the next two not needed on TPU pods, under "
  "Slurm and in Kubernetes.",
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run; 1: alone")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which this is, from 0.")
_NO_CONFIG = "jaxvlm: no --config; give one, as --config=configs/staged.py."


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"jaxvlm: unexpected arguments: {' '.join(argv[1:])}")
  heap.keep()
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
  sys.unraisablehook = checkpoint.print_unraisable
  config = CONFIG.value.to_dict()
  with contextlib.ExitStack() as stack:
    stack.enter_context(hosts.heeding())
    join("jaxvlm", config)
    stack.enter_context(hosts.together())
    display = stack.enter_context(Display(make_console()))
    try:
      with hosts.preparing():
        hosts.limit(config["limits"]["host_wait"])
        # Where a run lies is no part of it: a workdir may be moved.
        place = paths.path(config.pop("workdir"))
        compiling.keep(config.pop("compilation_cache"))
        stack.enter_context(workdir.lock(place))
        workdir.check_hosts(config)
        changed = workdir.check_config(place, config)
        if changed:
          display.print("Another layout, so not bit for bit from here on:")
          display.print("\n".join(changed))
        if hosts.any_of(books.finished(place)):
          display.print(f"This run is finished; its results are in {place}.")
          return
        prepared = job.prepare(config, place, display)
        if jax.process_index() == 0 and not (place / "config.json").exists():
          workdir.write_config(place, config)
    except hosts.Terminated as stopped:
      display.print(str(stopped))
      raise
    except (OSError, ValueError) as error:
      sys.exit(f"jaxvlm: {error}")
    try:
      train.run(prepared, display)
    except books.Interrupted as interrupted:
      display.print(str(interrupted))
    except (OSError, books.Stopped) as error:
      full = getattr(error, "errno", None) == errno.ENOSPC
      remedy = f" Make room in {place}, then run the same command again."
      sys.exit(f"jaxvlm: stopped: {error}" + (remedy if full else ""))


def join(name: str, config: Mapping[str, Any]) -> None:
  """Finds the other processes of this run, where there are any."""
  try:
    job.check_numbers(config)
    hosts.join(
      _COORDINATOR.value,
      _PROCESSES.value,
      _PROCESS.value,
      heartbeat=config["limits"]["heartbeat"],
    )
  except ValueError as error:
    sys.exit(f"{name}: {error}")


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; what is wrong with one is said in a line."""
  try:
    rest = flags.FLAGS(argv)
    CONFIG.value.is_locked  # noqa: B018, a missing file raises at its first use
    return rest
  except (AttributeError, KeyError) as error:
    unknown = _unknown_field(argv)
    if unknown is None:
      raise  # the config file's own
    raise SystemExit(f"jaxvlm: {unknown}") from error
  except OSError as error:
    if not config_file(argv):
      raise SystemExit(_NO_CONFIG) from error
    file = config_file(argv).partition(":")[0]
    if pathlib.Path(file).exists():
      raise  # the config file's own
    raise SystemExit(f"jaxvlm: {file}: no such config file.") from error
  except flags.Error as error:
    if not config_file(argv):
      raise SystemExit(_NO_CONFIG) from error
    # What a config file raises comes wrapped twice, with a traceback each.
    root: BaseException = error
    while isinstance(root, flags.Error | ValueError) and root.__context__:
      root = root.__context__
    told = root if "Error whilst parsing config" in str(error) else error
    raise SystemExit(f"jaxvlm: {_no_number(str(told)) or told}") from error


def _no_number(told: str) -> str | None:
  """What absl tells of a number that is none, as other fields are told."""
  found = re.match(r"flag --(config\.[\w.]+)=(.*): (invalid lit|could n)", told)
  if found is None:
    return None
  field, value, why = found.groups()
  kind = "whole number" if why.startswith("invalid") else "number"
  return f"--{field}: got {value!r}; expected a {kind}."


def config_file(argv: list[str]) -> str:
  """The value of --config."""
  found = re.search(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE)
  return found.group(1) if found else ""


def _unknown_field(argv: list[str]) -> str | None:
  """The first --config.* that names no field, and what there is."""
  config = flags.FLAGS["config"].parser.parse(config_file(argv))
  for argument in argv[1:]:
    field = re.match(r"--?(?:no)?(config\.[\w.]+)", argument)
    owner, here = config, "config"
    for name in field.group(1).split(".")[1:] if field else ():
      if not isinstance(owner, ConfigDict) or name not in owner:
        there = ", ".join(owner) if isinstance(owner, ConfigDict) else "none"
        return f"--{here}: no field {name!r}; there are {there}."
      owner, here = owner[name], f"{here}.{name}"
  return None


def cli() -> None:
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=parse)


if __name__ == "__main__":
  cli()
