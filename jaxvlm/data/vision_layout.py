"""Where every token and patch stands, computed on the host in numpy.

Positions, coordinates, attention segments and gather indices depend on the
pictures' sizes. They are made here and padded to few capacities, so that jit
sees capacities alone and never a picture.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float, Int

from jaxvlm.types import Features, Question, Unmerged, Vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """What of a checkpoint's config.json decides the places."""

  image_token_id: int
  spatial_merge_size: int  # a visual token is a square of this many patches
  patch_size: int  # pixels
  window_size: int | None  # pixels, side of an attention window; None: none
  places: int | None  # a side of the table of learned positions; None: none

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> Self:
    """Reads a parsed config.json; what is absent has HF's class default."""
    vision = config.get("vision_config", {})
    places = vision.get("num_position_embeddings")
    return cls(
      image_token_id=config.get("image_token_id", 151655),
      spatial_merge_size=vision.get("spatial_merge_size", 2),
      patch_size=vision.get("patch_size", 14),
      window_size=vision.get("window_size"),
      places=math.isqrt(places) if places else None,
    )

  @property
  def patches_per_token(self) -> int:
    return self.spatial_merge_size**2


class PatchPlaces(NamedTuple):
  """For each patch of a lane; segments count from 0 and rise.

  The fields but the first are those of `Vision`.
  """

  order: Int[np.ndarray, " L"]  # its place in pixel_values
  rows: Int[np.ndarray, " L"]
  cols: Int[np.ndarray, " L"]
  full_segments: Int[np.ndarray, " L"]  # the (picture, frame)
  window_segments: Int[np.ndarray, " L"] | None  # its window
  place_index: Int[np.ndarray, "L 4"] | None
  place_weight: Float[np.ndarray, "L 4"] | None


