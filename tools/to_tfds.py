"""Writes rows of any source as a TFDS set of ArrayRecord files.

  python tools/to_tfds.py files /data/tfds/geometry form=verl \
    train.path=train.parquet test.path=test.parquet
  python tools/to_tfds.py worlds /data/tfds/worlds train.split=train \
    capability=perception size=1000 seed=0 tasks={} errors={} captions=0

Arguments of the source are key=value, of one split SPLIT.key=value; without
any of these the one split is train. Values are Python literals or text. The
set is read by the source `tfds`, by tfds.builder_from_directory and by Grain.
Its features are problem, answer, images as encoded files (arrays become PNG),
where a row has them response, messages (JSON) and task, and each further
column. A missing number is NaN there, a missing text "". Numbers keep 7 digits.
"""

import argparse
import ast
import contextlib
import io
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from jaxvlm import paths
from jaxvlm.data.messages import encode_messages
from jaxvlm.display import Display, make_console
from jaxvlm.find import find
from jaxvlm.types import Example, Picture

VERSION = "1.0.0"
_OWN = ("problem", "answer", "images", "response", "messages", "task")


def write(
  splits: Mapping[str, Sequence[Example]], directory: pathlib.Path
) -> pathlib.Path:
  """Writes a set; it appears whole or not at all.

  Args:
    splits: rows by split.
    directory: DATA_DIR/NAME; must not be there.

  Returns:
    The directory of the version, for the source `tfds`.

  Raises:
    ValueError: the directory is there or its name is none for TFDS, a column
      has values of several kinds, or a row cannot be read.
  """
  try:
    import tensorflow_datasets as tfds  # an extra, and slow to import
  except ImportError as error:
    raise ValueError(f"{error}; pip install 'jaxvlm[tfds]'.") from error

  if directory.exists():
    raise ValueError(f"{directory}: is already there; name another.")
  if not re.fullmatch(r"[a-z][a-z0-9_]*", directory.name):
    raise ValueError(
      f"{directory}: TFDS wants a name of lower-case letters, digits and _."
    )
  console = make_console()
  console.file = sys.stdout  # TFDS tells of downloads there, and has bars
  with Display(console) as display:
    columns = _columns(splits, display)
  features = {name: tfds.features.Text() for name in ("problem", "answer")}
  features["images"] = tfds.features.Sequence(
    tfds.features.Image(shape=(None, None, None))
  )
  for name, kind in columns.items():
    features[name] = (
      tfds.features.Text() if kind is str else tfds.features.Scalar(kind)
    )

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(VERSION)
    name = directory.name

    def _info(self) -> Any:
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # rows keep their order
      )

    def _split_generators(self, manager: Any) -> Any:
      del manager
      return {
        name: self._generate_examples(name, rows)
        for name, rows in splits.items()
      }

    def _generate_examples(
      self, split: str, rows: Sequence[Example]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
      with (
        Display(console) as display,
        display.task(f"write {split}", total=len(rows)) as advance,
      ):
        for i in range(len(rows)):
          yield i, _record(rows[i], columns)
          advance(1)

  tfds.disable_progress_bar()
  directory.parent.mkdir(parents=True, exist_ok=True)
  with (
    tempfile.TemporaryDirectory(prefix=".", dir=directory.parent) as aside,
    contextlib.redirect_stdout(io.StringIO()),
  ):
    builder = Builder(data_dir=aside, file_format="array_record")
    builder.download_and_prepare()
    os.rename(pathlib.Path(aside) / directory.name, directory)
  return directory / VERSION


def _columns(
  splits: Mapping[str, Sequence[Example]], display: Display
) -> dict[str, type]:
  """What else rows have, and the numpy type or str that each is stored as."""
  kinds: dict[str, set[type]] = {}
  for split, rows in splits.items():
    with display.task(f"read {split}", total=len(rows)) as advance:
      for i in range(len(rows)):
        for name, value in _further(rows[i]).items():
          kinds.setdefault(name, set()).add(type(value))
        advance(1)
  found: dict[str, type] = {}
  for name, seen in kinds.items():
    known = seen - {type(None)}
    if known <= {str}:
      found[name] = str
    elif str in known:
      raise ValueError(
        f"column {name!r} has texts and numbers; a feature is of one kind."
      )
    elif seen == {bool}:
      found[name] = np.bool_
    else:
      found[name] = np.int64 if seen == {int} else np.float32
  return found


def _further(example: Example) -> dict[str, Any]:
  """All but problem, answer and pictures, where the row has it."""
  own = {
    "response": example.response or "",
    "messages": encode_messages(example.messages),
    "task": example.task,
  }
  columns = {n: v for n, v in example.columns.items() if n not in _OWN}
  return columns | {name: text for name, text in own.items() if text}


def _record(example: Example, columns: Mapping[str, type]) -> dict[str, Any]:
  record: dict[str, Any] = {
    "problem": example.problem,
    "answer": example.answer,
    "images": [io.BytesIO(_encoded(p, example)) for p in example.images],
  }
  further = _further(example)
  for name, kind in columns.items():
    value = further.get(name)
    if value is None:
      value = "" if kind is str else np.nan
    record[name] = value if kind is str else kind(value)
  return record


def _encoded(picture: Picture, example: Example) -> bytes:
  if isinstance(picture, bytes):
    return picture
  if isinstance(picture, str):
    try:
      return pathlib.Path(picture).read_bytes()
    except OSError as error:
      raise ValueError(f"{example.name}: {error}") from error
  file = io.BytesIO()
  PIL.Image.fromarray(picture).save(file, "PNG")
  return file.getvalue()


def _arguments(words: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Arguments of the source by split."""
  shared: dict[str, Any] = {}
  splits: dict[str, dict[str, Any]] = {}
  for word in words:
    match = re.fullmatch(r"(?:(\w+)\.)?(\w+)=(.*)", word, re.DOTALL)
    if match is None:
      raise ValueError(f"{word}: expected key=value or SPLIT.key=value.")
    split, key, text = match.groups()
    try:
      value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      value = text
    (splits.setdefault(split, {}) if split else shared)[key] = value
  return {name: shared | own for name, own in (splits or {"train": {}}).items()}


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", help="files, worlds, or file.py:function")
  parser.add_argument("directory", type=paths.local_path, help="DATA_DIR/NAME")
  parser.add_argument("arguments", nargs="*", metavar="key=value")
  words = parser.parse_args(argv)
  try:
    source = find("data.sources", words.source, "source")
    splits = {
      split: source(**arguments)
      for split, arguments in _arguments(words.arguments).items()
    }
    done = write(splits, words.directory.expanduser().resolve())
  except (ImportError, TypeError, ValueError) as error:
    raise SystemExit(f"to_tfds: {error}") from error
  counts = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
  print(f"{done}: {counts} rows")


if __name__ == "__main__":
  main(sys.argv[1:])
