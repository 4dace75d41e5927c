"""Which rows of a data set are used: their ids, annotations, filter and order."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float, Int

from jaxvlm import paths
from jaxvlm.data.expressions import Expression
from jaxvlm.data.lazy import LazyRows
from jaxvlm.data.options import read_choices
from jaxvlm.types import Example, Picture

T = TypeVar("T")

ROW_ID = "row_id"  # the column of annotations that names a row
# Why rows are dropped.
_UNREAD = "without options that are certain"
_OUTSIDE, _UNKNOWN = "outside the filter", "without a value for the filter"


class Watch(Protocol):
  """Gives the items and shows how many of `total` were taken."""

  def __call__(
    self, items: Iterable[T], description: str, *, total: int
  ) -> Iterable[T]: ...


def row_id(example: Example) -> str:
  """What a row is known by wherever it lies: 16 hexadecimal digits.

  It hashes what is asked (problem and messages), the answer and the pictures:
  encoded ones by their bytes, arrays by shape and values, and files by their
  path from `image_root`, which is not read.
  """
  asked = [example.problem, list(example.messages), example.answer]
  digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
  for picture in example.images:
    kind, content = _identity(picture, example.image_root)
    digest.update(f"\0{kind} {len(content)}\0".encode())
    digest.update(content)
  return digest.hexdigest()[:16]


def _identity(picture: Picture, root: str) -> tuple[str, Any]:
  """Its kind, and what of it is hashed: a buffer of bytes."""
  if isinstance(picture, bytes):
    return "encoded", picture
  if isinstance(picture, str):
    under = picture.removeprefix(root.rstrip(os.sep) + os.sep)
    return "path", under.encode()
  pixels = np.ascontiguousarray(picture)
  return f"array {pixels.shape} {pixels.dtype}", pixels.data.cast("B")


def combined_seed(seed: int, row_ids: Iterable[str]) -> int:
  """A seed of 32 bits that depends on the seed and the rows alone."""
  digest = hashlib.sha256(f"{seed}".encode())
  for one in row_ids:
    digest.update(f" {one}".encode())
  return int.from_bytes(digest.digest()[:4], "little")


def columns_of(example: Example) -> dict[str, Any]:
  """What an expression may name: the row's columns, its task and answer."""
  return {"task": example.task, "answer": example.answer} | dict(
    example.columns
  )


def read_annotations(path: str) -> dict[str, dict[str, Any]]:
  """Further columns by row id, of a parquet or JSONL file.

  Raises:
    ValueError: it cannot be read, a row has no row_id, or one id has two
      different rows.
  """
  file = paths.path(path)
  found: dict[str, dict[str, Any]] = {}
  for i, row in enumerate(_read_rows(file)):
    one = row.pop(ROW_ID, None)
    if not isinstance(one, str):
      raise ValueError(
        f"{file}[{i}]: {ROW_ID} is {one!r}; expected text, as "
        "tools/annotate.py writes it."
      )
    if found.setdefault(one, row) != row:
      raise ValueError(f"{file}[{i}]: {ROW_ID} {one} comes twice, unequal.")
  return found


def _read_rows(file: Any) -> list[dict[str, Any]]:
  if file.suffix not in (".parquet", ".jsonl"):
    raise ValueError(f"{file}: annotations are a .parquet or .jsonl file.")
  try:
    if file.suffix == ".parquet":
      here = paths.local(file)
      schema = pyarrow.parquet.read_schema(here)
      # Not the pictures, where the file has them.
      names = [f.name for f in schema if not pyarrow.types.is_nested(f.type)]
      return pyarrow.parquet.read_table(here, columns=names).to_pylist()
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
  except (OSError, ValueError, pyarrow.ArrowException) as error:
    raise ValueError(f"{file}: annotations not readable: {error}") from error
  for i, row in enumerate(rows):
    if not isinstance(row, dict):
      raise ValueError(f"{file}[{i}]: is {row!r}; expected an object.")
  return rows


