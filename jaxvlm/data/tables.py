"""Tables of rows: parquet, JSON, JSONL, and what the datasets library writes.

A path is a file, a glob pattern or a directory; path@split takes one split of
it, as EasyR1 and datasets do.
"""

import glob
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from jaxvlm import paths

SUFFIXES = (".parquet", ".jsonl", ".json", ".arrow")
# What datasets takes for the name of a split, in names of files and folders.
_SPLITS = {
  "train": ("train", "training"),
  "validation": ("validation", "valid", "dev", "val"),
  "test": ("test", "testing", "eval", "evaluation"),
}
_MOST_SHOWN = 8


class Table:
  """The rows of one file; parquet and Arrow stay encoded, Arrow on disk."""

  def __init__(self, file: Any):
    """Opens it.

    Raises:
      ValueError: it cannot be read; names it.
    """
    self.file = file
    self._columns: pyarrow.Table | list[dict[str, Any]]
    try:
      if file.suffix == ".parquet":
        self._columns = pyarrow.parquet.read_table(paths.local(file))
      elif file.suffix == ".arrow":
        mapped = pyarrow.memory_map(str(paths.local(file)))
        with pyarrow.ipc.open_stream(mapped) as stream:
          self._columns = stream.read_all()
      else:
        self._columns = _read_json(file)
    except (OSError, UnicodeError, pyarrow.ArrowException) as error:
      kind = file.suffix.removeprefix(".")
      raise ValueError(f"{file}: not readable as {kind}: {error}") from error

  def __len__(self) -> int:
    return len(self._columns)

  def name(self, i: int) -> str:
    return f"{self.file}[{i}]"

  def keys(self) -> list[str]:
    if isinstance(self._columns, list):
      return sorted({key for row in self._columns for key in row})
    return self._columns.column_names

  def has(self, key: str) -> bool:
    """Whether there is this column, or the object that "object.key" is of."""
    keys = self.keys()
    return key in keys or ("." in key and key.split(".")[0] in keys)

  def column(self, key: str) -> Iterator[Any]:
    """One value at a time: messages may hold their pictures."""
    top = key if key in self.keys() else key.split(".")[0]
    values: Iterable[Any]
    if isinstance(self._columns, list):
      values = (row.get(top) for row in self._columns)
    else:
      values = (value.as_py() for value in self._columns.column(top))
    return (look_up({top: value}, key) for value in values)

  def without(self, keys: Collection[str]) -> pyarrow.Table:
    """All columns but these."""
    names = [key for key in self.keys() if key not in keys]
    if isinstance(self._columns, list):
      columns = {n: pyarrow.array(list(self.column(n))) for n in names}
      return pyarrow.table(columns)
    return self._columns.select(names)

  def row(self, i: int) -> dict[str, Any]:
    if isinstance(self._columns, list):
      return self._columns[i]
    names = self._columns.column_names
    return {name: self._columns.column(name)[i].as_py() for name in names}


def look_up(row: Mapping[str, Any], key: str) -> Any:
  """The value of a column, or of "object.key"; None: there is none."""
  if key in row:
    return row[key]
  top, _, rest = key.partition(".")
  below = row.get(top)
  return look_up(below, rest) if rest and isinstance(below, Mapping) else None


def further_columns(
  tables: Sequence[Table], taken: Collection[str]
) -> pyarrow.Table:
  """The columns of all the rows, but for those that are taken.

  Raises:
    ValueError: one has values of several types.
  """
  parts = []
  try:
    for table in tables:
      parts.append(table.without(taken))
    return pyarrow.concat_tables(parts, promote_options="permissive")
  except pyarrow.ArrowException as error:
    file = tables[min(len(parts), len(tables) - 1)].file
    raise ValueError(
      f"{file}: a column has values of several types, which no parquet holds: "
      f"{error}"
    ) from error


def open_tables(path: str | Sequence[str]) -> list[Table]:
  """Opens every file that a path, or each of several, stands for.

  Raises:
    ValueError: no such file or split, a split that is to be chosen, another
      kind of file, or one that cannot be read.
  """
  patterns = [path] if isinstance(path, str) else list(path)
  if not patterns:
    raise ValueError("files: path is empty; name at least one file.")
  return [Table(file) for one in patterns for file in _find(one)]


