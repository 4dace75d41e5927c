"""Where every token and patch stands, computed on the host in numpy.

Positions, coordinates, attention segments and gather indices depend on the
pictures' sizes. They are made here and padded to few capacities, so that jit
sees capacities alone and never a picture.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int

from jaxvlm.types import Prompts, Question, Vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """What of a checkpoint's config.json decides the places."""

  image_token_id: int
  spatial_merge_size: int  # a visual token is a square of this many patches
  patch_size: int  # pixels
  window_size: int  # pixels, side of an attention window

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> Self:
    """Reads a parsed config.json; what is absent has HF's class default."""
    vision = config.get("vision_config", {})
    return cls(
      image_token_id=config.get("image_token_id", 151655),
      spatial_merge_size=vision.get("spatial_merge_size", 2),
      patch_size=vision.get("patch_size", 14),
      window_size=vision.get("window_size", 112),
    )

  @property
  def patches_per_token(self) -> int:
    return self.spatial_merge_size**2


class PatchPlaces(NamedTuple):
  """For each patch, in the order of pixel_values; segments count from 0."""

  rows: Int[np.ndarray, " L"]
  cols: Int[np.ndarray, " L"]
  full_segments: Int[np.ndarray, " L"]  # the (picture, frame)
  window_segments: Int[np.ndarray, " L"]  # the window of a (picture, frame)


