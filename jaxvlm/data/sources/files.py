"""Rows of parquet, JSON and JSONL files, as EasyR1 and HF datasets write them.

A row has a problem, an answer, and its pictures as paths, encoded bytes,
{bytes, path} or base64 text. The problem is text with one <image> marker for
each picture, or a list of messages (`jaxvlm.data.messages`). Whatever further
numbers, texts and truths it has are its columns.
"""

import base64
import binascii
import bisect
import glob
import itertools
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, overload

import pyarrow
import pyarrow.parquet

from jaxvlm.data.messages import read_messages
from jaxvlm.types import Example, Picture

# JPEG, PNG, GIF, WebP (RIFF), BMP, TIFF.
_SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*", b"MM")
_LONGEST_PATH = 4096
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SCALARS = bool | int | float | str
_VIDEO_COLUMNS = ("videos", "video")


def source(
  *,
  path: str | Sequence[str],
  problem_key: str = "problem",
  answer_key: str = "answer",
  images_key: str = "images",
  response_key: str = "",
  image_dir: str = "",
) -> Sequence[Example]:
  """Reads files; pictures are opened when a row is used.

  Args:
    path: a file or glob pattern, or several; .parquet, .json or .jsonl.
    problem_key: column of the text or the messages.
    answer_key: column of the answer, text or a number.
    images_key: column of the pictures; rows without any are text alone.
    response_key: column of a written response, for SFT; "": there is none.
    image_dir: where relative paths start; "": beside the file.

  Raises:
    ValueError: a missing or broken file, no rows, a missing column, or a row
      without problem or answer or with a video; names file and row.
  """
  tables = [_Table(file) for file in _find_files(path)]
  rows = _Rows(
    tables,
    keys={
      "problem": problem_key,
      "answer": answer_key,
      "images": images_key,
      "response": response_key,
    },
    image_dir=image_dir,
  )
  if not len(rows):
    raise ValueError(f"files: no rows in {path!r}.")
  rows.check()
  return rows


class _Table:
  """The rows of one file; parquet stays in Arrow's memory, still encoded."""

  def __init__(self, file: pathlib.Path):
    self.file = file
    self._columns: pyarrow.Table | list[dict[str, Any]]
    if file.suffix == ".parquet":
      try:
        self._columns = pyarrow.parquet.read_table(file)
      except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: not readable as parquet: {error}") from error
    else:
      self._columns = _read_json(file)

  def __len__(self) -> int:
    return len(self._columns)

  def keys(self) -> list[str]:
    if isinstance(self._columns, list):
      return sorted({key for row in self._columns for key in row})
    return self._columns.column_names

  def column(self, key: str) -> Iterable[Any]:
    """One value at a time: messages may hold their pictures."""
    if isinstance(self._columns, list):
      return (row.get(key) for row in self._columns)
    return (value.as_py() for value in self._columns.column(key))

  def row(self, i: int) -> dict[str, Any]:
    if isinstance(self._columns, list):
      return self._columns[i]
    names = self._columns.column_names
    return {name: self._columns.column(name)[i].as_py() for name in names}


class _Rows(Sequence[Example]):
  """All rows of all files, made into examples one at a time."""

  def __init__(
    self,
    tables: Sequence[_Table],
    *,
    keys: Mapping[str, str],
    image_dir: str,
  ):
    self._tables = tables
    self._keys = keys
    self._image_dir = image_dir
    self._starts = [0, *itertools.accumulate(len(t) for t in tables)]

  def __len__(self) -> int:
    return self._starts[-1]

  def check(self) -> None:
    """Raises ValueError for the first row that cannot be used."""
    target = self._keys["response"] or self._keys["answer"]
    for table in self._tables:
      if len(table):
        present = table.keys()
        keys = [self._keys["problem"], target]
        self._check_columns(table.file, present, keys)
        keys += [key for key in _VIDEO_COLUMNS if key in present]
        rows = zip(*map(table.column, keys), strict=True)
        for i, row in enumerate(rows):
          self._check_row(_name(table.file, i), *row)

  def _check_row(
    self, name: str, problem: Any, target: Any, *videos: Any
  ) -> None:
    if not isinstance(problem, str | list) or not problem:
      raise ValueError(
        f"{name}: {self._keys['problem']!r} is {problem!r}; expected text or "
        "a list of messages."
      )
    if any(videos):
      raise ValueError(f"{name}: has videos; only pictures are supported.")
    if not _text(target, name):
      raise ValueError(
        f"{name}: no {self._keys['response'] or self._keys['answer']!r}; "
        "each row needs one."
      )

  def _check_columns(
    self, file: pathlib.Path, present: Sequence[str], keys: Sequence[str]
  ) -> None:
    for key in keys:
      if key not in present:
        raise ValueError(
          f"{file}: no column {key!r}; there are {', '.join(present)}. "
          "Name yours with problem_key, answer_key and response_key."
        )

  @overload
  def __getitem__(self, i: int) -> Example: ...
  @overload
  def __getitem__(self, i: slice) -> Sequence[Example]: ...
  def __getitem__(self, i: int | slice) -> Example | Sequence[Example]:
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(len(self)))]
    if not -len(self) <= i < len(self):
      raise IndexError(f"row {i} of {len(self)}")
    i %= len(self)
    at = bisect.bisect_right(self._starts, i) - 1
    table, number = self._tables[at], i - self._starts[at]
    name = _name(table.file, number)
    row = table.row(number)
    root = pathlib.Path(self._image_dir or table.file.parent)
    problem = row[self._keys["problem"]]
    images = _pictures(row.get(self._keys["images"]), root, name)
    messages: tuple[dict[str, Any], ...] = ()
    if isinstance(problem, list):
      messages, images, problem = read_messages(
        problem,
        images,
        read_picture=lambda item: _picture(item, root, name),
        name=name,
      )
    return Example(
      problem=problem,
      answer=_text(row.get(self._keys["answer"]), name),
      images=images,
      name=name,
      response=row.get(self._keys["response"]) or None,
      messages=messages,
      columns=_scalars(row, {*self._keys.values(), *_VIDEO_COLUMNS}),
      image_root=str(root),
    )


