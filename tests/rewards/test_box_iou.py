"""rewards/box_iou.py."""

import pytest

from jaxvlm.rewards.box_iou import Box, iou, one_box, reward
from jaxvlm.types import Example

# A picture of 200 x 100 pixels; its right half is the object.
SIZES = {"picture_sizes": ((100, 200),)}
SAME = Example(
  problem="?", answer="[100, 0, 200, 100]", box_sizes=((100, 200),), **SIZES
)
RESIZED = Example(
  problem="?", answer="[100, 0, 200, 100]", box_sizes=((56, 84),), **SIZES
)
THOUSANDTHS = Example(
  problem="?", answer="[100, 0, 200, 100]", box_sizes=((1000, 1000),), **SIZES
)


@pytest.mark.parametrize(
  ("a", "b", "expected"),
  [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
    ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
    ((0, 0, 4, 4), (1, 1, 2, 3), 2 / 16),
    ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),  # they touch
    ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
    ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),  # corners in the wrong order
    ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ((-2, -2, 2, 2), (0, 0, 2, 2), 1 / 4),
  ],
)
def test_the_overlap_is_intersection_over_union(a, b, expected):
  assert iou(Box(*a), Box(*b)) == iou(Box(*b), Box(*a)) == expected


@pytest.mark.parametrize(
  "text",
  [
    "[1, 2, 3.5, 4]",
    "(1,2,3.5,4)",
    "[[1, 2, 3.5, 4]]",
    '```json\n[{"bbox_2d": [1, 2, 3.5, 4], "label": "player 23"}]\n```',
  ],
)
def test_one_box_is_read(text):
  assert one_box(text) == (1, 2, 3.5, 4)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "1, 2, 3, 4",
    "[1, 2, 3]",
    "[1, 2, 3, 4, 5]",
    "[1, 2, 3, 4, 1, 2, 3, 4]",
    "[1, 2, 3, 4] or [5, 6, 7, 8]",
    "[1, 2, 3, 4](1, 2, 3, 4)",
    "[[1, 2, 3, 4], [1, 2, 3, 4]]",
    "[1, 2, nan, 4]",
    "[1, 2, 1e9, 4]",
    "[0, 0, " + "9" * 400 + ", 4]",
  ],
)
def test_none_or_several_boxes_are_no_answer(text):
  assert one_box(text) is None
  assert reward(f"<answer>{text}</answer>", SAME) == 0.0


@pytest.mark.parametrize(
  ("row", "right"),
  [
    (SAME, "[100, 0, 200, 100]"),
    (RESIZED, "[42, 0, 84, 56]"),
    (THOUSANDTHS, "[500, 0, 1000, 1000]"),
  ],
)
def test_a_box_is_scaled_from_the_models_units_to_the_pictures(row, right):
  assert reward(f"<answer>{right}</answer>", row) == 1.0
  for other in (SAME, RESIZED, THOUSANDTHS):
    if other is not row:
      assert reward(f"<answer>{right}</answer>", other) < 0.6


def test_width_and_height_are_scaled_apart():
  # The middle half of the object's height, the whole of its width.
  assert reward("<answer>[42, 14, 84, 42]</answer>", RESIZED) == 0.5
  assert reward(r"\boxed{[500, 250, 1000, 750]}", THOUSANDTHS) == 0.5


def test_many_boxes_score_nothing_though_one_is_right():
  right = "[100, 0, 200, 100]"
  spam = ", ".join([right] + [f"[{i}, 0, {i + 50}, 100]" for i in range(9)])
  assert reward(f"<answer>{right}</answer>", SAME) == 1.0
  assert reward(f"<answer>[{spam}]</answer>", SAME) == 0.0
  assert reward(f"<answer>[{spam}]</answer>", SAME, threshold=0.1) == 0.0


def test_a_threshold_pays_all_or_nothing():
  half = "<answer>[100, 0, 150, 100]</answer>"
  assert reward(half, SAME) == 0.5
  assert reward(half, SAME, threshold=0.5) == 1.0
  assert reward(half, SAME, threshold=0.51) == 0.0


def test_a_box_outside_of_the_answer_is_none():
  assert reward("[100, 0, 200, 100]", SAME) == 0.0
  assert reward("<think>[100, 0, 200, 100]</think>", SAME) == 0.0


@pytest.mark.parametrize(
  "gold", ["", "None", "[1, 1, 1, 1]", "[3, 3, 1, 1]", "[1, 2, 3]"]
)
def test_a_row_whose_answer_is_not_a_box_is_refused(gold):
  row = Example(problem="?", answer=gold, box_sizes=((1, 1),), **SIZES)
  with pytest.raises(ValueError, match="is not one box"):
    reward(f"<answer>{gold}</answer>", row)


@pytest.mark.parametrize("count", [0, 2])
def test_a_row_without_one_picture_is_refused(count):
  sizes = ((100, 200),) * count
  row = Example(
    problem="?", answer="[1, 2, 3, 4]", picture_sizes=sizes, box_sizes=sizes
  )
  with pytest.raises(ValueError, match=f"the row has {count} pictures"):
    reward("<answer>[1, 2, 3, 4]</answer>", row)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5])
def test_a_threshold_is_above_0_and_up_to_1(threshold):
  with pytest.raises(ValueError, match=f"threshold={threshold}"):
    reward("", SAME, threshold=threshold)
