"""Places equal transformers' own, and lanes keep their pictures apart."""

import types

import numpy as np
import pytest
import torch
from transformers import vision_utils
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from jaxvlm.data import vision_layout
from jaxvlm.types import Example, Question

IMAGE = 9
LAYOUT = vision_layout.Layout.from_config(
  {"image_token_id": IMAGE, "vision_config": {"window_size": 112}}
)


def make_question(question_id, grids, *, text=3, width=6, fill=1.0):
  ids = [1] * text
  for t, h, w in grids:
    ids += [2, *[IMAGE] * (t * h * w // 4), 3]
  ids = np.array([*ids, 4], np.int32)
  grids = np.array(grids, np.int32).reshape(-1, 3)
  patches = int(grids.prod(-1).sum())
  return Question(
    question_id=question_id,
    example=Example(problem="", answer="x"),
    prompt_ids=ids,
    position_ids=vision_layout.mrope_positions(ids, grids, LAYOUT),
    pixel_values=np.full((patches, width), fill, np.float32),
    image_grid_thw=grids,
  )


def random_grids(rng, count):
  return [[1, *(2 * rng.integers(1, 12, 2)).tolist()] for _ in range(count)]


def test_capacities_are_few_and_hold_what_they_must():
  ladder = sorted({vision_layout.capacity(n) for n in range(1, 900)})
  assert ladder == [
    *(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    *(320, 384, 448, 512, 640, 768, 896, 1024),
  ]
  assert all(vision_layout.capacity(n) >= n for n in range(2000))
  assert vision_layout.capacity(5, 16) == 16
  assert vision_layout.capacity(0) == 1


def test_layout_reads_the_checkpoints_numbers():
  vision = {"spatial_merge_size": 3, "patch_size": 16, "window_size": 96}
  layout = vision_layout.Layout.from_config(
    {"image_token_id": 7, "vision_config": vision}
  )
  assert layout == vision_layout.Layout(
    image_token_id=7,
    spatial_merge_size=3,
    patch_size=16,
    window_size=96,
    places=None,
  )
  vision = {"patch_size": 16, "num_position_embeddings": 2304}
  layout = vision_layout.Layout.from_config({"vision_config": vision})
  assert (layout.places, layout.window_size) == (48, None)


def test_positions_of_two_pictures_are_those_of_the_worked_example():
  i = IMAGE
  ids = np.array([1, 2, i, i, i, i, 3, 1, 2, i, i, i, i, 3, 1])
  positions = vision_layout.mrope_positions(
    ids, np.array([[1, 4, 4], [1, 2, 8]]), LAYOUT
  )
  assert positions.tolist() == [
    [0, 1, 2, 2, 2, 2, 4, 5, 6, 7, 7, 7, 7, 11, 12],
    [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7, 7, 7, 11, 12],
    [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
  ]


@pytest.mark.parametrize("seed", range(8))
def test_positions_equal_get_rope_index(seed):
  rng = np.random.default_rng(seed)
  grids = random_grids(rng, seed % 4)
  question = make_question(0, grids, text=int(rng.integers(1, 9)))
  ids = torch.from_numpy(question.prompt_ids.astype(np.int64))[None]
  family = modeling_qwen2_5_vl.Qwen2_5_VLModel
  vision = types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
  model = types.SimpleNamespace(
    config=types.SimpleNamespace(vision_config=vision)
  )
  model.get_vision_position_ids = family.get_vision_position_ids.__get__(model)
  want, _ = family.get_rope_index(
    model,
    ids,
    (ids == IMAGE).int(),
    image_grid_thw=torch.tensor(grids) if grids else None,
  )
  np.testing.assert_array_equal(question.position_ids, want[:, 0].numpy())


def test_image_tokens_that_do_not_fit_the_grids_are_refused():
  ids = np.array([1, IMAGE, IMAGE, 2])
  with pytest.raises(ValueError, match=r"runs of \[2\].*need \[1\]"):
    vision_layout.mrope_positions(ids, np.array([[1, 2, 2]]), LAYOUT)
  with pytest.raises(ValueError, match=r"runs of \[\].*need \[1\]"):
    vision_layout.mrope_positions(ids[:1], np.array([[1, 2, 2]]), LAYOUT)


@pytest.mark.parametrize("window_size", [56, 112])
def test_coordinates_and_segments_equal_transformers(window_size):
  rng = np.random.default_rng(window_size)
  grids = [*random_grids(rng, 4), [3, 6, 10], [1, 8, 8]]
  layout = vision_layout.Layout.from_config(
    {"vision_config": {"window_size": window_size}}
  )
  places = vision_layout.patch_places(np.array(grids), layout)

  thw = torch.tensor(grids)
  coordinates = vision_utils.get_vision_position_ids(thw, 2).numpy()
  np.testing.assert_array_equal(places.rows, coordinates[places.order, 0])
  np.testing.assert_array_equal(places.cols, coordinates[places.order, 1])

  full = np.diff(vision_utils.get_vision_cu_seqlens(thw).numpy())
  full = np.repeat(np.arange(len(full)), full)
  np.testing.assert_array_equal(places.full_segments, full[places.order])

  order, bounds = vision_utils.get_vision_window_index(
    thw, 2, window_size, patch_size=14
  )
  lengths = np.diff(bounds.numpy())
  np.testing.assert_array_equal(places.order[::4] // 4, order.numpy())
  np.testing.assert_array_equal(
    places.window_segments, np.repeat(np.arange(len(lengths)), lengths)
  )
  # The i-th visual token of the prompt stands where the order put it.
  np.testing.assert_array_equal(
    vision_layout.token_places(np.array(grids), layout)[order.numpy()],
    np.arange(len(order)),
  )


def layout_of(side):
  return vision_layout.Layout.from_config(
    {
      "image_token_id": IMAGE,
      "vision_config": {"patch_size": 16, "num_position_embeddings": side**2},
    }
  )


@pytest.mark.parametrize("side", [1, 2, 7, 48])
def test_learned_positions_are_interpolated_as_transformers_does(side):
  rng = np.random.default_rng(side)
  sizes = [(2, 2), (2, 80), (80, 2), (48, 48), (96, 94), (14, 12), (60, 34)]
  sizes += (2 * rng.integers(1, 90, (20, 2))).tolist()
  grids = [[1, *size] for size in sizes] + [[3, 4, 6]]
  places = vision_layout.patch_places(np.array(grids), layout_of(side))
  index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
    torch.tensor(grids), side, align_corners=True, spatial_merge_size=2
  )
  np.testing.assert_array_equal(places.place_index, index.numpy())
  np.testing.assert_array_equal(places.place_weight, weight.numpy())
  assert places.place_weight.dtype == np.float32
  assert places.window_segments is None


def test_padding_has_no_learned_position():
  questions = [make_question(0, [[1, 2, 4]]), make_question(1, [[1, 6, 4]])]
  vision = vision_layout.pack_vision(
    [[q] for q in questions], layout=layout_of(7)
  )
  assert vision.window_segments is None
  weight = vision.place_weight.sum(-1)
  np.testing.assert_allclose(weight[vision.full_segments >= 0], 1, rtol=1e-6)
  assert (weight[vision.full_segments < 0] == 0).all()
  for lane, question in enumerate(questions):
    n = len(question.pixel_values)
    alone = vision_layout.patch_places(question.image_grid_thw, layout_of(7))
    for name in ("place_index", "place_weight"):
      np.testing.assert_array_equal(
        getattr(vision, name)[lane, :n], getattr(alone, name)
      )


def test_a_lane_has_the_pictures_of_its_own_questions():
  questions = [
    make_question(10, [[1, 4, 4], [1, 2, 4]], fill=1),
    make_question(11, [], text=7),
    make_question(12, [[1, 2, 2]], fill=3),
    make_question(2**32 - 1, [[1, 4, 2]], fill=4),
  ]
  vision = vision_layout.pack_vision(
    [questions[:2], questions[2:]], layout=LAYOUT
  )
  assert vision.pixel_values.shape == (2, 24, 6)
  assert vision.pixel_values[:, :, 0].tolist() == [
    [1.0] * 24,
    [3.0] * 4 + [4.0] * 8 + [0.0] * 12,
  ]
  assert vision.full_segments.tolist() == [
    [0] * 16 + [1] * 8,
    [0] * 4 + [1] * 8 + [-1] * 12,
  ]
  assert (vision.window_segments[1, 12:] == -1).all()


def test_windows_of_one_lane_never_join_two_pictures():
  questions = [make_question(i, [[1, 10, 16], [1, 6, 4]]) for i in range(2)]
  vision = vision_layout.pack_vision([questions], layout=LAYOUT)
  pairs = {
    (full, window)
    for full, window in zip(
      vision.full_segments[0], vision.window_segments[0], strict=True
    )
    if full >= 0
  }
  assert len(pairs) == len({window for _, window in pairs}) == 10


def test_text_alone_has_no_vision_unless_a_capacity_is_agreed():
  questions = [make_question(i, []) for i in range(2)]
  slices = [[q] for q in questions]
  assert vision_layout.pack_vision(slices, layout=LAYOUT) is None
  vision = vision_layout.pack_vision(slices, layout=LAYOUT, patches=32)
  assert vision.pixel_values.shape == (2, 32, 6)
  assert (vision.full_segments == -1).all()


def test_sizes_that_do_not_fit_are_refused():
  questions = [make_question(i, [[1, 4, 4]]) for i in range(3)]
  for patches in (16, 50):  # too few; not whole tokens
    with pytest.raises(ValueError, match=f"capacity {patches}"):
      vision_layout.pack_vision([questions], layout=LAYOUT, patches=patches)
