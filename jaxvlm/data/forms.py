"""Rows of tables in the forms that trainers write them: examples.

A row has a problem, an answer, and its pictures as paths, encoded bytes,
{bytes, path} or base64 text. The problem is text with one <image> marker for
each picture, or a list of messages (`jaxvlm.data.messages`). Whatever further
numbers, texts and truths it has are its columns; `task` is also its task.
"""

import base64
import binascii
import bisect
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow

from jaxvlm import paths
from jaxvlm.data.lazy import LazyRows
from jaxvlm.data.messages import MARKER, read_messages, split_answered
from jaxvlm.data.options import find_letter, with_options
from jaxvlm.data.tables import Table, further_columns, look_up
from jaxvlm.types import Example, Picture

# JPEG, PNG, GIF, WebP (RIFF), BMP, TIFF.
_SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*", b"MM")
_LONGEST_PATH = 4096
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SCALARS = bool | int | float | str
_VIDEO_COLUMNS = ("videos", "video")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """How a trainer writes its rows."""

  problem: str
  answer: str
  images: str
  # Whether pictures without a marker or part go before the first user turn.
  unmarked: bool = True
  # Whether conversations end with the assistant's turn: the written response,
  # and the answer of rows without that column.
  answered: bool = False


FORMS = {
  "easyr1": Form(problem="problem", answer="answer", images="images"),
  "trl": Form(problem="prompt", answer="solution", images="images"),
  "verl": Form(
    problem="prompt",
    answer="reward_model.ground_truth",
    images="images",
    unmarked=False,
  ),
  "ms_swift": Form(
    problem="messages", answer="solution", images="images", answered=True
  ),
  "vlm_r1": Form(
    problem="conversations", answer="solution", images="image", answered=True
  ),
}
_OTHER_NAMES = {"images": "image", "image": "images"}  # where one is not there


class Rows(Protocol):
  """What `jaxvlm.data.tables.Table` is, for rows kept otherwise."""

  @property
  def file(self) -> Any: ...
  def __len__(self) -> int: ...
  def name(self, i: int) -> str: ...
  def keys(self) -> list[str]: ...
  def has(self, key: str) -> bool: ...
  def column(self, key: str) -> Iterator[Any]: ...
  def row(self, i: int) -> dict[str, Any]: ...


def read_examples(
  tables: Sequence[Rows],
  *,
  form: str,
  problem_key: str,
  answer_key: str,
  images_key: str,
  response_key: str,
  options_key: str,
  image_dir: str,
  problem: str,
) -> Sequence[Example]:
  """Examples of all tables' rows, as `jaxvlm.data.sources.files` says.

  Raises:
    ValueError: no such form, a missing column, or a row without problem or
      answer or with a video; names table and row.
  """
  if form not in FORMS:
    raise ValueError(f"no form {form!r}; there are {', '.join(FORMS)}.")
  own = FORMS[form]
  rows = _Examples(
    tables,
    form=dataclasses.replace(
      own,
      problem=problem_key or own.problem,
      answer=answer_key or own.answer,
      images=images_key or own.images,
    ),
    response_key=response_key,
    options_key=options_key,
    image_dir=image_dir,
    problem=problem,
  )
  rows.check()
  return rows


