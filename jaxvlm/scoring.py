"""Rewards of a rollout, computed in worker processes that can be killed."""

import collections
import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Self

import numpy as np

import jaxvlm
from jaxvlm.types import Example, Scores

# Imports on a loaded machine take long, and no reward runs meanwhile.
_START_LIMIT = 120.0


class Scorer:
  """Gives each completion the weighted sum of its rewards.

  The rewards run in processes of their own, which hold no pictures and no
  jax. A reward that raises, hangs or returns no finite number costs its group
  the place in the step, and is named; a worker that hangs or dies is
  replaced.
  """

  def __init__(
    self,
    *,
    rewards: tuple[tuple[str, float], ...],
    num_workers: int,
    timeout: float,
  ):
    """Starts the workers and loads the rewards in each.

    Args:
      rewards: pairs of a name and a weight; a name is what `rewards.load`
        takes.
      num_workers: processes.
      timeout: seconds that one reward may take for one completion.

    Raises:
      ValueError: no rewards, one named twice or not to be loaded, a weight
        that is not finite, or fewer than one worker.
    """
    self._names = tuple(name for name, _ in rewards)
    self._files = tuple(_absolute(name) for name in self._names)
    self._weights = np.array([weight for _, weight in rewards], np.float64)
    if not rewards or len(set(self._names)) < len(rewards):
      raise ValueError(f"rewards: got {self._names}; name each once.")
    if not np.isfinite(self._weights).all():
      raise ValueError(f"rewards: a weight of {rewards} is not finite.")
    if num_workers < 1 or not timeout > 0:
      raise ValueError(
        f"rewards: num_workers={num_workers} and timeout={timeout} are to be "
        "positive."
      )
    self._timeout = timeout
    self._workers: list[_Worker] = []
    try:
      for _ in range(num_workers):
        self._workers.append(_Worker(self._files, timeout))
      for worker in self._workers:
        worker.await_start()
    except BaseException:
      self.close()
      raise

  def score(
    self,
    completions: Sequence[Sequence[str]],
    examples: Sequence[Example],
    lengths: np.ndarray | None = None,
  ) -> Scores:
    """Scores G completions of each of Q examples.

    Args:
      completions: [Q][G] texts.
      examples: the rows that were asked, [Q].
      lengths: tokens of each completion, EOS included, int [Q G]; None: not
        counted, and rewards that need them fail.

    Returns:
      The scores. Rewards and parts of a failed group are 0.

    Raises:
      ValueError: the numbers of examples and groups differ, or groups do, or
        lengths are of another shape.
    """
    sizes = {len(group) for group in completions}
    if len(completions) != len(examples) or len(sizes) > 1:
      raise ValueError(
        f"scoring: {len(examples)} examples and {len(completions)} groups of "
        f"{sorted(sizes)} completions; groups are of one size."
      )
    shape = len(examples), max(sizes, default=0)
    if lengths is not None and lengths.shape != shape:
      raise ValueError(
        f"scoring: lengths of shape {lengths.shape} for completions {shape}."
      )
    values = np.zeros((*shape, len(self._names)), np.float64)
    counts = np.full(shape, None) if lengths is None else lengths
    try:
      failures = self._run(completions, examples, counts.tolist(), values)
    except BaseException:  # interrupted: nobody will hear what is under way
      self.close()
      raise
    failed = np.isin(np.arange(len(examples)), list(failures))
    values[failed] = 0.0
    return Scores(
      rewards=values @ self._weights,
      parts={name: values[..., i] for i, name in enumerate(self._names)},
      failed=failed,
      messages=tuple(failures[group] for group in sorted(failures)),
    )

  def close(self) -> None:
    """Ends the workers, busy or not."""
    for worker in self._workers:
      worker.end()
    self._workers.clear()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _run(
    self,
    completions: Sequence[Sequence[str]],
    examples: Sequence[Example],
    lengths: Sequence[Sequence[int | None]],
    values: np.ndarray,
  ) -> dict[int, str]:
    """Fills in values [Q G R]; returns what failed, by group."""
    failures: dict[int, str] = {}
    waiting = collections.deque(range(len(examples) if values.size else 0))
    while waiting or any(worker.group is not None for worker in self._workers):
      for worker in self._workers:
        if waiting and worker.idle:
          group = waiting[0]
          answers = list(zip(completions[group], lengths[group], strict=True))
          if worker.give(group, answers, examples[group]):
            waiting.popleft()
      until = min(worker.deadline for worker in self._workers)
      wait(
        [worker.connection for worker in self._workers],
        max(0.0, until - time.monotonic()),
      )
      for i, worker in enumerate(self._workers):
        its_group, place = worker.group, worker.place
        why = worker.hear(values)
        if why is not None and its_group is not None:
          failures[its_group] = self._message(examples[its_group], place, why)
        if not worker.alive:
          worker.end()
          self._workers[i] = _Worker(self._files, self._timeout)
    return failures

  def _message(self, example: Example, place: int, why: str) -> str:
    completion, reward = divmod(place, len(self._names))
    row = example.name or repr(example.problem[:60])
    return (
      f"reward {self._names[reward]!r} {why} on row {row}, completion "
      f"{completion}: the group is left out of the step."
    )


