"""What annotating a source leaves: a parquet of its rows, and a summary.

The rows are in the form that `files` reads by default, with the further columns
that they have in their own files. Pictures are stored as {bytes, path}: encoded
ones as they are, files by their absolute path, those made in memory as PNG.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
from rich import box
from rich.console import Console
from rich.table import Table

from jaxvlm import paths
from jaxvlm.data.expressions import Expression
from jaxvlm.data.loader import Source
from jaxvlm.data.messages import turns
from jaxvlm.data.rows import ROW_ID, Rows
from jaxvlm.types import Example, Picture

# A way of asking, and how its columns' names end.
VIEWS = {"image": "", "caption": "_caption", "none": "_blind"}
RATE, LENGTH, TRUNCATED = "pass_rate", "mean_length", "truncated"
COMPLETIONS = "completions"
GENERATED = "generated_caption"
IMAGES = "images"
_NUMBERS = (
  *(f"{n}{s}" for n in (RATE, LENGTH, TRUNCATED) for s in VIEWS.values()),
  COMPLETIONS,
)
# The paper's: what a picture's row is worth keeping for perception.
PERCEPTION = "pass_rate == 0 and pass_rate_caption == 1"
UNGUESSABLE = "pass_rate_blind <= 0.5"
_REJECTED = {
  "the reward failed, or there is no answer": None,
  "guessable without picture and caption": f"not ({UNGUESSABLE})",
  "right from the image": "pass_rate > 0",
  "wrong from the caption": "pass_rate_caption < 1",
}
_SETTINGS = b"jaxvlm"
_PICTURES = pyarrow.list_(
  pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
)
_PART = pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string())])
_CHUNK = 256  # rows whose pictures are in memory at once


def own_columns(source: Source) -> pyarrow.Table:
  """The kept rows without their pictures.

  Raises:
    ValueError: a column holds values of several types.
  """
  assert isinstance(source.examples, Rows)
  kept = source.kept.tolist()
  examples = [source.examples[i] for i in kept]
  own = {
    "problem": _problems(examples),
    "answer": pyarrow.array([example.answer for example in examples]),
  }
  for name in ("task", "response"):
    values = [getattr(example, name) for example in examples]
    if any(values):
      own[name] = pyarrow.array(values, pyarrow.string())
  further = source.examples.further(kept)
  for name in further.column_names:
    if name not in (*own, *_NUMBERS, ROW_ID, GENERATED, IMAGES):
      own[name] = further.column(name)
  return pyarrow.table(own)


def write(
  output: Any,
  source: Source,
  own: pyarrow.Table,
  found: Mapping[str, pyarrow.Array],
  settings: Mapping[str, Any],
) -> None:
  """Writes the rows, their pictures and what was found; whole or not at all.

  Args:
    output: the parquet file.
    source: whose kept rows they are.
    own: of `own_columns`.
    found: the new columns.
    settings: what the columns depend on; `read_settings` gives them back.

  Raises:
    OSError: it cannot be written.
  """
  table = own.add_column(0, ROW_ID, pyarrow.array(source.row_ids))
  for name, values in found.items():
    table = table.append_column(name, values)
  schema = table.schema.append(pyarrow.field(IMAGES, _PICTURES))
  schema = schema.with_metadata({_SETTINGS: json.dumps(settings)})
  home = paths.here() if paths.remote(output) else output.parent
  aside = home / f".{output.name}.partial"
  try:
    with pyarrow.parquet.ParquetWriter(aside, schema) as writer:
      for start in range(0, len(table), _CHUNK):
        rows = source.kept[start : start + _CHUNK]
        pictures = [
          [_stored(picture) for picture in source.examples[i].images]
          for i in rows
        ]
        chunk = table.slice(start, _CHUNK).append_column(
          IMAGES, pyarrow.array(pictures, _PICTURES)
        )
        writer.write_table(chunk.cast(schema))
    paths.put(aside, output)
  finally:
    aside.unlink(missing_ok=True)


def read_settings(output: Any) -> dict[str, Any] | None:
  """The settings that a file was written with; None: `write` did not."""
  try:
    metadata = pyarrow.parquet.read_schema(paths.local(output)).metadata or {}
  except pyarrow.ArrowException:
    return None
  return json.loads(metadata[_SETTINGS]) if _SETTINGS in metadata else None


def print_summary(output: Any, console: Console) -> None:
  """Prints how often each view was answered, and what the paper's rule keeps."""
  file = paths.local(output)
  names = pyarrow.parquet.read_schema(file).names
  columns = [name for name in names if name in _NUMBERS]
  table = pyarrow.parquet.read_table(file, columns=columns)
  console.print(_view_table(table))
  if {RATE, f"{RATE}_caption"} <= set(columns):
    rule = _perception_rule(names)
    console.print(_perception_table(table, rule))
    line = f"filter={rule.text!r} keeps that set."
    console.print(line, soft_wrap=True, markup=False)
  console.print(str(output), soft_wrap=True, markup=False)


