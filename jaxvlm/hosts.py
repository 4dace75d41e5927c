"""The processes of a run: found, in agreement, and ended together.

What they tell one another goes through jax's coordinator on the first of them,
not through the devices: so none waits longer than `limit` for one that is slow,
and all hear within seconds of one that failed.
"""

import concurrent.futures
import contextlib
import io
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed
from jaxtyping import Shaped

_ENDED = "jaxvlm/ended"  # which process did first, its exit status, and why
_HEARD = "jaxvlm/heard"  # the processes that know
_ALIVE = "jaxvlm/alive"  # what each process says at each of its looks
_DONE = "done"  # by one that listens no more, as it has come to its end
_LISTEN = 0.5  # seconds between two looks
_LINGER = 5.0  # that a process that failed waits for the others to hear

_numbers = itertools.count()
_seconds = 600.0  # see `limit`
_silence = 100.0  # seconds, see `join`
_terminated = threading.Event()  # by SIGTERM
_over = threading.Event()  # this process listens no more


class Late(RuntimeError):
  """A process kept the others waiting for too long."""


class Terminated(SystemExit):
  """SIGTERM came while there was nothing to save; the exit status is 0."""

  def __init__(self) -> None:
    super().__init__(
      "Stopped by SIGTERM before it was under way; the same command begins "
      "anew, or goes on from the last checkpoint."
    )
    self.code = 0


def join(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  heartbeat: float,
) -> None:
  """Joins the other processes of the run; must come before any computation.

  Without arguments jax finds them: on TPU pods, under Slurm's srun, in indexed
  jobs of Kubernetes and under Open MPI. Elsewhere this process is alone. SIGTERM
  while it waits for them ends it, with status 0.

  Args:
    coordinator_address: HOST:PORT of process 0.
    num_processes: how many there are; 1: this one is alone, wherever it is.
    process_id: which of them this is, from 0.
    heartbeat: seconds without a sign of life after which one is given up.

  Raises:
    ValueError: some are given and others are not, the address is none, or no
      process was found.
  """
  global _silence
  _silence = heartbeat
  given = (coordinator_address, num_processes, process_id)
  by_hand = given != (None, None, None)
  if num_processes == 1 or not (by_hand or _surrounded()):
    return
  if by_hand and None in given:
    raise ValueError(
      f"--coordinator_address, --num_processes, --process_id: got {given}; "
      "expected all three, or none where they are found: on a TPU pod, under "
      "srun, in an indexed job of Kubernetes. --num_processes=1 runs alone."
    )
  if by_hand and not re.fullmatch(r".+:\d{1,5}", str(coordinator_address)):
    raise ValueError(
      f"--coordinator_address: got {coordinator_address!r}; expected HOST:PORT "
      "of process 0, as 10.0.0.1:1234."
    )
  # It would take SIGTERM before a run heeds it, and never say so.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    _heeded(
      jax.distributed.initialize,
      *given,
      local_device_ids=_gpus(),
      cluster_detection_method="deactivate" if by_hand else None,
      # jax aborts the others, with a log of its own, after half of this at the
      # soonest: only where the first process is what cannot be heard.
      heartbeat_timeout_seconds=2 * math.ceil(heartbeat + 2 * _LINGER),
    )
  except (RuntimeError, ValueError) as error:
    found = "" if by_hand else " Finding them in Kubernetes takes jax[k8s]."
    raise ValueError(
      f"the other processes of this run cannot be joined: {error}{found} "
      "--num_processes=1 runs alone."
    ) from error


def _heeded(call: Callable[..., None], *args: Any, **options: Any) -> None:
  """Calls what may wait outside Python; SIGTERM meanwhile ends this process.

  Python's handlers run in the main thread alone, between two steps of its own:
  so another thread makes the call, and this one looks up now and then, for a
  signal that comes as it falls asleep does not wake it.
  """
  with preparing(), concurrent.futures.ThreadPoolExecutor(1) as pool:
    try:
      called = pool.submit(call, *args, **options)
      while not called.done():
        concurrent.futures.wait([called], timeout=_LISTEN)
      called.result()
    except Terminated as stopped:
      print(stopped, flush=True)
      os._exit(0)  # that thread may wait for what never comes


def _surrounded() -> bool:
  """Whether jax finds a cluster of several processes around this one."""
  platforms = os.environ.get("JAX_PLATFORMS")
  for one in clusters.ClusterEnv._cluster_types:
    if one.opt_in_only_method or one is clusters.K8sCluster:
      continue
    if one.name.endswith("tpu") and platforms and "tpu" not in platforms:
      continue
    if one.is_env_present():
      return one.get_process_count() > 1
  # Of a pod that is of no indexed job jax would ask the cluster in vain.
  return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(os.environ)


