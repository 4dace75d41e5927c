"""A path stands for the files that it says, and @split for some of them."""

import json
import pathlib

import pyarrow.parquet
import pytest

from jaxvlm.data.tables import further_columns, look_up, open_tables


@pytest.fixture
def make(tmp_path):
  def write(*names):
    for name in names:
      file = tmp_path / name
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text("{}\n")

  return write


def names(tmp_path, path):
  tables = open_tables(str(tmp_path / path))
  return [str(table.file.relative_to(tmp_path)) for table in tables]


def test_a_split_is_a_word_of_a_name(tmp_path, make):
  make(
    "d/train-0.jsonl", "d/train-1.jsonl", "d/dev_set.jsonl", "d/e/test/a.jsonl"
  )
  assert names(tmp_path, "d@train") == ["d/train-0.jsonl", "d/train-1.jsonl"]
  assert names(tmp_path, "d@validation") == ["d/dev_set.jsonl"]
  assert names(tmp_path, "d@test") == ["d/e/test/a.jsonl"]
  assert names(tmp_path, "d/*.jsonl@dev") == ["d/dev_set.jsonl"]
  with pytest.raises(
    ValueError, match="splits test, train, validation; choose"
  ):
    names(tmp_path, "d")
  with pytest.raises(
    ValueError, match="no split 'mini'; its files are dev_set"
  ):
    names(tmp_path, "d@mini")


def test_a_word_within_another_is_no_split(tmp_path, make):
  make("d/trained.jsonl", "d/device.jsonl", "d/part2.jsonl")
  assert names(tmp_path, "d@train") == [
    "d/device.jsonl",
    "d/part2.jsonl",
    "d/trained.jsonl",
  ]
  assert names(tmp_path, "d@part2") == ["d/part2.jsonl"]
  with pytest.raises(ValueError, match="no split 'dev'"):
    names(tmp_path, "d@dev")


def test_files_beside_the_rows_are_left_alone(tmp_path, make):
  make("d/a.jsonl", "d/info.json", "d/README.md")
  assert names(tmp_path, "d") == ["d/a.jsonl"]


def test_a_single_file_is_its_train_split(tmp_path, make):
  make("rows.jsonl", "odd@name.jsonl")
  assert names(tmp_path, "rows.jsonl@train") == ["rows.jsonl"]
  assert names(tmp_path, "odd@name.jsonl") == ["odd@name.jsonl"]
  with pytest.raises(ValueError, match="no split 'test'"):
    names(tmp_path, "rows.jsonl@test")
  with pytest.raises(ValueError, match=r"no such file .*gone'"):
    names(tmp_path, "gone@train")
  with pytest.raises(ValueError, match="path is empty"):
    open_tables("")


def test_a_broken_file_is_named(tmp_path):
  for name, kind in (("a.arrow", "arrow"), ("a.jsonl", "jsonl")):
    pathlib.Path(tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"{name}: not readable as {kind}"):
      names(tmp_path, name)


def test_a_value_is_looked_up_below_objects():
  row = {"a": {"b": {"c": 1}}, "a.b": 2, "x": 3}
  assert look_up(row, "a.b") == 2
  assert look_up(row, "a.b.c") == 1
  for key in ("a.c", "x.y", "z", "z.z"):
    assert look_up(row, key) is None


def test_further_columns_are_those_of_all_files_that_are_not_taken(tmp_path):
  table = pyarrow.table({"problem": ["1"], "n": [1], "tags": [["a", "b"]]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  row = {"problem": "2", "n": 2, "level": {"of": "three"}}
  (tmp_path / "b.jsonl").write_text(json.dumps(row))
  tables = open_tables([str(tmp_path / n) for n in ("a.parquet", "b.jsonl")])
  assert further_columns(tables, {"problem"}).to_pylist() == [
    {"n": 1, "tags": ["a", "b"], "level": None},
    {"n": 2, "tags": None, "level": {"of": "three"}},
  ]


@pytest.mark.parametrize("together", [True, False])
def test_a_column_of_several_types_is_refused_by_file(tmp_path, together):
  lines = [json.dumps({"n": value}) for value in (1, "two")]
  (tmp_path / "a.jsonl").write_text("\n".join(lines[: 1 + together]))
  (tmp_path / "b.jsonl").write_text(lines[1])
  tables = open_tables(str(tmp_path / "*.jsonl"))
  file = "a" if together else "b"
  with pytest.raises(ValueError, match=f"{file}.jsonl: a column has values of"):
    further_columns(tables, ())
