"""`python -m jaxvlm.main --config=configs/staged.py` runs a schedule."""

import contextlib
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jaxvlm import checkpoint, job, train
from jaxvlm.books import Stopped
from jaxvlm.display import Display, make_console

_CONFIG = config_flags.DEFINE_config_file(
  "config", lock_config=True, help_string="A file of configs/, and its size."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other hosts of a pod or cluster first."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  config = _CONFIG.value.to_dict()
  workdir = pathlib.Path(config["workdir"]).expanduser().absolute()
  with contextlib.ExitStack() as stack:
    display = stack.enter_context(Display(make_console()))
    try:
      if jax.process_index() == 0:
        stack.enter_context(checkpoint.lock(workdir))
        checkpoint.check_config(workdir, config)
      prepared = job.prepare(config, workdir, display)
    except ValueError as error:
      sys.exit(f"jaxvlm: {error}")
    try:
      train.run(prepared, display)
    except Stopped as error:
      sys.exit(f"jaxvlm: stopped: {error}")


def cli() -> None:
  flags.mark_flag_as_required("config")
  app.run(main)


if __name__ == "__main__":
  cli()
