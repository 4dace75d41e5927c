"""Makes the work folder that bench.py reads: random weights, drawn arrays.

  python tools/bench_work.py --model qwen25vl-tiny --work-dir DIR
  python tools/bench.py --model qwen25vl-tiny --work W1 --work-dir DIR

Writes DIR/MODEL with policy/ (seed 0), ref/ (seed 1) and inputs.npz, aside and
then renamed. All is drawn from seeds: two machines make the same inputs, the
weights as far as jax draws the same on both.

A question is 8 text ids, one picture of 224 x 224 random pixels, 22 text ids.
Completions are random text ids, `lengths` lognormal with median R / 6 and sigma
1, `advantages` noise normalised in its group. `policy_logps` are the learner's,
in float32: bench.py's check against them tells that another version or device
computes the same. `old_logps` have noise of 0.05 on top, so that ratios move.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import PIL.Image

# Where the other tools are.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jaxvlm import models
from jaxvlm.data.pictures import PictureSettings, make_patches
from jaxvlm.display import Display, make_console
from tools.bench import Lab
from tools.bench_schedule import draw_lengths

TEXT_BEFORE, TEXT_AFTER = 8, 22  # ids on either side of the picture
OLD_NOISE = 0.05  # of old_logps, in nats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How much work."""

  questions: int
  group: int
  length: int  # of the longest completion, tokens
  side: int = 224  # of a question's picture, pixels
  tower_side: int = 448  # of a picture for the tower alone
  tower_pictures: int = 16


SIZES = {
  "tiny": Sizes(questions=8, group=8, length=64),
  "small": Sizes(questions=4, group=8, length=64),
  "medium": Sizes(questions=2, group=8, length=32),
  "long": Sizes(questions=8, group=8, length=1024),
  "gpu": Sizes(questions=8, group=8, length=256),
  "gpu-512": Sizes(questions=64, group=8, length=256),
}

_TEXT = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
_TOWER = {"temporal_patch_size": 2, "spatial_merge_size": 2}


def qwen25vl(
  text: Mapping[str, Any], tower: Mapping[str, Any]
) -> dict[str, Any]:
  sections = text["hidden_size"] // text["num_attention_heads"] // 16
  return {
    "model_type": "qwen2_5_vl",
    "text_config": {
      **_TEXT,
      "rope_theta": 1e6,
      "rope_scaling": {
        "type": "mrope",
        "mrope_section": [2 * sections, 3 * sections, 3 * sections],
      },
      **text,
    },
    "vision_config": {
      **_TOWER,
      "patch_size": 14,
      "window_size": 112,
      "tokens_per_second": 2,
      **tower,
    },
  }


def qwen3vl(
  text: Mapping[str, Any], tower: Mapping[str, Any], sections: list[int]
) -> dict[str, Any]:
  return {
    "model_type": "qwen3_vl",
    "text_config": {
      **_TEXT,
      "rope_theta": 5e6,
      "rope_scaling": {"rope_type": "default", "mrope_section": sections},
      **text,
    },
    "vision_config": {**_TOWER, "patch_size": 16, **tower},
  }