def _gpus() -> list[int] | None:
  """All of a node, where srun starts one process there; None: as jax says.

  jax gives a process of Slurm's one GPU.
  """
  tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
  count = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
  return list(range(count)) if tasks == "1" and count > 1 else None


def limit(seconds: float) -> None:
  """How long processes wait for one another from now on, at the most."""
  global _seconds
  _seconds = seconds


def exchange(values: Any) -> np.ndarray:
  """The values of all processes, [hosts ...], of one shape and dtype.

  Raises:
    Late: one has not come within the limit; says which.
  """
  values = np.asarray(values)
  if jax.process_count() == 1:
    return values[None]
  client: Any = distributed.global_state.client
  number = next(_numbers)
  file = io.BytesIO()
  np.save(file, values, allow_pickle=False)
  place = f"jaxvlm/exchange/{number}"
  client.key_value_set_bytes(
    f"{place}/{jax.process_index():06}", file.getvalue()
  )
  _meet(client, place)
  found = client.key_value_dir_get_bytes(place)
  # All have passed the barrier, so all have read what came before it.
  if jax.process_index() == 0 and number:
    client.key_value_delete(f"jaxvlm/exchange/{number - 1}")
  return np.stack([np.load(io.BytesIO(one)) for _, one in sorted(found)])


def _meet(client: Any, place: str) -> None:
  try:
    client.wait_at_barrier(place, int(1000 * _seconds))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    came = {int(key[-6:]) for key, _ in client.key_value_dir_get_bytes(place)}
    late = sorted(set(range(jax.process_count())) - came)
    raise Late(
      f"waited {_seconds:g} s for {_named(late)}, which may hang or be slow in "
      "loading or rewards. limits.host_wait says how long hosts wait for one "
      "another."
    ) from error