def capacity(n: int, minimum: int = 1) -> int:
  """The smallest of 1, 2, 3, 4, 6, 8, ..., 256, 320, ... that holds both.

  Two sizes an octave, and four above 256: a short buffer is compiled for few
  sizes, and little of a long one is padding.
  """
  need = max(n, minimum, 1)
  power = 1 << (need - 1).bit_length()
  step = max(power // (8 if power > 256 else 4), 1)
  return -(-need // step) * step


def mrope_positions(
  prompt_ids: Int[np.ndarray, " P"],
  image_grid_thw: Int[np.ndarray, "I 3"],
  layout: Layout,
) -> Int[np.ndarray, "3 P"]:
  """Time, row and column position of each token of one unpadded prompt.

  Equal to Qwen2_5_VLModel.get_rope_index of transformers 5.23 for pictures:
  text counts on all three axes; a picture spans its merged grid, and the text
  after it goes on max(rows, columns) later.

  Raises:
    ValueError: the runs of image tokens are not those that the grids need.
  """
  merge = layout.spatial_merge_size
  images = np.flatnonzero(prompt_ids == layout.image_token_id)
  breaks = np.flatnonzero(np.diff(images) > 1) + 1
  runs = np.split(images, breaks) if images.size else []
  sizes = [int(t * h * w) // merge**2 for t, h, w in image_grid_thw]
  if [len(run) for run in runs] != sizes:
    raise ValueError(
      f"image tokens stand in runs of {[len(run) for run in runs]}, but the "
      f"pictures need {sizes}; each picture is one run, parted by text."
    )
  positions = np.empty((3, len(prompt_ids)), np.int32)
  column, current = 0, 0
  for run, (t, h, w) in zip(runs, image_grid_thw, strict=True):
    text = int(run[0]) - column
    positions[:, column : run[0]] = current + np.arange(text)
    current += text
    grid = np.indices((t, h // merge, w // merge)).reshape(3, -1)
    positions[:, run] = current + grid
    current += max(h, w) // merge
    column = int(run[-1]) + 1
  positions[:, column:] = current + np.arange(len(prompt_ids) - column)
  return positions


@functools.lru_cache(maxsize=1024)
def _picture_places(t: int, h: int, w: int, layout: Layout) -> PatchPlaces:
  """Those of one picture."""
  # The processor's order: frame, block row, block column, row, column.
  merge = layout.spatial_merge_size
  shape = (t, h // merge, w // merge, merge, merge)
  frame, block_row, block_col, row, col = np.indices(shape).reshape(5, -1)
  rows = block_row * merge + row
  cols = block_col * merge + col
  order = np.arange(rows.size)
  windows, index, weight = None, None, None
  if layout.window_size:
    side = layout.window_size // layout.patch_size // merge * merge
    down, across = -(-h // side), -(-w // side)
    windows = (frame * down + rows // side) * across + cols // side
    order = np.argsort(windows, kind="stable")  # merge blocks stay whole
    rows, cols, frame = rows[order], cols[order], frame[order]
    windows = windows[order].astype(np.int32)
  if layout.places:
    index, weight = _nearest_places(rows, cols, h, w, layout.places)
  places = PatchPlaces(
    order=order.astype(np.int32),
    rows=rows.astype(np.int32),
    cols=cols.astype(np.int32),
    full_segments=frame.astype(np.int32),
    window_segments=windows,
    place_index=index,
    place_weight=weight,
  )
  for array in places:
    if array is not None:
      array.setflags(write=False)
  return places


def _nearest_places(
  rows: np.ndarray, cols: np.ndarray, h: int, w: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
  """Bilinear interpolation of a table of side * side places, corners aligned.

  Equal to get_vision_interpolation_indices_and_weights of transformers 5.23,
  rounding included: int32 and float32 [L 4], in the order of (upper, lower)
  row times (left, right) column.
  """

  def along(places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    scaled = places.astype(np.float32) * np.float32(side - 1)
    at = scaled / np.float32(max(size - 1, 1))
    low = np.floor(at)
    near = low[:, None] + np.arange(2, dtype=np.float32)
    weight = np.float32(1) - np.abs(at[:, None] - near)
    return np.minimum(near, side - 1).astype(np.int32), np.maximum(weight, 0)

  row_index, row_weight = along(rows, h)
  col_index, col_weight = along(cols, w)
  index = row_index[:, :, None] * side + col_index[:, None, :]
  weight = row_weight[:, :, None] * col_weight[:, None, :]
  return index.reshape(-1, 4), weight.reshape(-1, 4)


def patch_places(
  image_grid_thw: Int[np.ndarray, "I 3"], layout: Layout
) -> PatchPlaces:
  """Where the patches of one lane's pictures, at least one, stand.

  Equal full_segments see each other in full blocks, equal window_segments in
  window blocks. Where there are windows, patches stand window by window, as
  Hugging Face sorts them; windows are cut short at the edges.
  """
  parts = []
  patches, frames, windows = 0, 0, 0
  for t, h, w in np.asarray(image_grid_thw).tolist():
    part = _picture_places(t, h, w, layout)
    own = part.window_segments
    parts.append(
      part._replace(
        order=part.order + patches,
        full_segments=part.full_segments + frames,
        window_segments=None if own is None else own + windows,
      )
    )
    patches += t * h * w
    frames += t
    windows += 0 if own is None else int(own[-1]) + 1
  joined: list[Any] = [
    None if field[0] is None else np.concatenate(field)
    for field in zip(*parts, strict=True)
  ]
  return PatchPlaces(*joined)


def token_places(
  image_grid_thw: Int[np.ndarray, "I 3"], layout: Layout
) -> Int[np.ndarray, " M"]:
  """Where each visual token, in the prompt's order, stands in a lane."""
  if len(image_grid_thw) == 0:
    return np.zeros(0, np.int32)
  size = layout.patches_per_token
  order = patch_places(image_grid_thw, layout).order[::size] // size
  return np.argsort(order).astype(np.int32)


def patch_capacity(patches: int, layout: Layout) -> int:
  """The lane that holds so many patches; 0 for none."""
  tokens = patches // layout.patches_per_token
  return capacity(tokens, 4) * layout.patches_per_token if tokens else 0


def alike(questions: Sequence[Question]) -> Int[np.ndarray, " Q"]:
  """For each question the first that shows the same pictures; text: itself."""
  found = np.arange(len(questions))
  seen: dict[bytes, list[int]] = {}
  for q, question in enumerate(questions):
    pixels = question.pixel_values
    if not len(pixels):
      continue
    few = pixels[:: max(len(pixels) // 4, 1)]  # tells most of them apart
    others = seen.setdefault(
      question.image_grid_thw.tobytes() + few.tobytes(), []
    )
    for other in others:
      if np.array_equal(questions[other].pixel_values, pixels):
        found[q] = other
        break
    else:
      others.append(q)
  return found


def pack_vision(
  slices: Sequence[Sequence[Question]],
  *,
  layout: Layout,
  patches: int | None = None,
  like: Question | None = None,
) -> Vision | Unmerged | Features | None:
  """One lane of patches for each slice of questions.

  Args:
    slices: the questions beside each lane, in order.
    layout: of the checkpoint.
    patches: L. None: the capacity of the fullest lane. 0: text alone.
    like: any question of the batch, for what a patch or a visual token is.
      None: the first one of the slices.

  Returns:
    A lane has its pictures first, those of a question together, then padding:
    pixels 0, coordinates 0, segments -1. None when L is 0. Of questions whose
    pictures were encoded before, their features in the same places.

  Raises:
    ValueError: a lane holds more than `patches`.
  """
  counts = [sum(len(q.pixel_values) for q in part) for part in slices]
  if patches is None:
    patches = patch_capacity(max(counts), layout)
  if max(counts) > patches or patches % layout.patches_per_token:
    raise ValueError(
      f"lanes of {counts} patches do not fit the capacity {patches}, which "
      f"is a multiple of {layout.patches_per_token}."
    )
  if patches == 0:
    return None
  if like is None:
    like = next(q for part in slices for q in part)
  if like.features is not None:
    tokens = patches // layout.patches_per_token
    return _pack_features(slices, tokens, like.features)
  width = like.pixel_values.shape[1]
  lanes = (len(slices), patches)

  def filled(value: int) -> np.ndarray:
    return np.full(lanes, value, np.int32)

  vision = Vision(
    pixel_values=np.empty((*lanes, width), np.float32),
    rows=filled(0),
    cols=filled(0),
    full_segments=filled(-1),
    window_segments=filled(-1) if layout.window_size else None,
    place_index=np.zeros((*lanes, 4), np.int32) if layout.places else None,
    place_weight=np.zeros((*lanes, 4), np.float32) if layout.places else None,
  )
  for s, part in enumerate(slices):
    vision.pixel_values[s, counts[s] :] = 0
    if n := counts[s]:
      grids = np.concatenate([q.image_grid_thw for q in part])
      found = patch_places(grids, layout)
      at = 0
      for question in part:  # one copy of each picture, which are large
        own = slice(at, at + len(question.pixel_values))
        np.take(
          question.pixel_values,
          found.order[own] - at,
          axis=0,
          out=vision.pixel_values[s, own],
          mode="clip",  # else numpy copies once more
        )
        at = own.stop
      for name, places in found._asdict().items():
        if name != "order" and places is not None:
          getattr(vision, name)[s, :n] = places
  return vision


def _pack_features(
  slices: Sequence[Sequence[Question]], tokens: int, like: np.ndarray
) -> Unmerged | Features:
  """Lanes of visual tokens that are known already, merged or not."""
  levels, _, *size = like.shape
  lanes = np.zeros((levels, len(slices), tokens, *size), like.dtype)
  for s, part in enumerate(slices):
    at = 0
    for question in part:
      assert question.features is not None
      count = question.features.shape[1]
      lanes[:, s, at : at + count] = question.features
      at += count
  kind = Features if len(size) == 1 else Unmerged
  return kind(tokens=lanes[0], levels=lanes[1:] if len(lanes) > 1 else None)
