"""Rows are known by what they ask, and an entry says which are used."""

import dataclasses
import json
import random

import numpy as np
import pyarrow.parquet
import pytest

from jaxvlm.data.rows import (
  Rows,
  combined_seed,
  order_keys,
  read_annotations,
  row_id,
  select,
)
from jaxvlm.types import Example

EXAMPLE = Example(problem="<image>a", answer="1", images=(b"\x89PNG",))


def make_rows(count):
  return [
    Example(
      problem=f"p{i}",
      answer=str(i),
      name=f"f[{i}]",
      task="ab"[i % 2],
      columns={"rate": i / 4, "late": i} if i != 2 else {"rate": None},
    )
    for i in range(count)
  ]


def make_entry(examples, annotations="", rewards=()):
  return Rows(examples, annotations=annotations, rewards=rewards, report_as="")


def picked(examples, filter="", limit=None, shuffle_options=False, **entry):
  found = select(
    make_entry(examples, **entry),
    name="d",
    filter=filter,
    limit=limit,
    shuffle_options=shuffle_options,
    watch=lambda items, description, total: items,
  )
  return found.rows.tolist(), found.dropped


def test_an_id_is_of_what_is_asked_alone():
  assert row_id(EXAMPLE) == "d7e2957ba069f88d"  # whatever machine or version
  same = dataclasses.replace(
    EXAMPLE,
    name="elsewhere",
    task="t",
    response="r",
    columns={"a": 1},
    rewards=(("exact", 1.0),),
  )
  assert row_id(same) == row_id(EXAMPLE)
  message = {"role": "user", "content": "a"}
  others = [
    dataclasses.replace(EXAMPLE, **change)
    for change in (
      {"problem": "<image>b"},
      {"answer": "2"},
      {"messages": (message,)},
      {"images": (b"\x89PNH",)},
      {"images": (b"\x89", b"PNG")},
      {"images": ()},
      {"images": ("a.png",)},
      {"images": (np.zeros((2, 3, 3), np.uint8),)},
      {"images": (np.zeros((3, 2, 3), np.uint8),)},
    )
  ]
  ids = {row_id(example) for example in [EXAMPLE, *others]}
  assert len(ids) == 1 + len(others)
  assert all(len(one) == 16 for one in ids)


def test_a_path_is_known_from_where_the_set_lies():
  here, there, elsewhere = (
    dataclasses.replace(EXAMPLE, images=(path,), image_root=root)
    for path, root in (
      ("/a/set/pictures/1.png", "/a/set"),
      ("/b/pictures/1.png", "/b/"),
      ("/other/pictures/1.png", "/b"),
    )
  )
  assert row_id(here) == row_id(there) != row_id(elsewhere)


def test_a_seed_is_of_the_rows_and_their_order():
  assert combined_seed(0, ["a", "b"]) == combined_seed(0, ["a", "b"]) < 2**32
  seeds = [(0, ["a", "b"]), (1, ["a", "b"]), (0, ["b", "a"]), (0, ["a"])]
  assert len({combined_seed(*one) for one in seeds}) == 4


def test_a_filter_keeps_what_is_true_and_counts_the_others():
  rows = make_rows(5)
  assert picked(rows, "rate > 0 and rate < 1") == (
    [1, 3],
    {"outside the filter": 2, "without a value for the filter": 1},
  )
  assert picked(rows, "rate is None or task == 'a'") == (
    [0, 2, 4],
    {"outside the filter": 2},
  )
  # A column that the row lacks altogether has no value there.
  assert picked(rows, "late >= 0")[0] == [0, 1, 3, 4]
  assert picked(rows) == ([0, 1, 2, 3, 4], {})


def test_a_limit_is_of_the_rows_that_the_filter_leaves():
  rows = make_rows(8)
  assert picked(rows, "task == 'b'", 2) == (
    [1, 3],
    {"outside the filter": 4, "beyond limit 2": 2},
  )
  assert picked(rows, limit=3) == ([0, 1, 2], {"beyond limit 3": 5})
  assert picked(rows, limit=9) == ([*range(8)], {})
  with pytest.raises(ValueError, match=r"d\.limit: got 0"):
    picked(rows, limit=0)


def test_rows_without_certain_options_are_dropped_where_these_are_shuffled():
  rows = [
    dataclasses.replace(row, problem=f"?\nA. a{i}\nB. b{i}", answer="A")
    if i % 2
    else row
    for i, row in enumerate(make_rows(8))
  ]
  assert picked(rows, "task == 'b' or rate > 1", 3, True) == (
    [1, 3, 5],
    {
      "outside the filter": 2,
      "without a value for the filter": 1,
      "without options that are certain": 1,
      "beyond limit 3": 1,
    },
  )
  with pytest.raises(ValueError, match=r"d\.shuffle_options: none of 2 rows"):
    picked(make_rows(2), shuffle_options=True)