def capacity(n: int, minimum: int = 1) -> int:
  """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that holds n and minimum.

  Two sizes an octave: at most a third of a buffer is padding (above the
  minimum), and a run compiles few programs.
  """
  need = max(n, minimum, 1)
  power = 1 << (need - 1).bit_length()
  between = 3 * power // 4
  return between if between >= need and power > 2 else power


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
def _picture_places(
  t: int, h: int, w: int, merge: int, window: int
) -> PatchPlaces:
  # The processor's order: frame, block row, block column, row, column.
  shape = (t, h // merge, w // merge, merge, merge)
  frame, block_row, block_col, row, col = np.indices(shape).reshape(5, -1)
  rows = block_row * merge + row
  cols = block_col * merge + col
  down, across = -(-h // window), -(-w // window)
  windows = (frame * down + rows // window) * across + cols // window
  places = PatchPlaces(
    *(x.astype(np.int32) for x in (rows, cols, frame, windows))
  )
  for array in places:
    array.setflags(write=False)
  return places


def patch_places(
  image_grid_thw: Int[np.ndarray, "I 3"], layout: Layout
) -> PatchPlaces:
  """Coordinates and segments of the patches of one row's pictures.

  HF permutes the patches by window; the same attention is natural order with
  these segments: equal full_segments see each other in full blocks, equal
  window_segments in window blocks. Windows are cut short at the edges.
  """
  merge = layout.spatial_merge_size
  window = layout.window_size // layout.patch_size // merge * merge
  parts: list[tuple[np.ndarray, ...]] = []
  frames, windows = 0, 0
  for t, h, w in np.asarray(image_grid_thw).tolist():
    rows, cols, full, own = _picture_places(t, h, w, merge, window)
    parts.append((rows, cols, full + frames, own + windows))
    frames += t
    windows += int(own[-1]) + 1
  if not parts:
    return PatchPlaces(*np.zeros((4, 0), np.int32))
  return PatchPlaces(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def slices_of(
  questions: Sequence[Question], lanes: int
) -> list[Sequence[Question]]:
  """The equal, consecutive slices that the lanes hold.

  Raises:
    ValueError: the lanes do not divide the questions.
  """
  if lanes < 1 or len(questions) % lanes:
    raise ValueError(
      f"{len(questions)} questions do not divide into {lanes} lanes; choose "
      "questions per step as a multiple of the data shards."
    )
  size = len(questions) // lanes
  return [questions[i * size : (i + 1) * size] for i in range(lanes)]


def needed(
  questions: Sequence[Question], *, lanes: int, layout: Layout
) -> tuple[int, int]:
  """Capacities (prompt_length, patches) of these questions on their own.

  Hosts that take their maxima agree on one shape. patches is 0 for text
  alone, else a multiple of merge ** 2.
  """
  longest = max(len(q.prompt_ids) for q in questions)
  patches = max(
    sum(len(q.pixel_values) for q in part)
    for part in slices_of(questions, lanes)
  )
  return capacity(longest, 16), _patch_capacity(patches, layout)


def _patch_capacity(patches: int, layout: Layout) -> int:
  tokens = patches // layout.patches_per_token
  return capacity(tokens, 4) * layout.patches_per_token if tokens else 0


def pack_vision(
  slices: Sequence[Sequence[Question]],
  *,
  layout: Layout,
  patches: int | None = None,
) -> Vision | None:
  """One lane of patches for each slice of questions.

  Args:
    slices: the questions beside each lane, in order.
    layout: of the checkpoint.
    patches: L. None: the capacity of the fullest lane. 0: text alone.

  Returns:
    A lane has its pictures first, in the order of questions, then padding:
    pixels 0, coordinates 0, segments -1. None when L is 0.

  Raises:
    ValueError: a lane holds more than `patches`.
  """
  counts = [sum(len(q.pixel_values) for q in part) for part in slices]
  if patches is None:
    patches = _patch_capacity(max(counts), layout)
  if max(counts) > patches or patches % layout.patches_per_token:
    raise ValueError(
      f"lanes of {counts} patches do not fit the capacity {patches}, which "
      f"is a multiple of {layout.patches_per_token}."
    )
  if patches == 0:
    return None
  width = next(q.pixel_values.shape[1] for part in slices for q in part)
  pixels = np.zeros((len(slices), patches, width), np.float32)
  places = np.zeros((4, len(slices), patches), np.int32)
  places[2:] = -1
  for s, part in enumerate(slices):
    if counts[s]:
      grids = np.concatenate([q.image_grid_thw for q in part])
      pixels[s, : counts[s]] = np.concatenate([q.pixel_values for q in part])
      places[:, s, : counts[s]] = patch_places(grids, layout)
  rows, cols, full_segments, window_segments = places
  return Vision(
    pixel_values=pixels,
    rows=rows,
    cols=cols,
    full_segments=full_segments,
    window_segments=window_segments,
  )


def collate(
  questions: Sequence[Question],
  *,
  lanes: int,
  layout: Layout,
  prompt_length: int | None = None,
  patches: int | None = None,
) -> Prompts:
  """Right-pads Q questions into one batch.

  Args:
    questions: Q of them; the s-th of `lanes` equal slices is shown the
      pictures of lane s.
    lanes: S, the data shards of this host.
    layout: of the checkpoint.
    prompt_length: P. None: the capacity of the longest prompt.
    patches: L, as in `pack_vision`.

  Returns:
    Padding has prompt_mask False, id and positions 0, vision_index -1.

  Raises:
    ValueError: lanes do not divide Q, or a given size is too small.
  """
  slices = slices_of(questions, lanes)
  if prompt_length is None:
    prompt_length = needed(questions, lanes=lanes, layout=layout)[0]
  longest = max(len(q.prompt_ids) for q in questions)
  if longest > prompt_length:
    raise ValueError(
      f"a prompt of {longest} tokens does not fit the length {prompt_length}."
    )
  ids = np.zeros((len(questions), prompt_length), np.int32)
  mask = np.zeros(ids.shape, bool)
  positions = np.zeros((3, *ids.shape), np.int32)
  index = np.full(ids.shape, -1, np.int32)
  row = 0
  for part in slices:
    seen = 0  # visual tokens of this lane so far
    for question in part:
      n = len(question.prompt_ids)
      ids[row, :n] = question.prompt_ids
      mask[row, :n] = True
      positions[:, row, :n] = question.position_ids
      shown = np.flatnonzero(question.prompt_ids == layout.image_token_id)
      index[row, shown] = seen + np.arange(len(shown))
      seen += len(shown)
      row += 1
  return Prompts(
    prompt_ids=ids,
    prompt_mask=mask,
    position_ids=positions,
    vision_index=index,
    question_id=np.array([q.question_id for q in questions], np.uint32),
    vision=pack_vision(slices, layout=layout, patches=patches),
  )