class Rows(LazyRows):
  """A source's rows with what its entry in the config adds to each."""

  def __init__(
    self,
    examples: Sequence[Example],
    *,
    annotations: str,
    rewards: tuple[tuple[str, float], ...],
    report_as: str,
  ):
    """Takes the rows as they are.

    Args:
      examples: the rows.
      annotations: file of further columns, which go before a row's own of
        the same name; "": none.
      rewards: (name, weight) of each row; (): the stage's.
      report_as: what metrics are kept apart by; "": the stage's name.

    Raises:
      ValueError: as `read_annotations`.
    """
    self._examples = examples
    self._added: dict[str, Any] = {"rewards": rewards, "report_as": report_as}
    self._annotations: dict[str, dict[str, Any]] | None = None
    self._missing: dict[str, None] = {}
    if annotations:
      self._annotations = read_annotations(annotations)
      names = (name for row in self._annotations.values() for name in row)
      self._missing = dict.fromkeys(names)

  def __len__(self) -> int:
    return len(self._examples)

  def row(self, i: int) -> Example:
    example = self._examples[i]
    if self._annotations is not None:
      found = self._annotations.get(row_id(example), {})
      columns = {**example.columns, **self._missing, **found}
      example = dataclasses.replace(example, columns=columns)
    return dataclasses.replace(example, **self._added)

  def further(self, rows: Sequence[int]) -> pyarrow.Table:
    """The columns that these rows have beside problem, answer and pictures.

    Raises:
      ValueError: one has values of several types.
    """
    if hasattr(self._examples, "further"):  # from files: whatever they hold
      found = self._examples.further(rows)
      if found is not None:
        return found
    columns = [dict(self._examples[i].columns) for i in rows]
    names = dict.fromkeys(name for row in columns for name in row)
    return pyarrow.table(
      {name: [row.get(name) for row in columns] for name in names}
    )

  def check_annotated(self, name: str, watch: Watch) -> None:
    """Raises ValueError where annotations lack rows; says how many."""
    if self._annotations is None:
      return
    lacking = [
      example.name
      for example in watch(self._examples, f"join {name}", total=len(self))
      if row_id(example) not in self._annotations
    ]
    if lacking:
      raise ValueError(
        f"{name}: {len(lacking)} of {len(self)} rows have no annotation, the "
        f"first is {lacking[0]}. Annotate them, or give a filter: a row "
        "without annotation has no value in those columns."
      )


class Selected(NamedTuple):
  """The rows that an entry's filter and limit leave."""

  rows: Int[np.ndarray, " N"]  # indices, in order
  dropped: dict[str, int]  # rows, by reason


def select(
  rows: Rows,
  *,
  name: str,
  filter: str,
  limit: int | None,
  shuffle_options: bool,
  watch: Watch,
) -> Selected:
  """The rows for which the filter is true, and of these the first.

  Args:
    rows: of the entry.
    name: of the entry, for messages.
    filter: a column expression; "": all rows. A row for which it is unknown,
      as it has no value in a column, is dropped.
    limit: so many of those that are left; None: all.
    shuffle_options: whether a row without options that are read with certainty
      is dropped.
    watch: as `Display.progress`.

  Raises:
    ValueError: a filter that cannot be asked of a row, a row without
      annotation and no filter that could leave it out, or nothing left.
  """
  kept = np.arange(len(rows))
  dropped: dict[str, int] = {}
  if filter:
    expression = _expression(f"{name}.filter", filter)
    asked = watch(rows, f"filter {name}", total=len(rows))
    truths = ask(asked, expression, expression.truth, f"{name}.filter")
    kept = np.array([i for i, truth in enumerate(truths) if truth], np.int64)
    for why, truth in ((_OUTSIDE, False), (_UNKNOWN, None)):
      if count := truths.count(truth):
        dropped[why] = count
    if not len(kept):
      raise ValueError(
        f"{name}.filter: {filter!r} keeps none of {len(rows)} rows "
        f"({dropped.get(_UNKNOWN, 0)} have no value for it)."
      )
  else:
    rows.check_annotated(name, watch)
  if shuffle_options:
    tried = watch(kept.tolist(), f"read options {name}", total=len(kept))
    read = [i for i in tried if read_choices(rows[i]) is not None]
    if not read:
      raise ValueError(
        f"{name}.shuffle_options: none of {len(kept)} rows has options in lines "
        "'A. text' and an answer among them that can be read with certainty."
      )
    if len(read) < len(kept):
      dropped[_UNREAD] = len(kept) - len(read)
    kept = np.array(read, np.int64)
  if limit is not None and limit < 1:
    raise ValueError(f"{name}.limit: got {limit}; expected 1 or more.")
  if limit is not None and len(kept) > limit:
    dropped[f"beyond limit {limit}"] = len(kept) - limit
    kept = kept[:limit]
  return Selected(kept, dropped)


def order_keys(
  examples: Sequence[Example],
  rows: Int[np.ndarray, " N"],
  *,
  name: str,
  order: str,
) -> Float[np.ndarray, " N"]:
  """What the draws of an ordered stage are sorted by, for each of these rows.

  Raises:
    ValueError: a row has no number there; names it.
  """
  expression = _expression(name, order)
  asked = (examples[i] for i in rows)
  keys = ask(asked, expression, expression.number, name)
  if None in keys:
    raise ValueError(
      f"{name}: {keys.count(None)} of {len(keys)} rows have no value for "
      f"{order!r}, the first is {examples[rows[keys.index(None)]].name}; leave "
      "them out by a filter with `is not None`."
    )
  return np.array(keys, np.float64)


def ask(
  examples: Iterable[Example],
  expression: Expression,
  question: Callable[[Mapping[str, Any]], T],
  name: str,
) -> list[T]:
  """An expression's value for each row; a column that none has is refused."""
  known: set[str] = set()
  values = []
  for example in examples:
    columns = columns_of(example)
    known |= columns.keys()
    try:
      values.append(question(columns))
    except ValueError as error:
      raise ValueError(f"{name}: {example.name}: {error}") from error
  try:
    expression.check(known)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
  return values


def _expression(field: str, text: str) -> Expression:
  try:
    return Expression(text)
  except ValueError as error:
    raise ValueError(f"{field}: {error}") from error
