"""Checkpoints that survive kills, full disks and bit rot.

Each is written aside and renamed when it is whole (Orbax), so what a kill
leaves half-written is never taken for a checkpoint.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from jaxvlm import hosts, paths

_CHUNK_BYTES = 64 * 2**20
_ITEMS = ("state", "loader", "progress", "host")
# What Orbax and tensorstore raise where a file cannot be written.
_FAILURES = (OSError, ValueError, RuntimeError)

_log = logging.getLogger(__name__)

# What a saved state looks like, given the progress saved beside it: a pytree
# of arrays or ShapeDtypeStructs with shape, dtype and sharding.
Like = Callable[[dict[str, Any]], Any]


class Restored(NamedTuple):
  """A checkpoint as it was saved."""

  step: int
  state: Any
  loader: dict[str, Any]
  progress: dict[str, Any]
  host: bytes  # b"" also where it was saved by another number of hosts


class _HostHandler(ocp.CheckpointHandler):
  """Each host's own bytes, in a file of its own."""

  def save(self, directory: Any, args: "_Host") -> None:
    _host_file(directory).write_bytes(args.content)

  def restore(self, directory: Any, args: "_Host | None" = None) -> bytes:
    file = _host_file(directory)
    return file.read_bytes() if file.exists() else b""


@ocp.args.register_with_handler(_HostHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Host(ocp.args.CheckpointArgs):
  content: bytes = b""


def _host_file(directory: Any) -> Any:
  return directory / f"{jax.process_index()}-of-{jax.process_count()}"


class Checkpointer:
  """Saves the state of a run as it goes on, keeping the last and the best."""

  def __init__(self, directory: paths.Path, *, keep_last: int, keep_best: int):
    """Opens a directory, and makes it where it is missing.

    Args:
      directory: of this run's checkpoints alone.
      keep_last: newest checkpoints that are kept.
      keep_best: checkpoints with the highest scores that are kept besides.

    Raises:
      ValueError: nothing would be kept.
    """
    if keep_last < 1 or keep_best < 0:
      raise ValueError(
        f"checkpoint: keep_last={keep_last}, keep_best={keep_best}; at least "
        "the last one is kept."
      )
    _hush()
    self._directory = _place(directory)
    self._scores: dict[int, float | None] = {}
    self._broken = False
    self._step = -1  # that is being written
    self._score: float | None = None
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_LastAndBest(keep_last, keep_best, self._scores),
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(
      self._directory, item_names=_ITEMS, options=options
    )
    for step in self._manager.all_steps():
      with contextlib.suppress(ValueError):  # found again by restore
        self._scores[step] = self._read_seal(step)["score"]

  def save(
    self,
    step: int,
    state: Any,
    *,
    loader: dict[str, Any],
    progress: dict[str, Any],
    host: bytes,
    score: float | None,
  ) -> None:
    """Copies the state to the host and writes it in the background.

    The arrays may be donated as soon as this returns.

    Args:
      step: of the run, larger than that of every checkpoint before.
      state: pytree of arrays, sharded or not.
      loader: the position in the data, of JSON's types.
      progress: what else the run goes on from, of JSON's types.
      host: what this host alone goes on from.
      score: what keep_best goes by; None: not measured.

    Raises:
      OSError: this checkpoint, or the one before, cannot be written.
      ValueError: the step is not larger than the last.
    """
    last = self._manager.latest_step()
    if last is not None and step <= last:
      raise ValueError(f"checkpoint: step {step} comes after step {last}.")
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state, save_args=_chunked(state)),
      loader=ocp.args.JsonSave(json.loads(json.dumps(loader))),
      progress=ocp.args.JsonSave(json.loads(json.dumps(progress))),
      host=_Host(host),
    )
    with self._reported():
      self._manager.wait_until_finished()
      self._step, self._score = step, score
      self._scores[step] = score
      self._manager.save(step, args=items, force=True)

  def restore(self, like: Like) -> Restored | None:
    """The newest checkpoint that can be read; None: there is none at all.

    One that cannot be read is named in a warning and, once an older one was
    read in its stead, moved into "unreadable", so that the run can save that
    step again.

    Args:
      like: what the state is to look like.

    Raises:
      ValueError: there are checkpoints, and none can be read; or the newest
        is whole, and of another model or optimizer.
    """
    self.wait()
    unreadable: list[int] = []
    reasons = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      if why := self._damage(step):
        _log.warning("The checkpoint of step %d is unreadable: %s", step, why)
        unreadable.append(step)
        reasons.append(f"step {step}: {why}")
        continue
      found = self._read(step, like)
      if unreadable:
        _log.warning("Going on from the checkpoint of step %d.", step)
        self._set_aside(unreadable)
      return found
    if reasons:
      raise ValueError(
        f"{self._directory}: no checkpoint can be read. To begin anew, use "
        "another workdir.\n  " + "\n  ".join(reasons)
      )
    return None

  def wait(self) -> None:
    """Returns when all is written.

    Raises:
      OSError: a checkpoint cannot be written.
    """
    with self._reported():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads; reports no failure twice."""
    try:
      if not self._broken:
        self.wait()
    finally:
      with contextlib.suppress(*_FAILURES):
        self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _read(self, step: int, like: Like) -> Restored:
    position = self._manager.restore(
      step,
      args=ocp.args.Composite(
        loader=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore()
      ),
    )
    state = ocp.args.StandardRestore(_abstract(like(position.progress)))
    try:
      items = self._manager.restore(step, args=ocp.args.Composite(state=state))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{self._directory}: the checkpoint of step {step} is whole, but "
        f"holds another model or optimizer: {_first_line(error)}"
      ) from error
    # Not by the manager: checkpoints of older versions have no such item.
    host = _HostHandler().restore(self._directory / str(step) / "host")
    return Restored(step, items.state, position.loader, position.progress, host)

  def _seal(self) -> None:
    """Writes down, just before the rename, what the checkpoint consists of."""
    if jax.process_index() == 0:
      # In a bucket nothing is renamed; a last file makes it a checkpoint.
      aside = self._directory / str(self._step)
      if not paths.remote(aside):
        (aside,) = self._directory.glob(f"{self._step}.*tmp*")
      files = [
        str(path.relative_to(aside))
        for item in _ITEMS
        for path in paths.files(aside / item)
      ]
      seal = {"score": self._score, "files": _digests(aside, files)}
      (aside / "seal.json").write_text(json.dumps(seal, indent=1))

  def _read_seal(self, step: int) -> dict[str, Any]:
    path = self._directory / str(step) / "seal.json"
    try:
      return json.loads(path.read_text())
    except (OSError, ValueError) as error:
      raise ValueError(f"{path.name} is missing or damaged") from error

  def _damage(self, step: int) -> str:
    """What is wrong with a checkpoint, of which each host reads a share; "": nothing."""
    why = ""
    try:
      self._verify(step)
    except ValueError as error:
      why = str(error)
    if not hosts.any_of(bool(why)):
      return ""
    return why or "another host says why"

  def _verify(self, step: int) -> None:
    """Raises ValueError for a file of this host's share that is not as sealed."""
    sealed = self._read_seal(step)["files"]
    share = list(sealed)[jax.process_index() :: jax.process_count()]
    files = {name: sealed[name] for name in share}
    home = self._directory / str(step)
    for name in files:
      if not (home / name).exists():
        raise ValueError(f"{name} is missing")
    found = _digests(home, list(files))
    for name, digest in files.items():
      if found[name] != digest:
        raise ValueError(f"{name} is damaged")

  def _set_aside(self, steps: list[int]) -> None:
    if jax.process_index() == 0:
      home = self._directory / "unreadable"
      home.mkdir(exist_ok=True)
      for step in steps:
        taken = len(list(home.glob(f"{step}*")))
        paths.move(self._directory / str(step), home / f"{step}.{taken}")
    ocp.multihost.sync_global_processes("jaxvlm:unreadable")
    self._manager.reload()

  @contextlib.contextmanager
  def _reported(self) -> Iterator[None]:
    try:
      yield
    except _FAILURES as error:
      self._broken = True
      whole = _whole(self._directory)
      raise OSError(
        f"{self._directory}: a checkpoint cannot be written "
        f"({_why_unwritten(error)}). "
        + (f"That of step {whole[-1]} is whole. " if whole else "")
        + "Make room, then run the same command again."
      ) from error


