"""The directory of a run: held by one run at a time, and of one config."""

import contextlib
import fcntl
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax

from jaxvlm import hosts, paths

# Lines of `changes`. How the work is laid out decides no result but by rounding.
_LAYOUT = re.compile(
  r"  (sampler\.slots|model\.remat|evaluation\.batch_questions"
  r"|stages\.\w+\.(microbatch_tokens|logprob_chunk)):"
)
_MAY_CHANGE = re.compile(
  rf"{_LAYOUT.pattern}|  mesh\.|  limits\.(host_wait|heartbeat):"
)


@contextlib.contextmanager
def lock(workdir: paths.Path) -> Iterator[None]:
  """Keeps a workdir for this run; a killed run's lock is free at once.

  A workdir that was made here and got nothing is taken away again. A bucket
  has no locks: there nothing is kept.

  Raises:
    ValueError: another process has it, or it cannot be made or written.
  """
  path = paths.path(workdir)
  if paths.remote(path):
    yield
    return
  if jax.process_index() > 0:  # the run's first process holds it for all
    hosts.wait()
    if not (path / "lock").exists():
      raise ValueError(
        f"{path}: the first process has it, and process {jax.process_index()} "
        "does not see that; expected a directory that all hosts share."
      )
    yield
    return
  made = not path.exists()
  try:
    path.mkdir(parents=True, exist_ok=True)
    opened = open(path / "lock", "a+")  # noqa: SIM115
  except OSError as error:
    raise ValueError(
      f"{path}: cannot be made a workdir ({error.strerror}); choose another."
    ) from error
  with opened as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ValueError(
        f"{path}: process {file.read().strip() or '?'} is running there. "
        "Wait for it or end it, or use another workdir."
      ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    try:
      hosts.wait()
      yield
    finally:
      left = [one.name for one in path.iterdir()] if path.is_dir() else []
      if made and left == ["lock"]:
        (path / "lock").unlink()
        path.rmdir()


def check_hosts(config: dict[str, Any]) -> None:
  """Raises ValueError where hosts were given different configs."""
  said = zlib.crc32(json.dumps(config, sort_keys=True).encode())
  if len(set(hosts.exchange(said).tolist())) > 1:
    raise ValueError(
      "the hosts were given different configs; expected one command on all."
    )


def check_config(workdir: paths.Path, config: dict[str, Any]) -> list[str]:
  """Compares a config with the one that `write_config` wrote, if it did.

  How long hosts wait, the mesh and other fields of the layout may differ: a run
  may go on on another pod.

  Returns:
    A line for each such field of the layout, "  field: old -> new", but for the
    mesh, whose fields may leave sizes open.

  Raises:
    ValueError: another differs from that the workdir was made with; lists them.
  """
  path = paths.path(workdir) / "config.json"
  if not path.exists():
    return []
  changed = changes(json.loads(path.read_text()), config)
  wrong = [line for line in changed if not _MAY_CHANGE.match(line)]
  if wrong:
    raise ValueError(
      f"{path.parent}: was made with another config. Use another workdir, or "
      "the old values of\n" + "\n".join(wrong)
    )
  return [line for line in changed if _LAYOUT.match(line)]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
  """A line for each field in which two configs differ, "  field: old -> new"."""
  old, new = _flat(before), _flat(json.loads(json.dumps(after)))
  return [
    f"  {field}: {old.get(field, 'absent')} -> {new.get(field, 'absent')}"
    for field in sorted(old.keys() | new.keys())
    if old.get(field) != new.get(field)
  ]


def write_config(workdir: paths.Path, config: dict[str, Any]) -> None:
  """Makes a workdir that of this config, once all of it is found right."""
  path = paths.path(workdir) / "config.json"
  paths.write(path, (json.dumps(config, indent=2) + "\n").encode())


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
  if not isinstance(value, dict) or not value:
    return {prefix: json.dumps(value)}
  fields: dict[str, str] = {}
  for key, inner in value.items():
    fields |= _flat(inner, f"{prefix}.{key}" if prefix else key)
  return fields