def _view_table(table: pyarrow.Table) -> Table:
  (completions,) = set(table.column(COMPLETIONS).to_pylist())
  shown = _table(
    f"Pass rates of {len(table)} rows, {completions} completions each"
  )
  shown.add_column("answered from", no_wrap=True)
  for name in (
    "mean",
    "at 0",
    "between",
    "at 1",
    "failed",
    "tokens",
    "cut off",
  ):
    shown.add_column(name, justify="right")
  for view, suffix in VIEWS.items():
    if f"{RATE}{suffix}" not in table.column_names:
      continue
    rates, lengths, truncated = (
      table.column(f"{name}{suffix}").to_numpy()
      for name in (RATE, LENGTH, TRUNCATED)
    )
    known = rates[~np.isnan(rates)]
    at = [(known == 0), (known > 0) & (known < 1), (known == 1)]
    shown.add_row(
      view,
      _percent(known),
      *(f"{part.sum()} {_percent(part):>6}" for part in at),
      str(len(rates) - len(known)),
      f"{lengths.mean():.1f}",
      _percent(truncated),
    )
  return shown


def _perception_rule(columns: Sequence[str]) -> Expression:
  guarded = f"{RATE}_blind" in columns
  return Expression(
    f"{PERCEPTION} and {UNGUESSABLE}" if guarded else PERCEPTION
  )


def _perception_table(table: pyarrow.Table, rule: Expression) -> Table:
  rejections = {
    why: Expression(text)
    for why, text in _REJECTED.items()
    if text and Expression(text).names <= set(table.column_names)
  }
  counts = dict.fromkeys(["kept", *rejections, *_REJECTED], 0)
  for row in table.to_pylist():
    if rule.truth(row):
      why = "kept"
    elif rule.truth(row) is None:
      why = next(iter(_REJECTED))
    else:
      why = next(w for w, text in rejections.items() if text.truth(row))
    counts[why] += 1
  shown = _table("Rows for perception")
  shown.add_column("", no_wrap=True)
  shown.add_column("rows", justify="right")
  for why, count in counts.items():
    if count or why == "kept":
      shown.add_row(why, str(count), style="bold" if why == "kept" else "")
  return shown


def _table(title: str) -> Table:
  return Table(
    title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left"
  )


def _percent(values: np.ndarray) -> str:
  return f"{100 * values.mean():.1f} %" if len(values) else "–"


def _problems(examples: Sequence[Example]) -> pyarrow.Array:
  """Texts, or message lists whose pictures stand beside them."""
  if not any(example.messages for example in examples):
    return pyarrow.array([example.problem for example in examples])
  rows = [turns(example) for example in examples]
  contents = [message["content"] for row in rows for message in row]
  if all(isinstance(content, str) for content in contents):
    return pyarrow.array(rows)
  content = pyarrow.list_(_PART)
  message = pyarrow.struct([("role", pyarrow.string()), ("content", content)])
  return pyarrow.array(
    [[m | {"content": _parts(m["content"])} for m in row] for row in rows],
    pyarrow.list_(message),
  )


def _parts(content: Any) -> list[dict[str, str]]:
  if isinstance(content, str):
    return [{"type": "text", "text": content}]
  return content


def _stored(picture: Picture) -> dict[str, Any]:
  if isinstance(picture, bytes):
    return {"bytes": picture, "path": None}
  if isinstance(picture, str):
    return {"bytes": None, "path": str(paths.path(picture))}
  file = io.BytesIO()
  PIL.Image.fromarray(picture).save(file, "PNG")
  return {"bytes": file.getvalue(), "path": None}
