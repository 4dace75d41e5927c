"""Packed-tree rows, checked column by column on the host."""

import jax
import numpy as np
import pytest

from jaxvlm.data.vision_layout import token_places
from jaxvlm.packing import pack, unbatch

LENGTHS = np.array(
  [[3, 1, 2], [1, 1, 1], [4, 4, 4], [2, 0, 1]] * 2
)  # [Q G], as many completion tokens
WIDTH = 4


@pytest.fixture(scope="module")
def completions():
  ids = np.arange(8 * 3 * WIDTH, dtype=np.int32).reshape(8, 3, WIDTH) + 100
  return ids, np.arange(WIDTH) < LENGTHS[..., None]


def packed(questions, completions, layout, microbatches=1):
  return pack(questions, *completions, microbatches=microbatches, layout=layout)


def test_a_row_is_the_prompt_and_its_completions_without_gaps(
  questions, completions, layout
):
  tree = packed(questions, completions, layout)
  for q, question in enumerate(questions):
    parts = [question.prompt_ids] + [
      completions[0][q, g, : LENGTHS[q, g]] for g in range(3)
    ]
    ids = np.concatenate(parts)
    branches = np.repeat(np.arange(4), [len(part) for part in parts])
    np.testing.assert_array_equal(tree.ids[0, q, : len(ids)], ids)
    np.testing.assert_array_equal(tree.branch_ids[0, q, : len(ids)], branches)
    assert (tree.branch_ids[0, q, len(ids) :] == -1).all()
    assert (tree.ids[0, q, len(ids) :] == 0).all()


def test_positions_restart_after_the_prompt_in_each_branch(
  questions, completions, layout
):
  tree = packed(questions, completions, layout)
  for q, question in enumerate(questions):
    prompt = len(question.prompt_ids)
    own = tree.position_ids[0, :, q]
    np.testing.assert_array_equal(own[:, :prompt], question.position_ids)
    counted = np.concatenate([np.arange(n) for n in LENGTHS[q]])
    expected = question.position_ids[:, -1:] + 1 + counted[None]
    np.testing.assert_array_equal(
      own[:, prompt : prompt + len(counted)], expected
    )


def test_each_target_is_predicted_by_the_token_before_it_in_its_branch(
  questions, completions, layout
):
  ids, mask = completions
  tree = packed(questions, completions, layout)
  for q, g, c in zip(*np.nonzero(mask), strict=True):
    n = tree.slots[0, q, g, c]
    before = tree.predictors[0, q, n]
    prompt = questions[q].prompt_ids
    assert tree.targets[0, q, n] == ids[q, g, c]
    if c == 0:
      assert before == len(prompt) - 1
    else:
      assert tree.ids[0, q, before] == ids[q, g, c - 1]
      assert tree.branch_ids[0, q, before] == g + 1
  np.testing.assert_array_equal(tree.slots[0] >= 0, mask)
  taken = [np.sort(row[row >= 0]) for row in tree.slots[0].reshape(8, -1)]
  for q, row in enumerate(taken):
    np.testing.assert_array_equal(row, np.arange(LENGTHS[q].sum()))


def test_visual_tokens_stay_in_the_lane_of_their_question(
  questions, completions, layout
):
  tree = packed(questions, completions, layout)
  assert tree.vision.pixel_values.shape[:2] == (1, 8)
  for q, question in enumerate(questions):
    index = tree.vision_index[0, q]
    shown = np.flatnonzero(tree.ids[0, q] == layout.image_token_id)
    grids = question.image_grid_thw
    places = token_places(grids, layout)
    np.testing.assert_array_equal(index[shown], places)
    assert (np.delete(index, shown) == -1).all()
    patches, width = question.pixel_values.shape
    np.testing.assert_array_equal(
      tree.vision.pixel_values[0, q, :patches].reshape(-1, 4, width)[places],
      question.pixel_values.reshape(-1, 4, width),
    )
    assert (tree.vision.full_segments[0, q, patches:] == -1).all()


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_are_slices_of_one_shape(
  questions, completions, layout, microbatches
):
  whole = packed(questions, completions, layout)
  split = packed(questions, completions, layout, microbatches)
  for name in ("ids", "branch_ids", "vision_index", "targets", "slots"):
    np.testing.assert_array_equal(
      getattr(split, name), unbatch(getattr(whole, name)[0], microbatches)
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, unbatch(b[0], microbatches)),
    split.vision,
    whole.vision,
  )


def test_a_batch_of_text_alone_has_no_vision(questions, completions, layout):
  text = [q for q in questions if not len(q.image_grid_thw)]
  rows = [i for i, q in enumerate(questions) if not len(q.image_grid_thw)]
  own = tuple(x[rows] for x in completions)
  assert packed(text, own, layout).vision is None


def test_a_microbatch_of_text_beside_one_with_pictures_keeps_a_lane(
  questions, completions, layout
):
  rows = [0, 2]  # two pictures; none
  own = tuple(x[rows] for x in completions)
  tree = packed([questions[r] for r in rows], own, layout, 2)
  assert tree.vision.pixel_values.shape[:2] == (2, 1)
  assert (tree.vision.full_segments[1] == -1).all()


def test_a_masked_group_has_a_prompt_and_no_targets(
  questions, completions, layout
):
  ids, mask = completions
  kept = mask & (np.arange(8) != 3)[:, None, None]
  tree = packed(questions, (ids, kept), layout)
  assert (tree.slots[0, 3] == -1).all()
  assert (tree.branch_ids[0, 3] >= 0).sum() == len(questions[3].prompt_ids)