def test_a_filter_that_cannot_be_asked_is_named():
  rows = make_rows(5)
  for filter, message in (
    ("rat > 0", r"d\.filter: .* no column 'rat'; there are answer, late, rate"),
    ("rate >", r"d\.filter: .* is no expression"),
    ("task > 3", r"d\.filter: f\[0\]: .* cannot be computed"),
    ("rate", r"d\.filter: f\[0\]: .* expected true or false"),
    ("rate > 9", r"d\.filter: 'rate > 9' keeps none of 5 rows \(1 have no"),
  ):
    with pytest.raises(ValueError, match=message):
      picked(rows, filter)


@pytest.fixture(params=["jsonl", "parquet"])
def annotations(request, tmp_path):
  """Of all but the last of four rows."""
  rows = [
    {"row_id": row_id(example), "pass_rate": i / 2, "rate": 7.0}
    for i, example in enumerate(make_rows(3))
  ]
  file = tmp_path / f"a.{request.param}"
  if request.param == "jsonl":
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, file)
  return str(file)


def test_annotations_are_columns_before_a_rows_own(annotations):
  rows = make_entry(make_rows(4), annotations)
  assert rows[1].columns == {"rate": 7.0, "late": 1, "pass_rate": 0.5}
  assert rows[-1].columns == {"rate": None, "late": 3, "pass_rate": None}
  assert [r.columns["pass_rate"] for r in rows[:3]] == [0.0, 0.5, 1.0]


def test_a_row_without_annotation_is_an_error_or_the_filters(annotations):
  rows = make_rows(4)
  assert picked(rows, "pass_rate > 0", annotations=annotations) == (
    [1, 2],
    {"outside the filter": 1, "without a value for the filter": 1},
  )
  with pytest.raises(ValueError, match=r"1 of 4 rows .* first is f\[3\]\."):
    picked(rows, annotations=annotations)
  assert picked(rows[:3], annotations=annotations) == ([0, 1, 2], {})


def test_annotations_that_cannot_be_read_are_named(tmp_path):
  file = tmp_path / "a.jsonl"
  for text, message in (
    ('{"pass_rate": 1}', r"a\.jsonl\[0\]: row_id is None"),
    ('{"row_id": "a", "b": 1}\n{"row_id": "a", "b": 2}', "a comes twice"),
    ("{", "annotations not readable"),
    ("3", r"a\.jsonl\[0\]: is 3"),
  ):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
      read_annotations(str(file))
  with pytest.raises(ValueError, match=r"gone\.parquet: annotations not"):
    read_annotations(str(tmp_path / "gone.parquet"))
  with pytest.raises(ValueError, match=r"a \.parquet or \.jsonl file"):
    read_annotations("a.csv")


def test_a_source_is_asked_for_plain_numbers():
  class Seeded(list):
    def __getitem__(self, i):
      return super().__getitem__(random.Random(i).randrange(1))

  assert make_entry(Seeded(make_rows(8)))[np.int64(7)].problem == "p0"


def test_the_rewards_of_an_entry_are_its_rows():
  rewards = (("exact", 1.0),)
  assert make_entry(make_rows(2), rewards=rewards)[0].rewards == rewards
  assert make_entry(make_rows(2))[0].rewards == ()


def test_the_order_is_a_number_of_each_row():
  rows = make_rows(5)
  keys = order_keys(rows, np.array([4, 1]), name="o", order="-rate")
  assert keys.tolist() == [-1.0, -0.25]
  with pytest.raises(ValueError, match=r"o: 1 of 2 rows .* is f\[2\]; leave"):
    order_keys(rows, np.array([4, 2]), name="o", order="-rate")
  with pytest.raises(ValueError, match=r"o: f\[4\]: .* expected a number"):
    order_keys(rows, np.array([4]), name="o", order="task")
  with pytest.raises(ValueError, match=r"o: .* no column 'rat'"):
    order_keys(rows, np.array([4]), name="o", order="rat")


def test_annotations_are_read_without_pictures_and_other_lists(tmp_path):
  table = pyarrow.table(
    {"row_id": ["a"], "rate": [0.5], "images": [[{"bytes": b"", "path": ""}]]}
  )
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  found = read_annotations(str(tmp_path / "a.parquet"))
  assert found == {"a": {"rate": 0.5}}


def test_further_columns_of_rows_in_memory_are_those_they_have():
  rows = make_entry(make_rows(3))
  assert rows.further([2, 1]).to_pylist() == [
    {"rate": None, "late": None},
    {"rate": 0.25, "late": 1},
  ]