def _find_files(path: str | Sequence[str]) -> list[pathlib.Path]:
  patterns = [path] if isinstance(path, str) else list(path)
  files: list[pathlib.Path] = []
  for pattern in patterns:
    pattern = str(pathlib.Path(pattern).expanduser())
    if pathlib.Path(pattern).is_file():
      found = [pattern]
    else:
      found = sorted(glob.glob(pattern, recursive=True))
    if not found:
      raise ValueError(
        f"files: no such file {pattern!r} (from {pathlib.Path.cwd()})."
      )
    files += [pathlib.Path(name).resolve() for name in found]
  if not files:
    raise ValueError("files: path is empty; name at least one file.")
  for file in files:
    if file.suffix not in (".parquet", ".json", ".jsonl") or file.is_dir():
      raise ValueError(
        f"{file}: expected a .parquet, .json or .jsonl file; for a directory "
        "give a pattern such as data/*.parquet."
      )
  return files


def _read_json(file: pathlib.Path) -> list[dict[str, Any]]:
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
      raise ValueError(f"{_name(file, i)}: is {row!r}; expected an object.")
  return rows


def _name(file: pathlib.Path, row: int) -> str:
  return f"{file}[{row}]"


def _scalars(
  row: Mapping[str, Any], taken: Collection[str], prefix: str = ""
) -> dict[str, Any]:
  """The row's further columns; those of an object as "object.column"."""
  found: dict[str, Any] = {}
  for key, value in row.items():
    key = prefix + key
    if isinstance(value, Mapping) and key not in taken:
      found |= _scalars(value, taken, f"{key}.")
    elif key not in taken and isinstance(value, _SCALARS | None):
      found[key] = value
  return found


def _text(value: Any, name: str) -> str:
  if value is None:
    return ""
  if not isinstance(value, str | int | float):
    raise ValueError(
      f"{name}: the answer is {value!r}; expected text or a number."
    )
  return str(value).strip()


def _pictures(value: Any, root: pathlib.Path, name: str) -> tuple[Picture, ...]:
  if value is None or value == "":
    return ()
  if isinstance(value, str | bytes | dict):
    value = [value]
  if not isinstance(value, list):
    raise ValueError(f"{name}: the pictures are a {type(value).__name__}.")
  return tuple(_picture(item, root, name) for item in value)


def _picture(item: Any, root: pathlib.Path, name: str) -> Picture:
  if isinstance(item, dict):
    item = item.get("bytes") or item.get("path")
  if isinstance(item, bytes):
    return item
  if not isinstance(item, str) or not item:
    raise ValueError(
      f"{name}: a picture is {item!r}; expected a path, bytes, base64 text or "
      "{bytes, path}."
    )
  scheme = _SCHEME.match(item)
  if scheme and scheme[1].lower() != "file":
    raise ValueError(
      f"{name}: a picture is the address {item[:200]}; download it first, "
      "pictures are read from files or rows alone."
    )
  item = item[scheme.end() :] if scheme else item
  if item.startswith("data:image/"):
    item = item.partition(",")[2]
  elif len(item) < _LONGEST_PATH and (root / item).is_file():
    return str(root / item)
  decoded = _from_base64(item)
  return str(root / item) if decoded is None else decoded


def _from_base64(text: str) -> bytes | None:
  """The encoded file; None when the text is rather a path."""
  try:
    decoded = base64.b64decode("".join(text.split()), validate=True)
  except (binascii.Error, ValueError):
    return None
  return decoded if decoded.startswith(_SIGNATURES) else None