class _Worker:
  """A process of jaxvlm.grading: starting, idle, busy with a group, dead."""

  def __init__(self, rewards: tuple[str, ...], timeout: float):
    self._rewards = rewards
    self._timeout = timeout
    self._ready = False
    self._calls = 0  # of the group
    self.alive = True
    self.group: int | None = None
    self.place = 0  # of the call under way, among the group's
    self.deadline = time.monotonic() + _START_LIMIT
    self.connection, theirs = Pipe()
    root = str(pathlib.Path(jaxvlm.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # A session of its own: Ctrl-C is the trainer's to hear.
    self._process = subprocess.Popen(
      [sys.executable, "-m", "jaxvlm.grading", str(theirs.fileno())],
      env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
      start_new_session=True,
    )
    theirs.close()
    self.connection.send((rewards, timeout))

  @property
  def idle(self) -> bool:
    return self.alive and self._ready and self.group is None

  def await_start(self) -> None:
    """Raises ValueError if the rewards cannot be loaded."""
    while not self._ready:
      self.connection.poll(max(0.0, self.deadline - time.monotonic()))
      self.hear(np.zeros(0))

  def give(
    self,
    group: int,
    answers: Sequence[tuple[str, int | None]],
    example: Example,
  ) -> bool:
    """Sends a group's (text, tokens) to score; False: the process is gone."""
    row = {
      field.name: getattr(example, field.name)
      for field in dataclasses.fields(example)
    }
    try:
      self.connection.send((answers, row | {"images": ()}))
    except (BrokenPipeError, ConnectionResetError):
      self._lose()
      return False
    self.group, self.place = group, 0
    self._calls = len(answers) * len(self._rewards)
    self.deadline = time.monotonic() + self._timeout
    return True

  def hear(self, values: np.ndarray) -> str | None:
    """Takes a message, if there is one; returns what failed, if it did.

    Raises:
      ValueError: the process does not start.
    """
    now = time.monotonic()
    if self.connection.poll():
      why = self._take(values)
    elif now > self.deadline:
      limit = self._timeout if self._ready else _START_LIMIT
      why = f"hung for more than {limit:g} s"
      self._lose()
    else:
      return None
    if why is not None and not self._ready:
      raise ValueError(f"{why} (while a worker for rewards started)")
    return why

  def end(self) -> None:
    self.connection.close()
    self._process.kill()
    self._process.wait()

  def _take(self, values: np.ndarray) -> str | None:
    try:
      kind, *content = self.connection.recv()
    except (EOFError, ConnectionResetError):
      self._lose()
      return f"ended its process (exit status {self._process.wait()})"
    if kind == "value":
      completion, reward = divmod(self.place, len(self._rewards))
      values[self.group, completion, reward] = content[0]
      self.place += 1
      self.deadline = time.monotonic() + self._timeout
    if kind == "ready" or kind == "failed" or self.place == self._calls:
      self._ready = self._ready or kind == "ready"
      self.group = None
      self.deadline = math.inf
    return content[0] if kind in ("failed", "broken") else None

  def _lose(self) -> None:
    self.alive = False
    self.group = None
    self.deadline = 0.0


def _absolute(name: str) -> str:
  """A user's file by its whole path: a worker may start elsewhere."""
  if ".py:" not in name:
    return name
  path, _, function = name.partition(".py:")
  return f"{pathlib.Path(path + '.py').expanduser().resolve()}:{function}"
