"""Rows that items share: all of them once, none too full, few rows."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm import filling

sizes = st.lists(st.integers(1, 100), min_size=1, max_size=40).map(np.array)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 3), st.integers(1, 5), st.booleans(), st.data())
def test_each_item_stands_in_one_row_that_holds_it(
  items, shards, most, even, data
):
  width = data.draw(st.integers(int(items.max()), 300))
  rows, together, fullest = filling.fill(
    items, items % 3, width=width, shards=shards, together=most, even=even
  )
  assert sorted(item for row in rows for item in row) == list(range(len(items)))
  assert max(items[row].sum() for row in rows) == fullest <= width
  assert len(rows) % together == 0 and together % shards == 0
  assert together <= most * shards
  assert even or together == most * shards


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=40).map(np.array))
def test_an_item_begins_a_row_only_where_none_before_holds_it(items):
  width = max(int(items.max()), 1)
  rows = filling.first_fit(items, width)
  held = [int(items[row].sum()) for row in rows]
  assert (
    sorted(q for row in rows for q in row) == np.flatnonzero(items).tolist()
  )
  assert max(held) <= width
  assert all(a + b > width for a, b in itertools.pairwise(held))


def test_calls_are_as_even_as_their_sizes_allow():
  """Nine rows of which eight fit a call are two calls of six, not of eight."""
  items = np.full(9, 10), np.zeros(9)
  for even, expected in ((True, (12, 6)), (False, (16, 8))):
    rows, together, _ = filling.fill(
      *items, width=10, shards=1, together=8, even=even
    )
    assert (len(rows), together) == expected


def test_no_items_are_one_empty_row_for_each_shard():
  none = np.zeros(3, int)
  found = filling.fill(none, none, width=8, shards=2, together=4, even=True)
  assert found == ([[], []], 2, 0)


@settings(max_examples=60, deadline=None)
@given(sizes, st.data())
def test_shards_keep_their_own_items(items, data):
  width = data.draw(st.integers(int(items.max()), 300))
  both = np.stack([items, items[::-1] // 2])
  rows = filling.fill_apart(both, width=width)
  assert len(rows[0]) == len(rows[1])
  for own, shard in zip(both, rows, strict=True):
    placed = sorted(item for row in shard for item in row)
    assert placed == np.flatnonzero(own).tolist()
    assert max(own[row].sum() for row in shard) <= width


def test_both_sizes_are_shared_out_evenly():
  items = np.array([30, 30, 30, 30, 10, 10, 10, 10])
  others = np.array([8, 8, 8, 8, 0, 0, 0, 0])
  for row in filling.balanced(items, others, 4):
    assert (items[row].sum(), others[row].sum()) == (40, 8)
