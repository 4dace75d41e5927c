"""Questions without a tokenizer: pictures of noise between made-up tokens."""

import numpy as np

from jaxvlm.data.vision_layout import mrope_positions
from jaxvlm.types import Example, Question

IMAGE = 5


def make_question(random, layout, number, sizes, words):
  """Three tokens, pictures of so many rows and columns of patches, and words."""
  grids = np.array([(1, *size) for size in sizes], np.int32).reshape(-1, 3)
  ids = [7, 8, 20 + number]
  for _, h, w in grids.tolist():
    ids += [3, *[IMAGE] * (h * w // 4), 4]
  ids = np.array([*ids, *np.resize([10, 30], words)], np.int32)
  shape = (int(grids.prod(axis=1).sum()), 6 * layout.patch_size**2)
  return Question(
    question_id=100 + number,
    example=Example(problem=f"question {number}", answer="x"),
    prompt_ids=ids,
    position_ids=mrope_positions(ids, grids, layout),
    pixel_values=random.normal(size=shape).astype(np.float32),
    image_grid_thw=grids,
  )
