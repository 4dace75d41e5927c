"""Pictures to patches, equal to Qwen2VLImageProcessor of transformers 5.23.

The resize is Pillow's, as in HF's PIL backend; the bytes of a resized picture
therefore depend on Pillow's version, not on torchvision.
"""

import dataclasses
import io
import json
import math
import pathlib
import struct
import zlib
from typing import Any, Self

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, Int, UInt8

from jaxvlm import paths
from jaxvlm.types import Picture

MAX_ASPECT = 200  # smart_resize of HF refuses longer strips
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap the sides
# What Pillow raises for files that are cut short, broken or a bomb.
_BROKEN = (
  OSError,
  ValueError,
  SyntaxError,
  EOFError,
  struct.error,
  zlib.error,
  PIL.Image.DecompressionBombError,
)
# Qwen2VLImageProcessor's class defaults, for what a file leaves out.
_DEFAULTS = {
  "patch_size": 14,
  "temporal_patch_size": 2,
  "merge_size": 2,
  "image_mean": (0.48145466, 0.4578275, 0.40821073),
  "image_std": (0.26862954, 0.26130258, 0.27577711),
  "rescale_factor": 1 / 255,
  "resample": int(PIL.Image.Resampling.BICUBIC),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureSettings:
  """How pictures become patches: a checkpoint's preprocessor_config.json."""

  min_pixels: int  # areas, after the resize
  max_pixels: int
  patch_size: int
  temporal_patch_size: int
  merge_size: int
  image_mean: tuple[float, ...]
  image_std: tuple[float, ...]
  rescale_factor: float
  resample: int

  @classmethod
  def from_directory(
    cls,
    directory: str | pathlib.Path,
    *,
    min_pixels: int | None,
    max_pixels: int | None,
  ) -> Self:
    """Reads a checkpoint's settings; the limits given here go first.

    Raises:
      ValueError: no settings file, one that turns a part of the work off, or
        limits that exclude each other or every picture.
    """
    settings = _read_settings(pathlib.Path(directory))
    for part in ("do_resize", "do_rescale", "do_normalize"):
      if settings.get(part) is False:
        raise ValueError(
          f"{directory}: the picture settings say {part} = false, which "
          "Qwen-VL towers are not trained with; remove it."
        )
    size = settings.get("size") or {}
    low = _first(
      min_pixels, settings.get("min_pixels"), size.get("shortest_edge"), 56**2
    )
    high = _first(
      max_pixels,
      settings.get("max_pixels"),
      size.get("longest_edge"),
      28**2 * 1280,
    )
    if not 0 < low <= high:
      raise ValueError(
        f"min_pixels {low} and max_pixels {high}: the first must be positive "
        "and not above the second."
      )
    rest = {k: settings.get(k, default) for k, default in _DEFAULTS.items()}
    rest["image_mean"] = tuple(rest["image_mean"])
    rest["image_std"] = tuple(rest["image_std"])
    made = cls(min_pixels=low, max_pixels=high, **rest)
    if high < made.token_side**2:
      raise ValueError(
        f"max_pixels {high}: less than one visual token, which is a square of "
        f"{made.token_side} pixels; expected at least {made.token_side**2}."
      )
    return made

  @property
  def token_side(self) -> int:
    """Pixels along a side of the square that one visual token shows."""
    return self.patch_size * self.merge_size

  @property
  def patch_width(self) -> int:
    """Numbers in one row of pixel_values."""
    return 3 * self.temporal_patch_size * self.patch_size**2


def _first(*values: int | None) -> int:
  return next(value for value in values if value is not None)


def _read_settings(directory: pathlib.Path) -> dict[str, Any]:
  # HF's order: nested in processor_config.json, then the older file.
  new = read_json(directory / "processor_config.json") or {}
  old = read_json(directory / "preprocessor_config.json")
  settings = new.get("image_processor", old)
  if settings is None:
    raise ValueError(
      f"{directory}: no preprocessor_config.json; copy it from the model's "
      "Hugging Face directory."
    )
  return settings


def read_json(file: pathlib.Path) -> Any:
  """A parsed file; None where there is none.

  Raises:
    ValueError: it is not JSON.
  """
  if not file.is_file():
    return None
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file}: not JSON: {error}") from error


def _open(picture: Picture) -> PIL.Image.Image:
  if isinstance(picture, str) and paths.remote(picture):
    return _open(paths.path(picture).read_bytes())
  if isinstance(picture, np.ndarray):
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,):
      raise ValueError(
        f"an array of {picture.dtype} {picture.shape}; expected uint8 [H W 3]"
      )
    return PIL.Image.fromarray(picture)
  if isinstance(picture, str) and not pathlib.Path(picture).is_file():
    raise ValueError(f"no such file: {picture}")
  file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
  image = PIL.Image.open(file)
  if image.mode.startswith(("I", "F")):
    raise ValueError(
      f"gray of more than 8 bits (mode {image.mode}), which Pillow and so "
      "transformers would clip to white; save it with 8 bits"
    )
  return image


