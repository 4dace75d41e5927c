"""Sets of TensorFlow Datasets in ArrayRecord files; TensorFlow is not needed.

Needs `pip install 'jaxvlm[tfds]'`. Pictures stay encoded as they were stored;
a class label is its name.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxvlm import paths
from jaxvlm.data.forms import read_examples
from jaxvlm.data.messages import decode_messages
from jaxvlm.data.tables import look_up
from jaxvlm.types import Example


def source(
  *,
  name: str,
  split: str = "train",
  data_dir: str = "",
  form: str = "easyr1",
  problem_key: str = "",
  answer_key: str = "",
  images_key: str = "",
  response_key: str = "",
  options_key: str = "",
  problem: str = "",
) -> Sequence[Example]:
  """Reads a prepared set; nothing is downloaded.

  Args:
    name: the directory of one version (with features.json), or a name as
      `tfds.data_source` takes it, "mnist:3.0.1".
    split: as TFDS writes them, also "train[:90%]".
    data_dir: where named sets are; "": TFDS's own directory.
    form: as of the source `files`, like the keys.
    problem_key: a feature; further texts and numbers are columns.
    answer_key: a feature.
    images_key: a feature: a picture or a sequence of them.
    response_key: a feature; "": there is no written response.
    options_key: a feature: a sequence of texts; "": there is none.
    problem: asked of every row in place of its own; "": each row's own.

  Raises:
    ValueError: TFDS is not installed, there is no such set, split or feature,
      or as of `files`.
  """
  table = _Set(name, split, data_dir)
  return read_examples(
    [table],
    form=form,
    problem_key=problem_key,
    answer_key=answer_key,
    images_key=images_key,
    response_key=response_key,
    options_key=options_key,
    image_dir="",
    problem=problem,
  )


class _Set:
  """One split as a table of rows."""

  def __init__(self, name: str, split: str, data_dir: str):
    try:
      import tensorflow_datasets as tfds  # an extra, and slow to import
      from tensorflow_datasets.core import example_parser
    except ImportError as error:
      raise ValueError(f"tfds: {error}; pip install 'jaxvlm[tfds]'.") from error
    self._tfds = tfds
    for given in (name, data_dir):
      if paths.remote(given):
        raise ValueError(
          f"tfds: got {given!r}; ArrayRecord files are read where they lie, so "
          "copy the set to this machine or mount the bucket."
        )
    directory = pathlib.Path(name).expanduser()
    try:
      if (directory / "features.json").is_file():
        builder = tfds.builder_from_directory(directory)
      else:
        builder = tfds.builder(name, data_dir=data_dir or None)
      self._records = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
      )
    except (
      *(ValueError, AssertionError, NotImplementedError, OSError, ImportError),
      tfds.core.DatasetNotFoundError,
    ) as error:
      raise ValueError(
        f"tfds: {name!r}, split {split!r}, is not to be had: "
        f"{str(error).partition(chr(10))[0]} (Expected the name of a set, or "
        "the directory of one version, as SET/1.0.0.)"
      ) from error
    self._features = builder.info.features
    self._parser = example_parser.ExampleParserNp(
      self._features.get_serialized_info()
    )
    self.file = pathlib.Path(f"{builder.info.full_name}/{split}")
    self._row = functools.lru_cache(maxsize=1)(self._parsed)

  def __len__(self) -> int:
    return len(self._records)

  def name(self, i: int) -> str:
    return f"tfds {self.file}[{i}]"

  def keys(self) -> list[str]:
    return sorted(self._features)

  def has(self, key: str) -> bool:
    return key in self._features

  def column(self, key: str) -> Iterator[Any]:
    return (look_up(self.row(i), key) for i in range(len(self)))

  def row(self, i: int) -> dict[str, Any]:
    return self._row(i)  # columns are asked for side by side

  def _parsed(self, i: int) -> dict[str, Any]:
    parsed = self._parser.parse_example(self._records[i])
    row = {
      key: self._value(feature, parsed.get(key))
      for key, feature in self._features.items()
    }
    if row.get("messages"):  # as tools/to_tfds.py writes them
      row["problem"] = decode_messages(row["messages"])
    row["messages"] = None
    return {key: value for key, value in row.items() if value is not None}

  def _value(self, feature: Any, value: Any) -> Any:
    """The value as a table has it; None for what no row is made of."""
    features = self._tfds.features
    if isinstance(feature, features.Sequence):
      if isinstance(feature.feature, features.FeaturesDict):
        return None
      return [self._value(feature.feature, one) for one in value]
    if isinstance(feature, features.Image):
      return bytes(value)
    if isinstance(feature, features.ClassLabel):
      return feature.int2str(int(value))
    if isinstance(value, bytes):
      return value.decode(errors="replace")
    if not isinstance(feature, features.Tensor) or np.ndim(value):
      return None
    value = np.asarray(value, feature.np_dtype)[()]
    # 0.1 is stored in 32 bits.
    return (
      float(str(np.float32(value))) if value.dtype.kind == "f" else value.item()
    )
