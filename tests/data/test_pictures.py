"""Patches are those of transformers' PIL backend, bit for bit."""

import io
import itertools
import json
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.ImageSequence
import pytest
import transformers
from transformers.image_utils import load_image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

from jaxvlm.data import pictures


def encode(image, kind="PNG", **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def noise(height, width, channels=3):
  rng = np.random.default_rng(height * 1000 + width)
  shape = (height, width, channels)
  return rng.integers(0, 256, shape, dtype=np.uint8)


def read_settings(directory, **limits):
  limits = {"min_pixels": None, "max_pixels": None} | limits
  return pictures.PictureSettings.from_directory(directory, **limits)


@pytest.fixture(scope="module")
def settings(checkpoint):
  return read_settings(checkpoint)


@pytest.fixture(scope="module")
def check(family_checkpoint):
  """Compares what becomes of a file with transformers, through PIL."""
  settings = read_settings(family_checkpoint)
  hf = transformers.AutoImageProcessor.from_pretrained(
    family_checkpoint, backend="pil"
  )

  def check(data, image):
    want = hf(images=[image], return_tensors="np")
    picture = pictures.load_picture(data)
    assert pictures.measure_picture(data) == picture.shape[:2]
    patches, grid = pictures.make_patches(picture, settings)
    np.testing.assert_array_equal(grid, want["image_grid_thw"][0])
    np.testing.assert_array_equal(patches, want["pixel_values"])
    assert patches.dtype == np.float32

  return check


SIZES = [(56, 56), (20, 20), (97, 61), (61, 97), (42, 70), (98, 42), (10, 1000)]
STRIPS = [(1, 1), (3, 5), (1, 2), (1, 200), (200, 1), (3, 597), (2000, 11)]


@pytest.mark.parametrize(("height", "width"), [*SIZES, *STRIPS, (480, 640)])
def test_patches_equal_transformers(check, height, width):
  picture = noise(height, width)
  check(picture, PIL.Image.fromarray(picture))


def test_every_grid_is_within_the_limits_or_where_transformers_puts_it():
  rng = np.random.default_rng(0)
  beyond = 0
  for _ in range(3000):
    low, high = np.sort(rng.integers(1024, 200_000, 2)).tolist()
    settings = pictures.PictureSettings(
      min_pixels=low,
      max_pixels=high,
      patch_size=int(rng.choice([14, 16])),
      temporal_patch_size=2,
      merge_size=2,
      image_mean=(0.5,) * 3,
      image_std=(0.5,) * 3,
      rescale_factor=1 / 255,
      resample=3,
    )
    height, width = (2 ** rng.uniform(0, 11, 2)).astype(int).tolist()
    if max(height, width) > 200 * min(height, width):
      continue
    size = pictures.smart_resize(height, width, settings)
    side = settings.token_side
    assert size == image_processing_pil_qwen2_vl.smart_resize(
      height, width, side, low, high
    )
    if not low <= size[0] * size[1] <= high:
      beyond += 1
      # No whole number of tokens between the limits, or one token wide.
      assert side in size or high < 2 * low
  assert 0 < beyond < 600


@pytest.mark.parametrize(
  ("limits", "size"),
  [
    ({}, (2996, 4004)),
    ({"max_pixels": 1003520}, (840, 1148)),
    ({"min_pixels": 12845055, "max_pixels": 10**8}, (3108, 4144)),
  ],
)
def test_limits_of_the_config_go_before_the_checkpoints(
  checkpoint, limits, size
):
  settings = read_settings(checkpoint, **limits)
  assert pictures.smart_resize(3000, 4000, settings) == (
    image_processing_pil_qwen2_vl.smart_resize(
      3000, 4000, 28, settings.min_pixels, settings.max_pixels
    )
  )
  assert pictures.smart_resize(3000, 4000, settings) == size


@pytest.mark.parametrize(
  ("mode", "kind"),
  [
    *(("RGB", k) for k in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")),
    *(("L", k) for k in ("PNG", "JPEG", "GIF")),
    *(("CMYK", k) for k in ("TIFF", "JPEG")),
    *(("1", "PNG"), ("1", "TIFF"), ("P", "PNG"), ("YCbCr", "JPEG")),
  ],
)
def test_opaque_files_become_rgb_as_in_transformers(check, mode, kind):
  data = encode(PIL.Image.fromarray(noise(60, 90)).convert(mode), kind)
  check(data, PIL.Image.open(io.BytesIO(data)))
  check(data, load_image(PIL.Image.open(io.BytesIO(data))))


def transparent(kind):
  image = PIL.Image.fromarray(noise(60, 90, 4), "RGBA")
  if kind == "a colour":
    image = image.convert("RGB")
    return encode(image, transparency=image.getpixel((3, 4)))
  if kind == "a gray":
    image = image.convert("L")
    return encode(image, transparency=image.getpixel((3, 4)))
  if kind == "a palette's colour":
    return encode(image.convert("P"), transparency=7)
  if kind == "a palette's alphas":
    alphas = bytes(range(256))
    return encode(image.convert("P"), transparency=alphas)
  if kind == "GIF":
    return encode(image.convert("P"), "GIF", transparency=7)
  if kind == "LA":
    return encode(image.convert("LA"))
  return encode(image, kind)


@pytest.mark.parametrize(
  "kind",
  [
    *("a colour", "a gray", "a palette's colour", "a palette's alphas"),
    *("GIF", "LA", "PNG", "WEBP", "TIFF"),
  ],
)
def test_transparent_files_become_rgb_as_in_transformers(check, kind):
  data = transparent(kind)
  check(data, PIL.Image.open(io.BytesIO(data)))
  # Its image processor sees white where the plain conversion sees a colour.
  opened = PIL.Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB")
  assert (pictures.load_picture(data) != np.asarray(opened)).any()


def deep_png(values, color):
  """Pillow cannot write 16 bits of colour; the format is simple."""

  def chunk(name, content):
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc

  height, width, _ = values.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(("channels", "color"), [(2, 4), (3, 2), (4, 6)])
def test_16_bits_of_colour_are_read_as_in_transformers(check, channels, color):
  rng = np.random.default_rng(channels)
  values = rng.integers(0, 65536, (40, 60, channels))
  data = deep_png(values, color)
  check(data, PIL.Image.open(io.BytesIO(data)))
  if channels == 3:  # the upper byte
    want = (values >> 8).astype(np.uint8)
    np.testing.assert_array_equal(pictures.load_picture(data), want)


@pytest.mark.parametrize(
  "read", [pictures.load_picture, pictures.measure_picture]
)
def test_gray_of_more_than_8_bits_is_refused(read):
  values = np.arange(0, 60000, 100).reshape(20, 30)
  deep = PIL.Image.fromarray(values.astype(np.uint16))
  # What transformers would show: white.
  clipped = np.asarray(load_image(deep))
  assert (clipped[:, 3:] == 255).all()
  for data, mode in (
    (encode(deep), "I;16"),
    (deep_png(values[..., None], 0), "I;16"),
    (encode(deep, "TIFF"), "I;16"),
    (encode(PIL.Image.fromarray(values.astype(np.int32)), "TIFF"), "I"),
    (encode(PIL.Image.fromarray(values.astype(np.float32)), "TIFF"), "F"),
  ):
    with pytest.raises(ValueError, match=rf"8 bits \(mode {mode}\)"):
      read(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_a_moving_picture_is_shown(check, kind):
  frames = [PIL.Image.fromarray(noise(60, 90 + i)[:, :90]) for i in range(3)]
  options = {} if kind == "TIFF" else {"duration": 100}
  data = encode(
    frames[0], kind, save_all=True, append_images=frames[1:], **options
  )
  opened = PIL.Image.open(io.BytesIO(data))
  assert opened.n_frames == 3
  first, second = (
    np.asarray(frame.convert("RGB"))
    for frame in itertools.islice(PIL.ImageSequence.Iterator(opened), 2)
  )
  check(data, PIL.Image.open(io.BytesIO(data)))
  np.testing.assert_array_equal(pictures.load_picture(data), first)
  assert (first != second).any()


def test_transparency_is_white():
  image = PIL.Image.new("RGBA", (2, 1), (200, 0, 0, 0))
  image.putpixel((1, 0), (200, 0, 0, 255))
  picture = pictures.load_picture(encode(image))
  assert picture.tolist() == [[[255, 255, 255], [200, 0, 0]]]


@pytest.mark.parametrize("orientation", range(11))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_picture_is_put_upright(check, kind, orientation):
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  data = encode(PIL.Image.fromarray(noise(40, 80)), kind, exif=exif)
  turned = orientation in (5, 6, 7, 8)
  size = (80, 40) if turned else (40, 80)
  assert pictures.load_picture(data).shape == (*size, 3)
  check(data, load_image(PIL.Image.open(io.BytesIO(data))))


def test_a_turned_picture_keeps_its_transparency(check):
  exif = PIL.Image.Exif()
  exif[0x0112] = 8
  image = PIL.Image.fromarray(noise(40, 80, 4), "RGBA")
  data = encode(image, exif=exif)
  check(data, PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))))


