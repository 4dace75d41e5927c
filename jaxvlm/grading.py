"""The worker process of scoring.py: python -m jaxvlm.grading FD.

It computes rewards and imports no jax, so it starts at once and may be killed
at any time. Over the connection FD it first gets the names of the rewards and
the wall limit of one call, and says ("ready",) or ("broken", why). Then, for
each group it gets, as ([(completion, its tokens)], row, places of the row's
rewards), it answers one call after another: ("value", reward) for each
completion and, within it, each of those rewards; or ("failed", why), which
ends that group.
"""

import math
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from jaxvlm.rewards import load


def main(descriptor: int) -> None:
  """Serves one scorer until it closes the connection or dies."""
  # A machine that goes down sends it to all processes, and the trainer, which
  # has a step to end and to save, closes the connection when it is done.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  connection = Connection(descriptor)
  try:
    names, timeout = connection.recv()
    rewards = _load(connection, names)
    while rewards:
      answers, row, asked = _receive(connection)
      example = types.SimpleNamespace(**row)
      for completion, example.completion_tokens in answers:
        for reward in (rewards[i] for i in asked):
          # If the trainer dies while a reward hangs, nobody is left to kill
          # this process; the kernel does, whoever holds the interpreter lock.
          signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
          reply = _call(reward, completion, example)
          signal.setitimer(signal.ITIMER_REAL, 0)
          connection.send(reply)
          if reply[0] == "failed":
            break
        else:
          continue
        break
  except (EOFError, BrokenPipeError, ConnectionResetError):
    return


def _receive(connection: Connection) -> Any:
  # A process forked from the trainer may hold the other end open after the
  # trainer's death, so the end of file is not all there is to go by.
  parent = os.getppid()
  while not connection.poll(5.0):
    if os.getppid() != parent:
      raise EOFError
  return connection.recv()


def _load(
  connection: Connection, names: tuple[str, ...]
) -> list[Callable[..., float]]:
  rewards = []
  for name in names:
    try:
      rewards.append(load(name))
    except ValueError as error:
      connection.send(("broken", str(error)))
      return []
    except Exception as error:  # the user's code: anything
      connection.send(("broken", f"{name}: {_told(error)}"))
      return []
  connection.send(("ready",))
  return rewards


def _call(
  reward: Callable[..., float], completion: str, example: Any
) -> tuple[str, float | str]:
  try:
    value = float(reward(completion, example))
  except Exception as error:  # the user's code: anything
    return "failed", f"raised {_told(error)}"
  if not math.isfinite(value):
    return "failed", f"returned {value}"
  return "value", value


def _told(error: Exception) -> str:
  place = traceback.extract_tb(error.__traceback__)[-1]
  return (
    f"{type(error).__name__}: {error} "
    f"({os.path.basename(place.filename)}:{place.lineno})"
  )


if __name__ == "__main__":
  main(int(sys.argv[1]))
