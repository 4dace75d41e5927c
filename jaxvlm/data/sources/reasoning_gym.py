"""Verifiable textual tasks of reasoning-gym, as many as are asked for.

Needs `pip install 'jaxvlm[reasoning-gym]'`. Its reward `reasoning_gym` makes
the row again in the worker that scores it, so a row is a pure function of
(task, seed, index); tasks of which that is not so are refused.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jaxvlm.data.lazy import LazyRows
from jaxvlm.types import Example

# Of reasoning-gym 0.1.25: these come from the order of a Python set of texts,
# which differs from process to process.
UNSTABLE = (
  "isomorphic_strings",
  "knight_swap",
  "polynomial_multiplication",
  "ransom_note",
  "word_ladder",
)


def source(
  *,
  tasks: Sequence[str],
  size: int,
  seed: int,
  configs: Mapping[str, Mapping[str, Any]],
) -> Sequence[Example]:
  """Rows of each task in turn.

  Args:
    tasks: names of reasoning-gym's data sets.
    size: number of rows.
    seed: of the rows; another seed gives others.
    configs: by task, fields of its own config; {}: as they are.

  Raises:
    ValueError: reasoning-gym is not installed, an unknown or unstable task,
      one without answers, a config that it does not take, or no size.
  """
  try:
    import reasoning_gym.factory  # an extra, and slow to import
  except ImportError as error:
    raise ValueError(
      f"reasoning_gym: {error}; pip install 'jaxvlm[reasoning-gym]'."
    ) from error
  tasks = [tasks] if isinstance(tasks, str) else list(tasks)
  known = sorted(set(reasoning_gym.factory.DATASETS) - {"composite"})
  for name in [*tasks, *configs]:
    if name not in known:
      raise ValueError(
        f"reasoning_gym: no task {name!r}; there are {', '.join(known)}."
      )
    if name in UNSTABLE:
      raise ValueError(
        f"reasoning_gym: the rows of {name!r} differ from process to process, "
        "so no run could be resumed; leave it out."
      )
  if not tasks or size < 1:
    raise ValueError(
      f"reasoning_gym: got tasks {tasks} and size {size}; expected at least "
      "one task and one row."
    )
  share = -(-size // len(tasks))
  opened = []
  for name in tasks:
    settings = dict(configs.get(name, {})) | {
      "seed": _own_seed(name, seed),
      "size": share,
    }
    recipe = json.dumps({"name": name} | settings)
    try:
      task = _open(recipe)
      _check(task[0], task)
      opened.append((name, recipe, task))
    except (AssertionError, TypeError, ValueError) as error:
      raise ValueError(f"reasoning_gym: {name}: {error}.") from error
  return _Tasks(opened, size)


def _own_seed(name: str, seed: int) -> int:
  """reasoning-gym's row i of seed s is row i - 1 of seed s + 1: far apart."""
  digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
  return int.from_bytes(digest[:4], "little") // 2


def _check(entry: Mapping[str, Any], task: Any) -> None:
  """Raises ValueError for a task whose scorer does not pay its own answer."""
  answer = entry["answer"]
  if not answer:
    raise ValueError("its rows have no answer beside their scorer")
  if task.score_answer(answer, entry) != 1.0:
    raise ValueError(f"its scorer does not pay 1 for its own {answer!r}")


@functools.cache
def _open(recipe: str) -> Any:
  import reasoning_gym

  return reasoning_gym.create_dataset(**json.loads(recipe))


class _Tasks(LazyRows):
  def __init__(self, tasks: Sequence[tuple[str, str, Any]], size: int):
    self._tasks = tasks  # name, what it is made from, the data set
    self._size = size
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._size

  def row(self, i: int) -> Example:
    index, which = divmod(i, len(self._tasks))
    name, recipe, task = self._tasks[which]
    with self._lock:  # a task may keep what it draws from
      entry = task[index]
    return Example(
      problem=entry["question"],
      answer=entry["answer"] or "",
      task=name,
      name=f"reasoning_gym/{name}[{index}]",
      columns={"recipe": recipe, "index": index},
    )