def share(
  count: int, find: Callable[[range], Shaped[np.ndarray, "m *B"]]
) -> Shaped[np.ndarray, "count *B"]:
  """What is found of so many items, where each process looks at its share.

  Args:
    count: of the items, alike on all processes.
    find: gives what is found of these of them.

  Raises:
    Late: as `exchange`.
  """
  processes = jax.process_count()
  found = find(range(jax.process_index(), count, processes))
  each = np.zeros((-(-count // processes), *found.shape[1:]), found.dtype)
  each[: len(found)] = found
  in_turn = exchange(each).swapaxes(0, 1)
  return in_turn.reshape(-1, *found.shape[1:])[:count]


def wait() -> None:
  """Returns when all processes have come here."""
  exchange(0)


def any_of(said: bool) -> bool:
  """Whether any process said so."""
  return bool(exchange(said).any())


@contextlib.contextmanager
def heeding() -> Iterator[None]:
  """Within, SIGTERM is noted for `asked_to_stop`, however often it comes."""
  before = signal.signal(signal.SIGTERM, lambda *_: _terminated.set())
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def preparing() -> Iterator[None]:
  """Within, and within `heeding`, SIGTERM ends this process and the others.

  Raises:
    Terminated: it came.
  """

  def leave(*_: Any) -> None:
    if not _terminated.is_set():  # a second one disturbs no clearing up
      _terminated.set()
      raise Terminated

  before = signal.signal(signal.SIGTERM, leave)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def asked_to_stop() -> bool:
  """Whether any process has got a SIGTERM; all hear the same."""
  return any_of(_terminated.is_set())


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Within, a process ends when another fails, and the others when it does.

  One that waits for others in a collective cannot be told otherwise.
  """
  client: Any = distributed.global_state.client
  if client is None:
    yield
    return
  listener = threading.Thread(target=_listen, args=(client,), daemon=True)
  listener.start()
  with ending():
    yield
  _over.set()
  listener.join()
  _say(client, _DONE)  # the others may need longer
  jax.distributed.shutdown()


@contextlib.contextmanager
def ending(
  *told: type[Exception], spared: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
  """Ends all processes as soon as this one fails within.

  At once, for what would be closed on the way out may wait for the others.
  Where the process is alone this does nothing.

  Args:
    *told: what is an error of the run, and said in a line.
    spared: what is no failure.
  """
  try:
    yield
  except BaseException as error:
    client: Any = distributed.global_state.client
    # What ends well does so on all processes by itself; SIGTERM comes to one.
    ended = isinstance(error, SystemExit) and not error.code
    if isinstance(error, Terminated):
      ended = False
    if client is not None and not ended and not isinstance(error, spared):
      _end(client, error, told)
    raise


def _end(
  client: Any, error: BaseException, told: tuple[type[Exception], ...]
) -> None:
  """Says here and to the others why this process ends, and ends it."""
  if _cut_off(error):
    _await_word(error)
  _over.set()
  status = 0 if isinstance(error, Terminated) else 1
  if others := _heard(client):
    status, why = others  # of which this is what came here
    print(f"jaxvlm: {why}", file=sys.stderr)
  elif isinstance(error, Terminated):  # which is no error, and was said
    why = str(error)
  elif isinstance(error, (SystemExit, Late, *told)):
    why = str(error).removeprefix("jaxvlm: ")
    print(f"jaxvlm: {why}", file=sys.stderr)
  else:
    why = "".join(traceback.format_exception_only(error)).strip()
    traceback.print_exception(error)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    # The first to end is who the others hear of.
    client.key_value_set(_ENDED, f"{jax.process_index()} {status} {why}")
  _leave(client, status)


def _cut_off(error: BaseException) -> bool:
  """Whether the end of another process may be what an operation failed by."""
  broken = isinstance(error, jax.errors.JaxRuntimeError)
  return broken and "RESOURCE_EXHAUSTED" not in str(error)


def _await_word(error: BaseException) -> None:
  """Time to hear of a process that has ended; that ends this one, named."""
  print(
    f"jaxvlm: {str(error).splitlines()[0]} (It may be that another process has "
    f"ended; {_silence:g} s without a sign of life tell which.)",
    file=sys.stderr,
    flush=True,
  )
  time.sleep(_silence + 2 * _LINGER)


def _listen(client: Any) -> None:
  """Ends this process when another has ended; the first looks for silent ones."""
  others = _Others()
  for look in itertools.count():
    if _over.wait(_LISTEN):
      return
    told = _heard(client)
    if told and not _over.is_set():
      status, why = told
      print(f"jaxvlm: {why}", file=sys.stderr)
      _leave(client, status)
    _say(client, str(look))
    silent = others.silent(client) if jax.process_index() == 0 else []
    if silent and not _over.is_set():
      for process in silent:  # which are not waited for
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          client.key_value_set(f"{_HEARD}/{process}", "")
      why = (
        f"{_named(silent)} gave no sign of life for {_silence:g} s "
        "(limits.heartbeat); it was killed or cannot be reached."
      )
      _end(client, Late(why), ())


def _say(client: Any, what: str) -> None:
  # Where this fails the first process has ended, which is heard of otherwise.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    place = f"{_ALIVE}/{jax.process_index():06}"
    client.key_value_set(place, what, allow_overwrite=True)


class _Others:
  """What the first process knows of the others' signs of life.

  It counts its own looks instead of seconds, for if it was stopped itself, as
  machines are for a while, it has missed what the others said meanwhile.
  """

  def __init__(self) -> None:
    self._said: dict[int, str] = {}
    self._looks = dict.fromkeys(range(jax.process_count()), 0)

  def silent(self, client: Any) -> list[int]:
    """Takes a look; those that said nothing new in too many."""
    try:
      found = client.key_value_dir_get(_ALIVE)
    except jax.errors.JaxRuntimeError:
      return []  # this was no look
    said = {int(place[-6:]): what for place, what in found}
    for process in self._looks:
      news = said.get(process)
      if news == _DONE or news != self._said.get(process):
        self._looks[process] = 0
      else:
        self._looks[process] += 1
    self._said = said
    return [p for p, n in self._looks.items() if n * _LISTEN >= _silence]


def _heard(client: Any) -> tuple[int, str] | None:
  """A status to exit with for another process, and why; None: all go on."""
  try:
    who, status, why = client.key_value_try_get(_ENDED).split(" ", 2)
    how = "failed: " if int(status) else "has ended: "
    return int(status), f"{_named([int(who)])} {how}{why}"
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" in str(error):
      return None
    return 1, f"{_named([0])} cannot be reached; it has ended or was killed."


def _leave(client: Any, status: int) -> None:
  """Ends this process; the first one, who holds what is told, last of all."""
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.key_value_set(f"{_HEARD}/{jax.process_index()}", "")
    until = time.monotonic() + _LINGER
    while jax.process_index() == 0 and time.monotonic() < until:
      time.sleep(_LISTEN)
      if len(client.key_value_dir_get(_HEARD)) == jax.process_count():
        break
  # No exit handlers: jax's would wait for processes that wait for this one.
  os._exit(status)


def _named(processes: list[int]) -> str:
  return "process " + ", ".join(map(str, processes))