@dataclasses.dataclass(frozen=True)
class _LastAndBest(checkpoint_managers.PreservationPolicy):
  """Neither of the two drops what the other keeps."""

  last: int
  best: int
  scores: dict[int, float | None]

  def should_preserve(
    self,
    checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> Sequence[bool]:
    """Which of the checkpoints, oldest first, stay."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    ranks = [
      (score, step)
      for step in steps
      if (score := self.scores.get(step)) is not None
    ]
    best = [step for _, step in sorted(ranks, reverse=True)[: self.best]]
    return [step in best or step in steps[-self.last :] for step in steps]


def save_params(path: paths.Path, params: Any) -> None:
  """Writes one pytree of arrays, in place of what was there.

  It is written aside and renamed: what is found at `path` is whole.

  Raises:
    OSError: it cannot be written.
  """
  _hush()
  try:
    # Copies under way at once: no more than the largest array needs.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    gigabytes = math.ceil(largest / 1e9)
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=gigabytes)
    with ocp.Checkpointer(handler) as checkpointer:
      args = ocp.args.PyTreeSave(
        params,
        save_args=_chunked(params),
        ocdbt_target_data_file_size=_CHUNK_BYTES,  # kept until it is full
      )
      checkpointer.save(_place(path), args, force=True)
  except _FAILURES as error:
    raise OSError(
      f"{path}: cannot be written ({_why_unwritten(error)}). Make room, then run "
      "the same command again."
    ) from error


def load_params(path: paths.Path, like: Any) -> Any:
  """Reads what `save_params` wrote.

  Args:
    path: the directory.
    like: pytree of arrays or ShapeDtypeStructs with the shape, dtype and
      sharding of each array.

  Raises:
    ValueError: it is missing or cannot be read as `like`.
  """
  place = _place(path)
  if not place.is_dir():
    raise ValueError(f"{place}: no such saved parameters.")
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(place, _abstract(like))
  except Exception as error:  # Orbax raises Exception itself
    raise ValueError(
      f"{place}: cannot be read ({_first_line(error)})."
    ) from error


def open_params(path: paths.Path) -> dict[str, Any]:
  """The arrays of a saved tree, by nested keys, unread.

  Args:
    path: of what `save_params` wrote, or of a run's checkpoint (a step), whose
      policy is taken.

  Returns:
    TensorStores: they have shape and dtype, and numpy makes arrays of them
    and of their parts.

  Raises:
    ValueError: there are no such parameters.
  """
  place, prefix = _place(path), ""
  if (place / "state").is_dir():  # a run's
    place, prefix = place / "state", "params."
  if not (place / "manifest.ocdbt").exists():
    raise ValueError(
      f"{place}: no such saved parameters. Expected what convert_hf.py to-orbax "
      "wrote, or a step of a run's checkpoints."
    )
  store = {"driver": "ocdbt", "base": place.as_uri() + "/"}
  names = tensorstore.KvStore.open(store).result().list().result()
  arrays: dict[tuple[str, ...], Any] = {}
  for name in sorted(name.decode() for name in names):
    name, _, file = name.rpartition("/")
    if file == ".zarray" and name.startswith(prefix):
      spec = {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}
      keys = tuple(name.removeprefix(prefix).split("."))
      arrays[keys] = tensorstore.open(spec, open=True, read=True).result()
  return traverse_util.unflatten_dict(arrays)


def print_unraisable(ignored: Any) -> None:
  """A sys.unraisablehook without the noise of tensorstore's threads."""
  # Of each write that fails after the first, they say this.
  if str(ignored.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(ignored)


def _hush() -> None:
  logging.getLogger("absl").addFilter(_not_of_orbax)
  logging.getLogger("asyncio").addFilter(_not_of_a_lost_task)


def _not_of_orbax(record: logging.LogRecord) -> bool:
  # A failure is raised here; Orbax logs it besides, a thousand lines long.
  return f"{os.sep}orbax{os.sep}" not in record.pathname


def _not_of_a_lost_task(record: logging.LogRecord) -> bool:
  # Of many writes that fail at once Orbax awaits, and raises, the first.
  return "exception was never retrieved" not in record.getMessage()


def _place(path: paths.Path) -> Any:
  place = paths.path(path)
  return place if paths.remote(place) else place.resolve()


def _digests(home: Any, names: list[str]) -> dict[str, str]:
  def digest(name: str) -> str:
    if paths.remote(home):  # which checks what it gives itself
      return str((home / name).stat().length)
    with open(home / name, "rb") as file:
      return hashlib.file_digest(file, "blake2b").hexdigest()

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(names, pool.map(digest, names), strict=True))


def _why_unwritten(error: Exception) -> str:
  """The system's own words, where tensorstore wraps them in its internals."""
  code = re.search(r"\[os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else _first_line(error)


def _first_line(error: Exception) -> str:
  line = str(error).strip().partition("\n")[0]
  return line.partition(" [tensorstore_spec=")[0]


def _chunked(tree: Any) -> Any:
  """How arrays are stored: so that a layer of a stack can be read alone."""

  def chunked(array: Any) -> ocp.SaveArgs:
    axes = (0,) if array.ndim else ()
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)

  return jax.tree.map(chunked, tree)


def _abstract(like: Any) -> Any:
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, like)


def _whole(directory: Any) -> list[int]:
  names = [path.name for path in directory.iterdir()]
  return sorted(int(name) for name in names if name.isdigit())