def load_picture(picture: Picture) -> UInt8[np.ndarray, "H W 3"]:
  """Decodes a picture's first frame, upright, with transparency put on white.

  Equal to transformers' image processor on the upright picture, as TRL gives
  it (and qwen-vl-utils, and vLLM). `load_image` of transformers, which opens
  the paths in message lists, agrees but for transparency: it drops the alpha
  channel, and what is invisible gets the colour that happens to be stored.

  Raises:
    ValueError: it cannot be read; says why.
  """
  if isinstance(picture, np.ndarray):
    return np.asarray(_open(picture))
  try:
    with _open(picture) as image:
      image = PIL.ImageOps.exif_transpose(image)
      transparent = image.info.get("transparency") is not None
      if transparent or "A" in image.getbands():
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
      return np.asarray(image.convert("RGB"))
  except _BROKEN as error:
    raise _unreadable(picture, error) from error


def measure_picture(picture: Picture) -> tuple[int, int]:
  """Height and width of the upright picture, read to its end.

  Decodes JPEG at an eighth of its size: enough to find a cut or broken file.

  Raises:
    ValueError: it cannot be read; says why.
  """
  if isinstance(picture, np.ndarray):
    width, height = _open(picture).size
    return height, width
  try:
    with _open(picture) as image:
      width, height = image.size
      image.draft("RGB", (1, 1))
      image.load()  # a TIFF is upright from the start, and now says so
      turned = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
  except _BROKEN as error:
    raise _unreadable(picture, error) from error
  return (width, height) if turned else (height, width)


def _unreadable(picture: Picture, error: Exception) -> ValueError:
  where = (
    f" {picture}"
    if isinstance(picture, str) and picture not in str(error)
    else ""
  )
  return ValueError(f"cannot read the picture{where}: {error}")


def smart_resize(
  height: int, width: int, settings: PictureSettings
) -> tuple[int, int]:
  """Sides after the resize: whole visual tokens, area within the limits.

  Source: smart_resize of transformers' Qwen2-VL. As there, the area is beyond
  a limit in two cases alone: a strip keeps the width of one visual token, and
  limits so close that no whole number of tokens lies between are overstepped.

  Raises:
    ValueError: one side is more than 200 times the other.
  """
  if max(height, width) > MAX_ASPECT * min(height, width):
    raise ValueError(
      f"a picture of {height} x {width} pixels is too thin; the longer side "
      f"may be at most {MAX_ASPECT} times the shorter."
    )
  factor = settings.token_side
  new_height = round(height / factor) * factor
  new_width = round(width / factor) * factor
  area = new_height * new_width
  if area > settings.max_pixels:
    shrink = math.sqrt(height * width / settings.max_pixels)
    new_height = max(factor, math.floor(height / shrink / factor) * factor)
    new_width = max(factor, math.floor(width / shrink / factor) * factor)
  elif area < settings.min_pixels:
    grow = math.sqrt(settings.min_pixels / (height * width))
    new_height = math.ceil(height * grow / factor) * factor
    new_width = math.ceil(width * grow / factor) * factor
  shrunk, grown = area > settings.max_pixels, area < settings.min_pixels
  area, thin = new_height * new_width, factor in (new_height, new_width)
  assert area <= settings.max_pixels or grown or thin
  assert area >= settings.min_pixels or shrunk
  return new_height, new_width


def make_patches(
  picture: UInt8[np.ndarray, "H W 3"], settings: PictureSettings
) -> tuple[Float[np.ndarray, "L D"], Int[np.ndarray, " 3"]]:
  """The rows of pixel_values of one picture, and its (t, h, w) in patches.

  Patches stand in merge blocks, raster within a block; a row is (channel,
  temporal copy, y, x).
  """
  old_height, old_width, _ = picture.shape
  height, width = smart_resize(old_height, old_width, settings)
  if (old_height, old_width) != (height, width):
    image = PIL.Image.fromarray(picture)
    picture = np.asarray(image.resize((width, height), settings.resample))
  side, merge = settings.patch_size, settings.merge_size
  h, w = height // side, width // side
  blocks = picture.reshape(h // merge, merge, side, w // merge, merge, side, 3)
  blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, side, side)
  shape = (h * w, 3, settings.temporal_patch_size, side, side)
  values = np.empty(shape, np.float32)
  for channel, table in enumerate(_value_tables(settings)):
    values[:, channel] = table[blocks[:, channel]][:, None]
  return values.reshape(h * w, -1), np.array([1, h, w], np.int32)


def _value_tables(settings: PictureSettings) -> Float[np.ndarray, "3 256"]:
  # HF rounds after the rescale (float64 -> float32), the subtraction and the
  # division; a byte has 256 values, so a table gives the very same numbers.
  scaled = (np.arange(256) * settings.rescale_factor).astype(np.float32)
  mean = np.asarray(settings.image_mean, np.float32)[:, None]
  std = np.asarray(settings.image_std, np.float32)[:, None]
  return (scaled[None] - mean) / std
