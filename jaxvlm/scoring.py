"""Rewards of a rollout, computed in worker processes that can be killed."""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Self

import numpy as np

import jaxvlm
from jaxvlm.types import Example, Scores

# Imports on a loaded machine take long, and no reward runs meanwhile.
_START_LIMIT = 120.0
_TOLD = 5  # groups that failed, one by one

Rewards = tuple[tuple[str, float], ...]  # (name, weight); first: accuracy


class Scorer:
  """Gives each completion the weighted sum of its rewards.

  A row's own rewards (`Example.rewards`) go before those of the scorer.

  The rewards run in processes of their own, which hold no pictures and no
  jax. A reward that raises, hangs or returns no finite number costs its group
  the place in the step, and is named; a worker that hangs or dies is
  replaced.
  """

  def __init__(
    self,
    *,
    rewards: Rewards,
    num_workers: int,
    timeout: float,
    row_rewards: Iterable[str] = (),
  ):
    """Starts the workers and loads the rewards in each.

    Args:
      rewards: pairs of a name and a weight, of rows without their own; a name
        is what `rewards.load` takes.
      num_workers: processes.
      timeout: seconds that one reward may take for one completion.
      row_rewards: names of the rewards that rows may have of their own.

    Raises:
      ValueError: no rewards, one named twice or not to be loaded, a weight
        that is not finite, or fewer than one worker.
    """
    self._rewards = rewards
    own = [name for name, _ in rewards]
    self._names = tuple(dict.fromkeys([*own, *row_rewards]))
    self._files = tuple(_absolute(name) for name in self._names)
    if not self._names:
      raise ValueError("rewards: got none; expected at least one.")
    check_rewards(rewards)
    if num_workers < 1 or not timeout > 0:
      raise ValueError(
        f"rewards: num_workers={num_workers} and timeout={timeout} are to be "
        "positive."
      )
    self._timeout = timeout
    self._closing = False
    self._workers: list[_Worker] = []
    try:
      for _ in range(num_workers):
        self._workers.append(_Worker(self._files, timeout))
      for worker in self._workers:
        worker.await_start()
    except BaseException:
      self._end_workers()
      raise
    self._thread = futures.ThreadPoolExecutor(1)

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
    asked = [example.rewards or self._rewards for example in examples]
    weights, first = self._weights(asked, examples)
    values = np.where(np.isnan(weights), np.nan, 0.0)[:, None]
    values = np.repeat(values, shape[1], axis=1)  # [Q G R]
    counts = np.full(shape, None) if lengths is None else lengths
    try:
      failures = self._run(completions, examples, counts.tolist(), values)
    except BaseException:  # interrupted: nobody will hear what is under way
      self._end_workers()
      raise
    failed = np.isin(np.arange(len(examples)), list(failures))
    values[failed] *= 0.0  # what does not apply remains so
    return Scores(
      rewards=np.nansum(values * weights[:, None], axis=-1),
      parts={name: values[..., i] for i, name in enumerate(self._names)},
      failed=failed,
      accuracy=np.take_along_axis(values, first[:, None, None], -1)[..., 0],
      messages=tuple(failures[group] for group in sorted(failures)),
    )

  def _weights(
    self, asked: Sequence[Rewards], examples: Sequence[Example]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Of each reward for each row [Q R], NaN: none; which is first [Q]."""
    place = {name: i for i, name in enumerate(self._names)}
    weights = np.full((len(asked), len(place)), np.nan)
    first = np.zeros(len(asked), np.int64)
    for q, (rewards, example) in enumerate(zip(asked, examples, strict=True)):
      if not rewards:
        raise ValueError(f"{example.name}: has no rewards, nor the scorer.")
      for i, (name, weight) in enumerate(rewards):
        if name not in place:
          raise ValueError(
            f"{example.name}: its reward {name!r} is none of the scorer's: "
            f"{', '.join(place)}."
          )
        weights[q, place[name]] = weight
        if i == 0:
          first[q] = place[name]
    return weights, first

  def start(
    self,
    completions: Sequence[Sequence[str]],
    examples: Sequence[Example],
    lengths: np.ndarray | None = None,
  ) -> futures.Future[Scores]:
    """`score` beside what the caller does meanwhile; one after another."""
    return self._thread.submit(self.score, completions, examples, lengths)

  def close(self) -> None:
    """Ends the workers, busy or not."""
    self._closing = True
    for worker in self._workers:
      worker.kill()
    self._thread.shutdown()
    self._end_workers()

  def _end_workers(self) -> None:
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
    while not self._closing and (
      waiting or any(worker.group is not None for worker in self._workers)
    ):
      for worker in self._workers:
        if waiting and worker.idle:
          group = waiting[0]
          answers = list(zip(completions[group], lengths[group], strict=True))
          asked = np.flatnonzero(~np.isnan(values[group, 0])).tolist()
          if worker.give(group, answers, examples[group], asked):
            waiting.popleft()
      until = min(worker.deadline for worker in self._workers)
      wait(
        [worker.connection for worker in self._workers],
        max(0.0, until - time.monotonic()),
      )
      for i, worker in enumerate(self._workers):
        its_group, call = worker.group, worker.call
        why = worker.hear(values)
        if why is not None and its_group is not None:
          failures[its_group] = self._message(examples[its_group], *call, why)
        if not worker.alive and not self._closing:
          worker.end()
          self._workers[i] = _Worker(self._files, self._timeout)
    return failures

  def _message(
    self, example: Example, completion: int, reward: int, why: str
  ) -> str:
    row = example.name or repr(example.problem[:60])
    return (
      f"reward {self._names[reward]!r} {why} on row {row}, completion "
      f"{completion}: the group is left out of the step."
    )


class _Worker:
  """A process of jaxvlm.grading: starting, idle, busy with a group, dead."""

  def __init__(self, rewards: tuple[str, ...], timeout: float):
    self._timeout = timeout
    self._ready = False
    self._calls: list[tuple[int, int]] = []  # of the group
    self._place = 0  # of the call under way, among these
    self.alive = True
    self.group: int | None = None
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

  @property
  def call(self) -> tuple[int, int]:
    """The completion and the reward under way; (0, 0): none is."""
    return (0, 0) if self.group is None else self._calls[self._place]

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
    asked: Sequence[int],
  ) -> bool:
    """Sends a group's (text, tokens) to score; False: the process is gone.

    Args:
      group: its number.
      answers: of each completion.
      example: the row.
      asked: places of the row's rewards among those loaded.
    """
    row = {
      field.name: getattr(example, field.name)
      for field in dataclasses.fields(example)
    }
    try:
      self.connection.send((answers, row | {"images": ()}, asked))
    except (BrokenPipeError, ConnectionResetError):
      self._lose()
      return False
    self.group, self._place = group, 0
    self._calls = list(itertools.product(range(len(answers)), asked))
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

  def kill(self) -> None:
    self._process.kill()

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
      values[self.group, *self.call] = content[0]
      self._place += 1
      self.deadline = time.monotonic() + self._timeout
    if kind == "ready" or kind == "failed" or self._place == len(self._calls):
      self._ready = self._ready or kind == "ready"
      self.group = None
      self.deadline = math.inf
    return content[0] if kind in ("failed", "broken") else None

  def _lose(self) -> None:
    self.alive = False
    self.group = None
    self.deadline = 0.0


def check_rewards(rewards: Rewards) -> None:
  """Raises ValueError for one named twice or a weight that is not finite."""
  names = [name for name, _ in rewards]
  if len(set(names)) < len(names):
    raise ValueError(f"rewards: got {tuple(names)}; name each once.")
  if not all(math.isfinite(weight) for _, weight in rewards):
    raise ValueError(f"rewards: a weight of {rewards} is not finite.")


def briefly(messages: Sequence[str], before: int) -> list[str]:
  """What to print of failures: the first few one by one, the others counted.

  Args:
    messages: of the groups that failed now.
    before: groups that failed earlier.
  """
  told = list(messages[: max(0, _TOLD - before)])
  others = messages[len(told) :]
  counts = collections.Counter(one.partition(" on row ")[0] for one in others)
  if others:
    whys = "; ".join(f"{n} x {why}" for why, n in counts.most_common(_TOLD))
    told.append(f"{len(others)} groups more are left out: {whys}.")
  return told


def _absolute(name: str) -> str:
  """A user's file by its whole path: a worker may start elsewhere."""
  if ".py:" not in name:
    return name
  path, _, function = name.partition(".py:")
  return f"{pathlib.Path(path + '.py').expanduser().resolve()}:{function}"