class _Examples(LazyRows):
  """All rows of all files, made into examples one at a time."""

  def __init__(
    self,
    tables: Sequence[Rows],
    *,
    form: Form,
    response_key: str,
    options_key: str,
    image_dir: str,
    problem: str,
  ):
    self._tables = tables
    self._form = form
    self._response_key = response_key
    self._options_key = options_key
    self._image_dir = image_dir
    self._problem = problem
    self._starts = [0, *itertools.accumulate(len(t) for t in tables)]

  def __len__(self) -> int:
    return self._starts[-1]

  def further(self, rows: Sequence[int]) -> pyarrow.Table | None:
    """The further columns of these rows, whatever they hold.

    None: they are kept otherwise than in files' tables.

    Raises:
      ValueError: one has values of several types.
    """
    tables = [table for table in self._tables if isinstance(table, Table)]
    if len(tables) < len(self._tables):
      return None
    return further_columns(tables, self._taken).take(rows)

  def check(self) -> None:
    """Raises ValueError for the first row that cannot be used."""
    target = self._response_key or self._form.answer
    for table in self._tables:
      if not len(table):
        continue
      keys = [] if self._problem else [self._form.problem]
      said = self._form.answered and not table.has(target)
      keys += [] if said else [target]  # else in the conversation's last turn
      self._check_columns(
        table, keys + [self._options_key] * bool(self._options_key)
      )
      keys += [key for key in _VIDEO_COLUMNS if table.has(key)]
      for i, row in enumerate(zip(*map(table.column, keys), strict=True)):
        self._check_row(table.name(i), dict(zip(keys, row, strict=True)))

  def _check_row(self, name: str, row: Mapping[str, Any]) -> None:
    key = self._form.problem
    if key in row and (not isinstance(row[key], str | list) or not row[key]):
      raise ValueError(
        f"{name}: {key!r} is {row[key]!r}; expected text or a list of messages."
      )
    if any(row.get(key) for key in _VIDEO_COLUMNS):
      raise ValueError(f"{name}: has videos; only pictures are supported.")
    target = self._response_key or self._form.answer
    if target in row and not _text(row[target], name):
      raise ValueError(f"{name}: no {target!r}; each row needs one.")

  def _check_columns(self, table: Rows, keys: Sequence[str]) -> None:
    for key in keys:
      if not table.has(key):
        raise ValueError(
          f"{table.file}: no column {key!r}; there are "
          f"{', '.join(table.keys())}. Name yours with problem_key, answer_key "
          f"and response_key, or another form of {', '.join(FORMS)}."
        )

  def row(self, i: int) -> Example:
    at = bisect.bisect_right(self._starts, i) - 1
    table, number = self._tables[at], i - self._starts[at]
    return self._example(table.row(number), table, table.name(number))

  def _example(self, row: dict[str, Any], table: Rows, name: str) -> Example:
    form = self._form
    root = table.file.parent
    if self._image_dir:
      given = self._image_dir
      root = paths.path(given) if paths.remote(given) else pathlib.Path(given)
    problem = look_up(row, form.problem)
    pictures = look_up(row, form.images)
    if pictures is None:
      pictures = row.get(_OTHER_NAMES.get(form.images, ""))
    images = _pictures(pictures, root, name)
    answer, said = look_up(row, form.answer), None
    messages: tuple[dict[str, Any], ...] = ()
    if isinstance(problem, list):
      if form.answered:
        problem, said = split_answered(problem)
        answer = said if answer is None else answer
      messages, images, problem = read_messages(
        problem,
        images,
        read_picture=lambda item: _picture(item, root, name),
        name=name,
        unmarked=form.unmarked,
      )
    if self._problem:
      messages, problem = (), MARKER * len(images) + self._problem
    answer = _text(answer, name)
    if self._options_key:
      if messages:
        raise ValueError(f"{name}: options beside messages; write them there.")
      options = look_up(row, self._options_key)
      problem, answer = _with_options(problem, answer, options, name)
    response = look_up(row, self._response_key) if self._response_key else said
    columns = _scalars(row, self._taken)
    task = columns.get("task")
    return Example(
      problem=problem,
      answer=answer,
      images=images,
      name=name,
      response=response or None,
      messages=messages,
      columns=columns,
      task=task if isinstance(task, str) else "",
      image_root=str(root),
    )

  @property
  def _taken(self) -> set[str]:
    """Columns that are more than a row's further ones."""
    form = self._form
    own = {form.problem, form.answer, form.images, self._response_key}
    return own | {*_VIDEO_COLUMNS, *_OTHER_NAMES}


def _with_options(
  problem: str, answer: str, options: Any, name: str
) -> tuple[str, str]:
  """The problem with its options below it, and the letter of the answer."""
  if isinstance(options, Mapping):
    options = [options[letter] for letter in sorted(options) if options[letter]]
  if not isinstance(options, list):
    raise ValueError(f"{name}: the options are {options!r}; expected a list.")
  try:
    problem = with_options(problem, options)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
  texts = [str(option).strip() for option in options]
  letter = find_letter(answer, texts)
  if letter is None:
    raise ValueError(
      f"{name}: the answer {answer!r} is not the letter or the text of one of "
      f"the options {texts}."
    )
  return problem, letter


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


def _pictures(value: Any, root: Any, name: str) -> tuple[Picture, ...]:
  if value is None or value == "":
    return ()
  if isinstance(value, str | bytes | dict):
    value = [value]
  if not isinstance(value, list):
    raise ValueError(f"{name}: the pictures are a {type(value).__name__}.")
  return tuple(_picture(item, root, name) for item in value)


def _picture(item: Any, root: Any, name: str) -> Picture:
  if isinstance(item, dict) and "base64" in item:
    return _of_base64(item["base64"], name)
  if isinstance(item, dict):
    item = item.get("bytes") or item.get("path") or item.get("image")
  if isinstance(item, bytes):
    return item
  if not isinstance(item, str) or not item:
    raise ValueError(
      f"{name}: a picture is {item!r}; expected a path, bytes, base64 text or "
      "{bytes, path}."
    )
  if paths.remote(item):
    return item
  scheme = _SCHEME.match(item)
  if scheme and scheme[1].lower() != "file":
    raise ValueError(
      f"{name}: a picture is the address {item[:200]}; download it first, "
      "pictures are read from files or rows alone."
    )
  item = item[scheme.end() :] if scheme else item
  if item.startswith("data:image/"):
    item = item.partition(",")[2]
  elif _there(root, item):
    return str(root / item)
  decoded = _from_base64(item)
  return str(root / item) if decoded is None else decoded


def _there(root: Any, item: str) -> bool:
  """Whether it is a file; in a bucket, of each picture, that is not asked."""
  if len(item) >= _LONGEST_PATH or paths.remote(root):
    return False
  return (root / item).is_file()


def _of_base64(text: Any, name: str) -> bytes:
  if isinstance(text, str):
    data = text.partition(",")[2] if text.startswith("data:image/") else text
    if (decoded := _from_base64(data)) is not None:
      return decoded
  raise ValueError(
    f"{name}: the base64 of a picture, {text!r:.40}, is not an encoded picture."
  )


def _from_base64(text: str) -> bytes | None:
  """The encoded file; None when the text is rather a path."""
  try:
    decoded = base64.b64decode("".join(text.split()), validate=True)
  except (binascii.Error, ValueError):
    return None
  return decoded if decoded.startswith(_SIGNATURES) else None
