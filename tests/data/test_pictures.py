"""Patches are those of transformers' PIL backend, bit for bit."""

import io
import json

import numpy as np
import PIL.Image
import pytest
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


SIZES = [(56, 56), (20, 20), (97, 61), (61, 97), (42, 70), (98, 42), (10, 1000)]


@pytest.mark.parametrize(("height", "width"), [*SIZES, (480, 640)])
def test_patches_equal_transformers(checkpoint, settings, height, width):
  picture = noise(height, width)
  hf = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
  want = hf.from_pretrained(checkpoint)(
    images=[PIL.Image.fromarray(picture)], return_tensors="np"
  )
  patches, grid = pictures.make_patches(picture, settings)
  np.testing.assert_array_equal(grid, want["image_grid_thw"][0])
  np.testing.assert_array_equal(patches, want["pixel_values"])
  assert patches.dtype == np.float32


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


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb_as_in_transformers(checkpoint, settings, mode):
  image = PIL.Image.fromarray(noise(56, 56, 4), "RGBA").convert(mode)
  kind = "TIFF" if mode == "CMYK" else "PNG"
  data = encode(image, kind)
  hf = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
  want = hf.from_pretrained(checkpoint)(
    images=[PIL.Image.open(io.BytesIO(data))], return_tensors="np"
  )
  patches, _ = pictures.make_patches(pictures.load_picture(data), settings)
  np.testing.assert_array_equal(patches, want["pixel_values"])


def test_transparency_is_white():
  image = PIL.Image.new("RGBA", (2, 1), (200, 0, 0, 0))
  image.putpixel((1, 0), (200, 0, 0, 255))
  picture = pictures.load_picture(encode(image))
  assert picture.tolist() == [[[255, 255, 255], [200, 0, 0]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_turned_picture_is_put_upright(kind):
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  data = encode(PIL.Image.fromarray(noise(40, 80)), kind, exif=exif)
  assert pictures.load_picture(data).shape == (80, 40, 3)
  assert pictures.measure_picture(data) == (80, 40)


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
  for kind in ("JPEG", "PNG", "WEBP"):
    data = encode(whole, kind)
    with pytest.raises(ValueError, match="cannot read the picture"):
      read(data[: len(data) // 2])
  for junk in (b"", b"not a picture", encode(whole)[:40]):
    with pytest.raises(ValueError, match="cannot read the picture"):
      read(junk)
  with pytest.raises(ValueError, match=r"no such file: .*gone\.png"):
    read(str(tmp_path / "gone.png"))
  for array in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)):
    with pytest.raises(ValueError, match=r"expected uint8 \[H W 3\]"):
      read(array)


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
