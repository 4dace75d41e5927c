"""The final answer is a box that overlaps the row's: intersection over union."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from jaxvlm.rewards import final_answer

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

_NUMBER = r"\s*([+-]?\d{1,6}(?:\.\d{0,6})?)\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


class Box(NamedTuple):
  left: float
  top: float
  right: float
  bottom: float

  @property
  def area(self) -> float:
    """0 for what has its corners in the wrong order."""
    return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)


def one_box(text: str) -> Box | None:
  """The box [x1, y1, x2, y2] or (...) of a text; None: none or several.

  What stands around it does not count, so JSON with a label is read too.
  """
  found = _BOX.findall(text)
  return Box(*map(float, found[0])) if len(found) == 1 else None


def iou(a: Box, b: Box) -> float:
  """Area of the intersection over that of the union; edges are lines."""
  inner = Box(
    max(a.left, b.left),
    max(a.top, b.top),
    min(a.right, b.right),
    min(a.bottom, b.bottom),
  ).area
  union = a.area + b.area - inner
  return inner / union if union > 0 else 0.0


def reward(
  completion: str, example: Example, *, threshold: float | None = None
) -> float:
  """The overlap of the one box in the answer with the row's box.

  The row's box is in pixels of the picture as it was given. The answer's is in
  the model's own units (pixels after the resize for Qwen2.5-VL, thousandths of
  the sides for Qwen3-VL) and is scaled to the same: x by picture width / box
  width. An answer of several boxes scores nothing.

  Args:
    completion: text.
    example: with one picture.
    threshold: None: the overlap itself, 0 to 1. A number: 1 from this overlap
      on, else 0.

  Raises:
    ValueError: the row has not one picture, its answer not one box with an
      area, or threshold is not in 0..1.
  """
  if threshold is not None and not 0 < threshold <= 1:
    raise ValueError(f"threshold={threshold}: expected above 0 and up to 1")
  if len(example.picture_sizes) != 1:
    raise ValueError(
      f"the row has {len(example.picture_sizes)} pictures; a box is in one"
    )
  gold = one_box(example.answer)
  if gold is None or not gold.area:
    raise ValueError(f"the row's answer {example.answer!r} is not one box")
  box = one_box(final_answer(completion) or "")
  if box is None:
    return 0.0
  ((height, width),) = example.picture_sizes
  ((rows, columns),) = example.box_sizes
  x, y = width / columns, height / rows
  scaled = Box(box.left * x, box.top * y, box.right * x, box.bottom * y)
  overlap = iou(scaled, gold)
  return overlap if threshold is None else float(overlap >= threshold)