def _find(path: str) -> list[Any]:
  if not path:
    raise ValueError("files: path is empty; name at least one file.")
  found, split = _matches(path), ""
  if not found and "@" in path:
    path, _, split = path.rpartition("@")
    found = _matches(path)
  if not found:
    raise ValueError(
      f"files: no such file {path!r} (from {pathlib.Path.cwd()})."
    )
  files: list[Any] = []
  loose: list[tuple[Any, str]] = []  # and where its own name begins
  for one in found:
    saved = _saved_by_datasets(one, split)
    if saved is not None:
      files += saved
    elif one.is_dir():
      loose += [(file, str(file.relative_to(one))) for file in _below(one)]
    elif one.suffix not in SUFFIXES:
      raise ValueError(f"{one}: expected a .parquet, .json or .jsonl file.")
    else:
      loose.append((one, one.name))
  if split or any(one.is_dir() for one in found):
    return files + _of_split(path, split, loose)
  return files + [file for file, _ in loose]


def _below(directory: Any) -> list[Any]:
  """The rows' files of a directory; others of it may describe them."""
  there = list(paths.files(directory))
  for suffix in SUFFIXES:
    if found := sorted(file for file in there if file.suffix == suffix):
      return found
  raise ValueError(
    f"{directory}: expected a .parquet, .json or .jsonl file in the directory, "
    "or what datasets' save_to_disk writes."
  )


def _matches(path: str) -> list[Any]:
  if paths.remote(path):
    there = paths.path(path)
    if there.exists():
      return [there]
    bucket, _, pattern = path.removeprefix("gs://").partition("/")
    return sorted(paths.path(f"gs://{bucket}").glob(pattern))
  pattern = str(pathlib.Path(path).expanduser())
  if pathlib.Path(pattern).exists():
    return [pathlib.Path(pattern).resolve()]
  found = sorted(glob.glob(pattern, recursive=True))
  return [pathlib.Path(name).resolve() for name in found]


def _of_split(
  path: str, split: str, files: Sequence[tuple[Any, str]]
) -> list[Any]:
  """Of loose files those of the split, which a name says; none says: train."""
  if not files:
    return []
  known = {
    name
    for name, said in _SPLITS.items()
    if any(_says(file, said) for _, file in files)
  }
  if not split:
    if len(known) > 1:
      raise ValueError(
        f"files: {path!r} has the splits {', '.join(sorted(known))}; choose "
        f"one, as {path}@train."
      )
    return [file for file, _ in files]
  said = _SPLITS.get(split, (split,))
  chosen = [file for file, name in files if _says(name, said)]
  if not chosen and not known and split == "train":
    return [file for file, _ in files]
  if not chosen:
    names = [name for _, name in files]
    shown = ", ".join(names[:_MOST_SHOWN]) + ", ..." * (
      len(names) > _MOST_SHOWN
    )
    raise ValueError(
      f"files: {path!r} has no split {split!r}; its files are {shown}."
    )
  return chosen


def _says(name: str, words: Sequence[str]) -> bool:
  """Whether a file's name has one of the words, as a word."""
  any_of = "|".join(map(re.escape, words))
  return bool(re.search(rf"(?<![^\W\d_])({any_of})(?![^\W\d_])", name, re.I))


def _saved_by_datasets(directory: Any, split: str) -> list[Any] | None:
  """The files of a save_to_disk, in order; None: it is none.

  Raises:
    ValueError: it has splits and none of them is named, or another is.
  """
  splits = directory / "dataset_dict.json"
  if splits.exists():
    names = json.loads(splits.read_text())["splits"]
    if split not in names:
      raise ValueError(
        f"files: {str(directory)!r} has the splits {', '.join(names)}; got "
        f"{split!r}. Choose one, as {directory}@{names[0]}."
      )
    directory, split = directory / split, ""
  state = directory / "state.json"
  if not state.exists():
    return None
  saved = json.loads(state.read_text())
  if split and split != (saved.get("_split") or "train"):
    raise ValueError(
      f"files: {str(directory)!r} is one data set without a split {split!r}; "
      "leave the @ out."
    )
  if saved.get("_indices_data_files"):
    raise ValueError(
      f"{directory}: was saved by a datasets older than 2.0, with indices; "
      "load it and save it again."
    )
  return [directory / one["filename"] for one in saved["_data_files"]]


def _read_json(file: Any) -> list[dict[str, Any]]:
  text = file.read_text(encoding="utf-8")
  whole = text.lstrip().startswith("[")
  rows: list[Any] = []
  # Not splitlines: JSON strings may hold other line separators.
  for i, part in enumerate([text] if whole else text.split("\n")):
    try:
      if part.strip():
        rows += json.loads(part) if whole else [json.loads(part)]
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{file}: line {i + error.lineno} is not JSON ({error.msg}); expected "
        "one list of rows, or one row a line."
      ) from error
  for i, row in enumerate(rows):
    if not isinstance(row, dict):
      raise ValueError(f"{file}[{i}]: is {row!r}; expected an object.")
  return rows
