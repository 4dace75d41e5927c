"""The final answer as reasoning-gym's own scorer of the row's task sees it."""

import functools
import json
from typing import Any

from jaxvlm.rewards import final_answer

try:
  import reasoning_gym
except ImportError as error:
  raise ValueError(f"{error}; pip install 'jaxvlm[reasoning-gym]'") from error


def reward(completion: str, example: Any) -> float:
  """What the task pays, 0 to 1; 0 for no final answer or an unreadable one.

  Raises:
    ValueError: the row is not one of the source `reasoning_gym`, or another
      version of reasoning-gym makes another row.
  """
  answer = final_answer(completion)
  if answer is None:
    return 0.0
  if "recipe" not in example.columns:
    raise ValueError(f"{example.name}: is no row of the source reasoning_gym")
  task, entry = _entry(example.columns["recipe"], example.columns["index"])
  if entry["question"] != example.problem:
    raise ValueError(f"{example.name}: comes out otherwise here")
  try:
    return float(task.score_answer(answer, entry))
  except Exception:  # some scorers raise on what they cannot parse
    return 0.0


@functools.lru_cache(maxsize=64)
def _entry(recipe: str, index: int) -> tuple[Any, dict[str, Any]]:
  """The row again: what a scorer needs of it is more than text."""
  task = _open(recipe)
  return task, task[index]


@functools.cache
def _open(recipe: str) -> Any:
  return reasoning_gym.create_dataset(**json.loads(recipe))
