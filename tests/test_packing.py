"""Packed-tree rows, checked column by column on the host."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm import packing
from jaxvlm.data.vision_layout import alike, capacity, token_places
from jaxvlm.packing import Packed, pack, plan

families = pytest.mark.parametrize(
  "family", ["qwen2_5_vl", "qwen3_vl"], indirect=True
)
LENGTHS = np.array(
  [[3, 1, 2], [1, 1, 1], [4, 4, 4], [2, 0, 1]] * 2
)  # [Q G], as many completion tokens
WIDTH = 4


@pytest.fixture(scope="module")
def completions():
  ids = np.arange(8 * 3 * WIDTH, dtype=np.int32).reshape(8, 3, WIDTH) + 100
  return ids, np.arange(WIDTH) < LENGTHS[..., None]


@pytest.fixture(scope="module")
def packed(questions, completions, layout):
  """(plan, trees) of the eight in microbatches of two rows or so."""
  found = plan(questions, completions[1], tokens=96, shards=1, layout=layout)
  trees = [
    pack(found, u, questions, *completions, layout=layout)
    for u in range(len(found.groups))
  ]
  assert len(trees) > 1
  return found, trees


def showing(question, value):
  """The question with another picture of the same size."""
  pixels = np.full_like(question.pixel_values, value)
  return dataclasses.replace(question, pixel_values=pixels)


def each(packed):
  """(tree, row, place of a tree in it, its question, its columns)."""
  found, trees = packed
  for tree, rows in zip(trees, found.groups, strict=True):
    for r, row in enumerate(rows):
      for place, q in enumerate(row):
        if q >= 0:
          columns = np.flatnonzero(tree.tree_ids[r] == place)
          yield tree, r, place, int(q), columns


def test_each_question_stands_in_one_row(packed):
  groups = packed[0].groups
  np.testing.assert_array_equal(np.sort(groups[groups >= 0]), np.arange(8))
  assert (groups[..., 1] >= 0).any()  # some share theirs


def test_rows_are_trees_without_gaps(packed, questions, completions):
  for tree, r, _, q, columns in each(packed):
    parts = [questions[q].prompt_ids] + [
      completions[0][q, g, : LENGTHS[q, g]] for g in range(3)
    ]
    np.testing.assert_array_equal(np.diff(columns), 1)
    np.testing.assert_array_equal(tree.ids[r, columns], np.concatenate(parts))
    np.testing.assert_array_equal(
      tree.branch_ids[r, columns],
      np.repeat(np.arange(4), [len(part) for part in parts]),
    )
  for tree in packed[1]:
    for r, taken in enumerate((tree.tree_ids >= 0).sum(1)):
      assert (tree.tree_ids[r, :taken] >= 0).all()
      assert (tree.tree_ids[r, taken:] == -1).all()
      assert (tree.branch_ids[r, taken:] == -1).all()


def test_positions_restart_after_the_prompt_in_each_branch(packed, questions):
  for tree, r, _, q, columns in each(packed):
    question = questions[q]
    counted = np.concatenate([np.arange(n) for n in LENGTHS[q]])
    expected = question.position_ids[:, -1:] + 1 + counted[None]
    np.testing.assert_array_equal(
      tree.position_ids[:, r, columns],
      np.concatenate([question.position_ids, expected], axis=1),
    )


def test_each_target_is_predicted_by_the_token_before_it_in_its_branch(
  packed, questions, completions
):
  ids, mask = completions
  for tree, r, place, q, columns in each(packed):
    room = len(tree.slots) // len(tree.ids)
    slots = tree.slots[r * room + place]
    np.testing.assert_array_equal(slots >= 0, mask[q])
    for g, c in zip(*np.nonzero(mask[q]), strict=True):
      n = slots[g, c]
      before = tree.predictors[r, n]
      assert tree.targets[r, n] == ids[q, g, c]
      assert n < tree.counts[r]
      if c == 0:
        assert before == columns[0] + len(questions[q].prompt_ids) - 1
      else:
        assert tree.ids[r, before] == ids[q, g, c - 1]
        assert tree.branch_ids[r, before] == g + 1
  for tree in packed[1]:
    rows = tree.slots.reshape(len(tree.ids), -1)
    for row, count in zip(rows, tree.counts, strict=True):
      np.testing.assert_array_equal(np.sort(row[row >= 0]), np.arange(count))


def test_visual_tokens_stay_in_the_lane_of_their_row(packed, questions, layout):
  for tree, r, _, q, columns in each(packed):
    question = questions[q]
    own = tree.vision_index[r, columns]
    shown = np.flatnonzero(tree.ids[r, columns] == layout.image_token_id)
    assert (np.delete(own, shown) == -1).all()
    before = (tree.vision_index[r, : columns[0]] >= 0).sum()
    places = token_places(question.image_grid_thw, layout)
    np.testing.assert_array_equal(own[shown], before + places)
    width = question.pixel_values.shape[1]
    pixels = tree.vision.pixel_values[r].reshape(-1, 4, width)
    np.testing.assert_array_equal(
      pixels[own[shown]], question.pixel_values.reshape(-1, 4, width)
    )


def test_a_microbatch_takes_as_many_tokens_as_asked(
  questions, completions, layout
):
  for tokens in (32, 64, 128, 1024):
    found = plan(
      questions, completions[1], tokens=tokens, shards=1, layout=layout
    )
    _, rows, _ = found.groups.shape
    assert rows * found.columns <= max(tokens, 32)
  assert found.groups.shape[:2] == (1, 1)


def test_few_widths_hold_batches_of_any_length(questions, layout):
  """How many tokens there are changes the number of rows, not their width."""
  text = [questions[2]] * 64
  random = np.random.default_rng(0)
  found = set()
  for _ in range(40):
    lengths = random.integers(1, random.integers(20, 300), 64)
    mask = np.arange(300) < lengths[:, None, None]
    one = plan(text, mask, tokens=1024, shards=1, layout=layout)
    if one.groups.shape[0] > 1:
      found.add((*one.groups.shape[1:], one.columns))
  assert {width for *_, width in found} == {512}
  assert len(found) <= 3


def test_every_data_shard_has_as_many_rows(questions, completions, layout):
  for shards in (2, 4):
    found = plan(
      questions, completions[1], tokens=64, shards=shards, layout=layout
    )
    assert found.groups.shape[1] % shards == 0


def test_padding_is_what_rows_and_lanes_hold_beside_groups(packed):
  found, trees = packed
  columns, size = found.padding["columns"]
  assert size == sum(tree.ids.size for tree in trees)
  assert columns == sum((tree.tree_ids < 0).sum() for tree in trees)
  patches, size = found.padding["patches"]
  segments = [tree.vision.full_segments for tree in trees]
  assert size == sum(x.size for x in segments)
  assert patches == sum((x < 0).sum() for x in segments)


def test_rows_share_pictures_as_they_share_columns(questions, layout):
  """Of twelve short groups three have a picture; no row has two."""
  text, shown = questions[2], questions[1]
  mixed = [showing(shown, i // 4) if i % 4 == 0 else text for i in range(12)]
  mask = np.ones((12, 2, 60), bool)
  found = plan(mixed, mask, tokens=512, shards=1, layout=layout)
  assert found.groups.shape[:2] == (3, 1)
  pictures = [
    sum(len(mixed[q].pixel_values) > 0 for q in row if q >= 0)
    for row in found.groups[:, 0]
  ]
  assert pictures == [1, 1, 1]
  assert found.padding["columns"][0] < 0.1 * found.padding["columns"][1]


@families
def test_pictures_of_several_questions_stand_in_a_lane_once(questions, layout):
  """Questions 1 and 3 are asked of the pictures of 0: one copy, equal places."""
  asked = [questions[0], *questions[1:3], questions[0], questions[0]]
  ids = np.arange(5 * 2 * 4, dtype=np.int32).reshape(5, 2, 4)
  mask = np.ones((5, 2, 4), bool)
  given = {"shards": 1, "layout": layout}
  found = plan(asked, mask, tokens=512, **given)
  assert found.groups.shape[:2] == (1, 1)
  shown = len(questions[0].pixel_values) + len(questions[1].pixel_values)
  assert found.used_patches == shown
  tree = pack(found, 0, asked, ids, mask, layout=layout)
  assert (tree.vision.full_segments >= 0).sum() == shown
  index = tree.vision_index[0]
  trees = {
    q: index[(tree.tree_ids[0] == place) & (index >= 0)]
    for place, q in enumerate(found.groups[0, 0, :5])
  }
  first = trees[0].size * layout.patches_per_token
  assert first == len(questions[0].pixel_values)
  for q in (3, 4):
    np.testing.assert_array_equal(trees[q], trees[0])
  assert not set(trees[1]) & set(trees[0])
  # Rows too short for all hold as many side by side as they can.
  two = 2 * (len(questions[0].prompt_ids) + 2 * 4)
  short = plan(asked, mask, tokens=two, **given)
  held = [set(row.tolist()) & {0, 3, 4} for row in short.groups[:, 0]]
  assert len([row for row in held if row]) == 2


groups_of_pictures = st.lists(
  st.tuples(st.integers(1, 300), st.integers(-1, 4)), min_size=1, max_size=24
)


def asked(questions, drawn):
  """Questions and a mask: each of so many tokens, about such a picture."""
  text, shown = questions[2], questions[1]
  lengths = np.array([length for length, _ in drawn])
  return [
    text if picture < 0 else showing(shown, picture) for _, picture in drawn
  ], (np.arange(300) < lengths[:, None])[:, None]


@settings(max_examples=60, deadline=None)
@given(
  groups_of_pictures, st.sampled_from([64, 700, 1024, 4096]), st.integers(1, 3)
)
def test_an_update_encodes_each_picture_once_where_a_microbatch_holds_it(
  layout, questions, drawn, tokens, shards
):
  """Only what is about one picture and longer than a microbatch is split."""
  own, mask = asked(questions, drawn)
  lengths = mask.sum((1, 2)) + [len(q.prompt_ids) for q in own]
  width = capacity(max(int(lengths.max()), min(tokens, 512)), 32)
  found = packing._rows(
    *(own, lengths, alike(own)),
    width=width,
    limit=max(tokens, width),
    tokens=tokens,
    shards=shards,
    lane=lambda patches: patches,
  )
  rows = found.groups.reshape(-1, found.groups.shape[-1])
  budget = max(tokens, capacity(int(lengths.max()), 32))
  assert found.groups.shape[1] // shards * found.columns <= budget
  for row in rows:
    assert lengths[row[row >= 0]].sum() <= found.columns
  encodes = 0
  for picture in {picture for _, picture in drawn} - {-1}:
    shown = [q for q, (_, p) in enumerate(drawn) if p == picture]
    times = sum(bool(set(row.tolist()) & set(shown)) for row in rows)
    whole = lengths[shown].sum()
    # First come, first served: of any two parts one alone is too long.
    assert times == 1 if whole <= budget else times <= 2 * whole / budget + 1
    encodes += times
  assert found.used_patches == encodes * len(questions[1].pixel_values)


@pytest.mark.parametrize("encoded", [False, True])
def test_rows_do_not_grow_where_nothing_is_encoded_twice(
  questions, layout, encoded
):
  """Twelve pictures, or one that a frozen tower has seen before."""
  own, mask = asked(questions, [(200, 0 if encoded else i) for i in range(12)])
  if encoded:
    features = np.zeros((1, 4, 8), np.float32)
    own = [dataclasses.replace(q, features=features) for q in own]
  found = plan(own, mask, tokens=4096, shards=1, layout=layout, patch_cost=1e6)
  assert found.columns == 512
  assert found.groups.shape[:2] == (1, 6)


def test_rows_grow_where_that_costs_less_than_it_spares(questions, layout):
  """Of four groups of a picture two share a row of 512, and three fill it."""
  own, mask = asked(questions, [(200, i // 3) for i in range(6)])

  def columns(patch_cost):
    found = plan(
      own, mask, tokens=4096, shards=1, layout=layout, patch_cost=patch_cost
    )
    rows = found.groups.shape[0] * found.groups.shape[1]
    return rows, found.columns, found.used_patches

  patches = len(questions[1].pixel_values)
  assert columns(0.0) == columns(0.1) == (3, 512, 4 * patches)
  assert columns(1e3) == (2, 1024, 2 * patches)


@settings(max_examples=30, deadline=None)
@given(groups_of_pictures, st.floats(0.01, 100.0))
def test_growing_never_costs_more(layout, questions, drawn, patch_cost):
  own, mask = asked(questions, drawn)
  plain, grown = (
    plan(own, mask, tokens=2048, shards=2, layout=layout, patch_cost=cost)
    for cost in (0.0, patch_cost)
  )
  assert grown.cost(patch_cost) <= plain.cost(patch_cost)


def test_rows_of_shared_pictures_have_few_widths(questions, layout):
  """Batches of eight groups a picture: one size an octave of columns."""
  random = np.random.default_rng(0)
  found = set()
  for _ in range(60):
    longest = random.integers(20, 300)
    drawn = [(int(random.integers(1, longest)), i // 8) for i in range(32)]
    own, mask = asked(questions, drawn)
    one = plan(own, mask, tokens=4096, shards=1, layout=layout, patch_cost=1e6)
    if one.groups.shape[0] * one.groups.shape[1] > 1:
      found.add(one.columns)
  assert {512, 2048} <= found <= {512, 1024, 2048, 4096}


def test_lanes_of_pictures_that_are_alike_hold_them_to_the_patch(
  questions, layout
):
  """Known to be the largest, a picture of 36 patches takes 36, not 48."""
  small = dataclasses.replace(
    questions[1], pixel_values=np.zeros((36, 8), np.float32)
  )
  like = [showing(small, i) for i in range(8)]
  mask = np.ones((8, 2, 60), bool)
  given = {"tokens": 512, "shards": 1, "layout": layout}
  known = plan(like, mask, largest=36, **given)
  row = (known.groups[0, 0] >= 0).sum()
  assert known.patches == 36 * row
  assert plan(like, mask, **given).patches > known.patches
  # One that is much larger does not make lanes wider than they were.
  wide = plan(like, mask, largest=10_000, **given)
  assert wide.patches == plan(like, mask, **given).patches


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(1, 700), min_size=1, max_size=40),
  st.sampled_from([64, 512, 2048]),
  st.integers(1, 4),
)
def test_groups_of_any_length_fit_and_padding_is_bounded(
  layout, questions, lengths, tokens, shards
):
  """Half of a batch that fills its rows is not padding, whatever the lengths."""
  text = questions[2]
  mask = np.arange(700) < np.array(lengths)[:, None]
  found = plan(
    [text] * len(lengths),
    mask[:, None],
    tokens=tokens,
    shards=shards,
    layout=layout,
  )
  sizes = np.array(lengths) + len(text.prompt_ids)
  for row in found.groups.reshape(-1, found.groups.shape[-1]):
    assert sizes[row[row >= 0]].sum() <= found.columns
  np.testing.assert_array_equal(
    np.sort(found.groups[found.groups >= 0]), np.arange(len(lengths))
  )
  empty, size = found.padding["columns"]
  assert size - empty == sizes.sum()
  if sizes.sum() > 4 * shards * max(tokens, found.columns):
    assert empty < 0.5 * size


def test_what_is_spread_over_microbatches_is_collected(packed):
  found, trees = packed
  values = np.random.default_rng(0).normal(size=(8, 3))
  parts = [found.spread(values, u) for u in range(len(trees))]
  assert all(len(part) == len(trees[0].slots) for part in parts)
  np.testing.assert_array_equal(found.collect(parts), values)
  assert sum((part != 0).sum() for part in parts) == values.size


def test_a_batch_of_text_alone_has_no_vision(questions, completions, layout):
  rows = [i for i, q in enumerate(questions) if not len(q.image_grid_thw)]
  text = [questions[row] for row in rows]
  own = tuple(x[rows] for x in completions)
  found = plan(text, own[1], tokens=64, shards=1, layout=layout)
  assert found.padding["patches"] == (0, 0)
  assert pack(found, 0, text, *own, layout=layout).vision is None


def test_a_microbatch_of_text_beside_one_with_pictures_keeps_a_lane(
  questions, completions, layout
):
  rows = [0, 2]  # two pictures; none
  two = [questions[r] for r in rows]
  own = tuple(x[rows] for x in completions)
  found = plan(two, own[1], tokens=32, shards=1, layout=layout)
  vision = pack(found, 1, two, *own, layout=layout).vision
  assert (vision.full_segments == -1).all()


def test_a_shard_without_groups_is_padding(questions, completions, layout):
  """More shards than groups."""
  own = tuple(x[:1] for x in completions)
  found = plan(questions[:1], own[1], tokens=64, shards=4, layout=layout)
  tree = pack(found, 0, questions[:1], *own, layout=layout)
  assert (tree.tree_ids >= 0).any(1).tolist() == [True, False, False, False]
  assert tree.counts.tolist() == [LENGTHS[0].sum(), 0, 0, 0]


def test_a_masked_group_has_a_prompt_and_no_targets(
  questions, completions, layout
):
  ids, mask = completions
  kept = mask & (np.arange(8) != 3)[:, None, None]
  found = plan(questions, kept, tokens=1024, shards=1, layout=layout)
  tree = pack(found, 0, questions, ids, kept, layout=layout)
  assert (tree.slots[3] == -1).all()
  own = tree.tree_ids[0] == found.groups[0, 0].tolist().index(3)
  assert own.sum() == len(questions[3].prompt_ids)


def test_microbatches_come_as_global_arrays(
  questions, completions, layout, make_mesh
):
  packed = Packed(
    questions,
    *completions,
    tokens=64,
    mesh=make_mesh(2, 1, 1),
    layout=layout,
  )
  values = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  parts = [packed.place(values, u) for u in range(len(packed))]
  for u, part in enumerate(parts):
    tree = packed.tree(u)
    assert len(part) == len(tree.slots)
    assert len(tree.ids.addressable_shards) == 2
  np.testing.assert_array_equal(packed.collect(parts), values)
  assert packed.place(None, 0) is None
