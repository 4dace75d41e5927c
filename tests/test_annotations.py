"""What is written reads as a source of files with the same rows."""

import dataclasses
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jaxvlm import annotations
from jaxvlm.data.loader import Source
from jaxvlm.data.rows import Rows, row_id
from jaxvlm.data.sources import files, worlds


@pytest.fixture
def annotated(tmp_path):
  """annotated(examples, kept): the rows, and as read back from elsewhere."""

  def annotated(examples, kept=None, **found):
    rows = Rows(examples, annotations="", rewards=(), report_as="")
    kept = np.arange(len(rows)) if kept is None else np.array(kept)
    ids = [row_id(rows[int(i)]) for i in kept]
    source = Source(1.0, rows, kept, ids, np.ones((len(ids), 2), int))
    output = tmp_path / "elsewhere" / "out.parquet"
    output.parent.mkdir(exist_ok=True)
    found = {
      name: pyarrow.array([value] * len(kept)) for name, value in found.items()
    }
    own = annotations.own_columns(source)
    annotations.write(output, source, own, found, {"seed": 3})
    return [rows[int(i)] for i in kept], list(files.source(path=str(output)))

  return annotated


def write_rows(file, rows):
  file.write_text("\n".join(json.dumps(row) for row in rows))
  said = "said" if "said" in rows[0] else ""
  return files.source(path=str(file), response_key=said)


def picture():
  file = io.BytesIO()
  Image.new("RGB", (30, 28), (9, 8, 7)).save(file, "PNG")
  return file.getvalue()


@pytest.fixture
def shown(tmp_path):
  """Rows with a file, two, none; they have further columns."""
  (tmp_path / "pictures").mkdir()
  for name in "ab":
    (tmp_path / "pictures" / f"{name}.png").write_bytes(picture())
  paths = ["pictures/a.png", "pictures/b.png"]
  rows = [
    {"problem": "<image> 1", "answer": "x", "images": paths[:1]},
    {"problem": "<image> 2 <image>", "answer": 2, "images": paths},
    {"problem": "3", "answer": "x", "images": None},
  ]
  rows = [row | {"said": "y", "n": i} for i, row in enumerate(rows)]
  for row in rows:
    row["answer"] = str(row["answer"])
    row["tags"] = ["a", "b"][: row["n"]]
  return write_rows(tmp_path / "rows.jsonl", rows)


def same(before, after):
  for name in ("problem", "answer", "images", "messages"):
    assert getattr(after, name) == getattr(before, name), name


def test_rows_of_files_read_as_they_were_from_another_place(annotated, shown):
  before, after = annotated(shown, [0, 1, 2])
  for old, new in zip(before, after, strict=True):
    same(old, new)
  assert before[1].images == after[1].images and len(after[1].images) == 2


def test_relative_directories_of_pictures_become_absolute(
  annotated, shown, tmp_path, monkeypatch
):
  (tmp_path / "rows.jsonl").write_text(
    json.dumps({"problem": "<image>", "answer": "x", "images": ["a.png"]})
  )
  monkeypatch.chdir(tmp_path)
  _, (after,) = annotated(files.source(path="rows.jsonl", image_dir="pictures"))
  assert after.images == (str(tmp_path / "pictures" / "a.png"),)


def test_further_columns_stay_and_new_ones_come_beside_them(
  annotated, shown, tmp_path
):
  annotated(shown, [1, 2], pass_rate=0.5)
  table = pyarrow.parquet.read_table(tmp_path / "elsewhere" / "out.parquet")
  found = table.to_pydict()
  assert found["n"] == [1, 2]
  assert found["tags"] == [["a"], ["a", "b"]]
  assert found["pass_rate"] == [0.5, 0.5]
  assert found["row_id"] == [row_id(shown[1]), row_id(shown[2])]
  assert found["response"] == ["y", "y"]


def test_columns_of_an_earlier_annotation_are_replaced(annotated, tmp_path):
  rows = [{"problem": "1", "answer": "x", "pass_rate": 1.0, "row_id": "old"}]
  source = write_rows(tmp_path / "rows.jsonl", rows)
  _, (after,) = annotated(source, pass_rate=0.25)
  assert after.columns["pass_rate"] == 0.25
  assert after.columns["row_id"] == row_id(source[0])


def test_pictures_within_rows_stay_their_bytes(annotated, tmp_path):
  table = pyarrow.Table.from_pylist(
    [
      {"problem": "<image>", "answer": "x", "images": [picture()]},
      {"problem": "<image>", "answer": "y", "images": [picture()]},
    ]
  )
  pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
  (first, second), after = annotated(
    files.source(path=str(tmp_path / "rows.parquet"))
  )
  same(first, after[0])
  assert row_id(second) == row_id(after[1])


def test_conversations_stay_with_their_pictures_beside_them(
  annotated, shown, tmp_path
):
  turn = {"role": "user", "content": "a <image>"}
  said = {"role": "assistant", "content": "b"}
  parts = [
    {"type": "text", "text": "c"},
    {"type": "image", "path": "pictures/a.png"},
  ]
  rows = [
    {
      "problem": [turn, said, {"role": "user", "content": parts}],
      "answer": "x",
      "images": ["pictures/b.png"],
    },
    {"problem": "d <image>", "answer": "x", "images": ["pictures/b.png"]},
  ]
  source = write_rows(tmp_path / "rows.jsonl", rows)
  before, after = annotated(source)
  assert [e.images for e in after] == [e.images for e in before]
  assert len(after[0].images) == 2
  assert after[0].problem == before[0].problem == "c<image>"
  first, *_, last = after[0].messages
  assert first["content"] == before[0].messages[0]["content"]
  assert last == before[0].messages[2]
  assert after[1].problem == "d <image>"


def test_conversations_of_text_alone_stay_strings(annotated, tmp_path):
  turns = [{"role": "user", "content": "a"}]
  rows = [{"problem": turns, "answer": "x"}]
  (before,), (after,) = annotated(write_rows(tmp_path / "rows.jsonl", rows))
  same(before, after)
  assert row_id(before) == row_id(after)


def test_pictures_made_in_memory_are_stored_exactly(annotated, tmp_path):
  source = worlds.source(
    capability="perception",
    split="dev",
    size=3,
    seed=0,
    tasks={},
    errors={},
    captions=0,
  )
  before, after = annotated(source)
  for old, new in zip(before, after, strict=True):
    same(dataclasses.replace(old, images=new.images), new)
    assert new.columns["task"] == old.task
    (png,) = new.images
    np.testing.assert_array_equal(
      np.asarray(Image.open(io.BytesIO(png))), old.images[0]
    )


def test_values_of_several_types_are_refused_by_file(tmp_path):
  rows = [
    {"problem": "1", "answer": "x", "n": 1},
    {"problem": "2", "answer": "x", "n": "two"},
  ]
  rows = Rows(
    write_rows(tmp_path / "rows.jsonl", rows),
    annotations="",
    rewards=(),
    report_as="",
  )
  source = Source(1.0, rows, np.arange(2), ["a", "b"], np.ones((2, 2), int))
  with pytest.raises(ValueError, match=r"rows.jsonl: a column has values of"):
    annotations.own_columns(source)


def test_the_settings_are_in_the_file(annotated, shown, tmp_path):
  annotated(shown, [0])
  output = tmp_path / "elsewhere" / "out.parquet"
  assert annotations.read_settings(output) == {"seed": 3}
  assert [path.name for path in output.parent.iterdir()] == ["out.parquet"]
  other = tmp_path / "other.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), other)
  assert annotations.read_settings(other) is None
  other.write_text("no parquet")
  assert annotations.read_settings(other) is None