_TINY_TEXT = {
  "vocab_size": 2048,
  "hidden_size": 128,
  "intermediate_size": 384,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
_TINY_TOWER = {
  "depth": 4,
  "hidden_size": 64,
  "intermediate_size": 192,
  "num_heads": 2,
}
_SMALL_TEXT = {
  "vocab_size": 8192,
  "hidden_size": 512,
  "intermediate_size": 1280,
  "num_hidden_layers": 8,
  "num_attention_heads": 8,
  "num_key_value_heads": 2,
}
_SMALL_TOWER = {"depth": 6, "hidden_size": 256, "num_heads": 4}

# In config.json's names; ids and what follows from other fields are added.
SHAPES: dict[str, dict[str, Any]] = {
  "qwen25vl-tiny": qwen25vl(
    _TINY_TEXT, {**_TINY_TOWER, "fullatt_block_indexes": [1, 3]}
  ),
  "qwen25vl-small": qwen25vl(
    _SMALL_TEXT,
    {
      **_SMALL_TOWER,
      "intermediate_size": 704,
      "fullatt_block_indexes": [2, 5],
    },
  ),
  "qwen25vl-medium": qwen25vl(
    {
      "vocab_size": 16384,
      "hidden_size": 768,
      "intermediate_size": 2304,
      "num_hidden_layers": 20,
      "num_attention_heads": 12,
      "num_key_value_heads": 2,
    },
    {
      "depth": 12,
      "hidden_size": 384,
      "intermediate_size": 1024,
      "num_heads": 6,
      "fullatt_block_indexes": [2, 5, 8, 11],
    },
  ),
  "qwen3vl-tiny": qwen3vl(
    {**_TINY_TEXT, "head_dim": 32},
    {
      **_TINY_TOWER,
      "num_position_embeddings": 256,
      "deepstack_visual_indexes": [0, 1, 2],
    },
    [6, 5, 5],
  ),
  "qwen3vl-small": qwen3vl(
    {**_SMALL_TEXT, "head_dim": 64},
    {
      **_SMALL_TOWER,
      "intermediate_size": 1024,
      "num_position_embeddings": 576,
      "deepstack_visual_indexes": [1, 3, 5],
    },
    [12, 10, 10],
  ),
}
PUBLISHED = {"qwen25vl-3b": "qwen2_5_vl_3b", "qwen3vl-4b": "qwen3_vl_4b"}
MODELS = (*SHAPES, *PUBLISHED)


def find_config(model: str) -> Any:
  """The Config of a name of MODELS."""
  if model in SHAPES:
    return read_shape(SHAPES[model])
  return with_top_ids(models.find_size(PUBLISHED[model]))


def read_shape(shape: Mapping[str, Any]) -> Any:
  """The Config of a shape as in SHAPES; its embeddings are tied."""
  text = shape["text_config"]
  tower = {"out_hidden_size": text["hidden_size"], **shape["vision_config"]}
  raw = {**shape, "tie_word_embeddings": True, "vision_config": tower}
  return with_top_ids(
    models.find_family(shape["model_type"]).Config.from_hf(raw)
  )


def with_top_ids(config: Any) -> Any:
  """Special ids at the top of the vocabulary, where bench.py has its own."""
  size = config.vocab_size
  return dataclasses.replace(
    config,
    image_token_id=size - 8,
    video_token_id=size - 7,
    vision_start_token_id=size - 6,
    vision_end_token_id=size - 5,
  )


def draw_text(
  random: np.random.Generator, config: Any, shape: tuple[int, ...]
) -> np.ndarray:
  """Ids without the special ones."""
  return random.integers(0, config.vocab_size - 16, shape, dtype=np.int32)


def picture_settings(config: Any) -> PictureSettings:
  """The family's, without limits that would resize."""
  tower = config.vision_config
  family = models.find_family(config.model_type)
  side = tower.patch_size * tower.spatial_merge_size
  return PictureSettings(
    min_pixels=side**2,
    max_pixels=1280 * side**2,
    patch_size=tower.patch_size,
    temporal_patch_size=tower.temporal_patch_size,
    merge_size=tower.spatial_merge_size,
    image_mean=tuple(family.PROCESSOR["image_mean"]),
    image_std=tuple(family.PROCESSOR["image_std"]),
    rescale_factor=1 / 255,
    resample=int(PIL.Image.Resampling.BICUBIC),
  )


def draw_pictures(
  random: np.random.Generator, config: Any, count: int, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Square pictures [n H W 3], their patches one after another, grids [n 3].

  Raises:
    ValueError: the side is not a whole number of visual tokens.
  """
  settings = picture_settings(config)
  if side % settings.token_side:
    raise ValueError(
      f"pictures of {side} pixels a side; expected a multiple of "
      f"{settings.token_side}, the side of a visual token."
    )
  pictures = random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
  patches, grids = zip(
    *(make_patches(one, settings) for one in pictures), strict=True
  )
  return pictures, np.concatenate(patches), np.stack(grids)


def draw_inputs(config: Any, sizes: Sizes) -> dict[str, np.ndarray]:
  """inputs.npz but for `policy_logps` and `old_logps`."""
  random = np.random.default_rng(0)
  rows = sizes.questions * sizes.group
  text = draw_text(random, config, (sizes.questions, TEXT_BEFORE + TEXT_AFTER))
  images, pixels, grid = draw_pictures(
    random, config, sizes.questions, sizes.side
  )
  _, v_pixels, v_grid = draw_pictures(
    random, config, sizes.tower_pictures, sizes.tower_side
  )
  noise = random.normal(size=(sizes.questions, sizes.group))
  spread = noise.std(1, keepdims=True) + 1e-4
  advantages = (noise - noise.mean(1, keepdims=True)) / spread
  lengths = draw_lengths(sizes.questions, sizes.group, sizes.length, 0)
  return {
    "B": np.array(sizes.questions),
    "G": np.array(sizes.group),
    "R": np.array(sizes.length),
    "text": text,
    "images": images,
    "prompts": make_prompts(config, text, grid),
    "pixels": pixels,
    "grid": grid,
    "completions": draw_text(random, config, (rows, sizes.length)),
    "advantages": advantages.reshape(rows).astype(np.float32),
    "lengths": lengths.reshape(rows).astype(np.int32),
    "v_pixels": v_pixels,
    "v_grid": v_grid,
  }


def make_prompts(config: Any, text: np.ndarray, grid: np.ndarray) -> np.ndarray:
  """[B P]: some text, the picture's tokens, the other text."""
  tokens = int(grid[0].prod()) // config.vision_config.spatial_merge_size**2
  shown = [
    config.vision_start_token_id,
    *[config.image_token_id] * tokens,
    config.vision_end_token_id,
  ]
  return np.concatenate(
    [
      text[:, :TEXT_BEFORE],
      np.tile(np.array(shown, np.int32), (len(text), 1)),
      text[:, TEXT_BEFORE:],
    ],
    axis=1,
  )


def add_logps(
  network: models.Network, params: Any, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The arrays, with those that the policy computes."""
  lab = Lab(
    network=network,
    params=params,
    reference=None,
    arrays=arrays,
    group=int(arrays["G"]),
    length=int(arrays["R"]),
    microbatch_tokens=512,  # little memory
  )
  ids = lab.groups("completions")
  with jax.default_matmul_precision("highest"):
    logps = lab.logprobs(params, lab.questions, ids)
  logps = logps.reshape(-1, lab.length).astype(np.float32)
  random = np.random.default_rng(1)
  noise = OLD_NOISE * random.normal(size=logps.shape)
  old = (logps + noise).astype(np.float32)
  return {**arrays, "policy_logps": logps, "old_logps": old}


def make(config: Any, sizes: Sizes, directory: pathlib.Path) -> None:
  """Writes the directory; what stood there before is gone.

  Raises:
    ValueError: pictures that the family's tokens do not divide.
  """
  network = models.Network(
    config=config,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    attention="plain",
  )
  arrays = draw_inputs(config, sizes)
  aside = directory.with_name(f".{directory.name}.partial")
  shutil.rmtree(aside, ignore_errors=True)
  aside.mkdir(parents=True)
  with (
    tempfile.TemporaryDirectory() as source,
    Display(make_console()) as display,
  ):
    raw = json.dumps(config.to_hf())
    (pathlib.Path(source) / "config.json").write_text(raw)
    size = 4 * sum(x.size for x in jax.tree.leaves(network.shapes()))
    for seed, name in enumerate(("policy", "ref")):
      params = network.init(seed)
      if name == "policy":
        arrays = add_logps(network, params, arrays)
      with display.task(f"writing {name}", total=size) as advance:
        models.save_hf(network, params, source, aside / name, advance)
      del params  # before the next ones are made
  np.savez(aside / "inputs.npz", **arrays)
  shutil.rmtree(directory, ignore_errors=True)
  aside.rename(directory)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, choices=MODELS)
  parser.add_argument("--work-dir", required=True, type=pathlib.Path)
  parser.add_argument(
    "--size", choices=sorted(SIZES), help="of the work; default: the model's"
  )
  given = parser.parse_args()
  usual = "gpu" if given.model in PUBLISHED else given.model.partition("-")[2]
  directory = given.work_dir / given.model
  if directory.exists() and not (directory / "inputs.npz").is_file():
    sys.exit(f"bench_work: {directory} is no work folder; remove it.")
  make(find_config(given.model), SIZES[given.size or usual], directory)
  print(directory)


if __name__ == "__main__":
  main()