def test_paths_bytes_and_arrays_are_one_picture(tmp_path):
  picture = noise(30, 50)
  data = encode(PIL.Image.fromarray(picture))
  (tmp_path / "a.png").write_bytes(data)
  for given in (picture, data, str(tmp_path / "a.png")):
    np.testing.assert_array_equal(pictures.load_picture(given), picture)
    assert pictures.measure_picture(given) == (30, 50)


@pytest.mark.parametrize(
  "read", [pictures.load_picture, pictures.measure_picture]
)
def test_what_is_no_picture_is_refused(read, tmp_path):
  whole = PIL.Image.fromarray(noise(200, 200))
  for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
    data = encode(whole, kind)
    with pytest.raises(ValueError, match="cannot read the picture"):
      read(data[: len(data) // 2])
    file = tmp_path / f"cut.{kind}"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"cannot read the picture {file}: "):
      read(str(file))
  for junk in (b"", b"not a picture", encode(whole)[:40]):
    with pytest.raises(ValueError, match="cannot read the picture"):
      read(junk)
  with pytest.raises(ValueError, match=r"no such file: .*gone\.png"):
    read(str(tmp_path / "gone.png"))
  for array in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)):
    with pytest.raises(ValueError, match=r"expected uint8 \[H W 3\]"):
      read(array)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_measuring_finds_every_cut_that_reading_finds(kind):
  # Otherwise a run would end at the row, hours after its check.
  whole = encode(PIL.Image.fromarray(noise(64, 96)), kind)

  def broken(read, data):
    try:
      read(data)
    except ValueError:
      return True
    return False

  every = max(1, len(whole) // 60)
  ends = [*range(0, len(whole), every), *range(len(whole) - 12, len(whole) + 1)]
  found = [
    [broken(read, whole[:end]) for end in ends]
    for read in (pictures.measure_picture, pictures.load_picture)
  ]
  assert found[0] == found[1]
  assert found[0][0] and not found[0][-1]


def test_a_strip_is_refused(settings):
  assert pictures.smart_resize(2800, 14, settings) == (812, 28)
  with pytest.raises(ValueError, match="2801 x 14 pixels is too thin"):
    pictures.smart_resize(2801, 14, settings)


def test_settings_are_read_from_all_places_of_hf(tmp_path):
  old = tmp_path / "preprocessor_config.json"
  old.write_text("{}")
  found = read_settings(tmp_path)
  assert (found.min_pixels, found.max_pixels) == (3136, 1003520)

  size = {"shortest_edge": 784, "longest_edge": 7840}
  old.write_text(json.dumps({"size": size, "image_mean": [0, 0.5, 1]}))
  found = read_settings(tmp_path)
  assert (found.min_pixels, found.max_pixels) == (784, 7840)
  assert found.image_mean == (0, 0.5, 1)

  new = tmp_path / "processor_config.json"
  new.write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
  assert read_settings(tmp_path) == found
  new.write_text(json.dumps({"image_processor": {"max_pixels": 9999}}))
  assert read_settings(tmp_path).max_pixels == 9999


def test_settings_that_cannot_be_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
    read_settings(tmp_path)
  file = tmp_path / "preprocessor_config.json"
  file.write_text(json.dumps({"do_resize": False}))
  with pytest.raises(ValueError, match="do_resize = false"):
    read_settings(tmp_path)
  file.write_text("{}")
  with pytest.raises(ValueError, match="min_pixels 100 and max_pixels 50"):
    read_settings(tmp_path, min_pixels=100, max_pixels=50)
  with pytest.raises(ValueError, match=r"max_pixels 783: .* at least 784"):
    read_settings(tmp_path, min_pixels=100, max_pixels=783)
