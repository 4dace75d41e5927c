"""Qwen2.5-VL, equal to Hugging Face transformers 5.23: sizes and modules."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvlm.models import base
from jaxvlm.nn import rope, vision
from jaxvlm.nn.block_attention import BLOCK, WIDE, of_segments
from jaxvlm.nn.layers import GatedMLP, RMSNorm, scan, stack
from jaxvlm.sharding import constrain
from jaxvlm.types import Features, Unmerged, Vision

# Names of tensors: of HF's modules where ours differ, and of the hub's files
# where they differ from HF's modules.
RENAMED = {
  "merger.norm": "merger.ln_q",
  "merger.linear_fc1": "merger.mlp.0",
  "merger.linear_fc2": "merger.mlp.2",
}
HUB_NAMES = {"language_model.": "model."}

# Parts of a picture's sides in which boxes are said; None: pixels as resized.
BOX_SIDE = None

# Of the published preprocessor_config.json, what is the family's own.
PROCESSOR = {
  "processor_class": "Qwen2_5_VLProcessor",
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(vision.VisionConfig):
  """The vision tower, in config.json's names."""

  window_size: int  # pixels
  fullatt_block_indexes: tuple[int, ...]
  tokens_per_second: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(base.Config):
  """A Qwen2.5-VL architecture."""

  model_type = "qwen2_5_vl"
  architecture = "Qwen2_5_VLForConditionalGeneration"
  vision_class = VisionConfig
  vision_act = "silu"
  text_defaults: ClassVar[Mapping[str, Any]] = {
    "rope_theta": 1000000.0,
    "mrope_section": (16, 24, 24),
  }

  vision_config: VisionConfig

  def __post_init__(self) -> None:
    super().__post_init__()
    text = self.text_config
    check = "sum of mrope_section"
    base.check_equal(check, sum(text.mrope_section), text.head_dim // 2)

  @classmethod
  def text_fields(cls, text: dict[str, Any]) -> dict[str, Any]:
    if {"hidden_size", "num_attention_heads"} <= set(text):
      size, heads = text["hidden_size"], text["num_attention_heads"]
      base.check_whole("hidden_size / num_attention_heads", size, heads)
      text = {**text, "head_dim": size // heads}
    return text

  @classmethod
  def is_tied(cls, raw: Mapping[str, Any]) -> bool:
    nested = raw.get("text_config") or {}
    return super().is_tied(raw) or super().is_tied(nested)

  def to_hf(self) -> dict[str, Any]:
    raw = super().to_hf()
    del raw["text_config"]["head_dim"]
    return raw


def _size(
  text: tuple[int, int, int, int, int, int], *, tied: bool, vision_mlp: int
) -> Config:
  hidden, layers, heads, kv_heads, mlp, vocab = text
  return Config.from_hf(
    {
      "model_type": Config.model_type,
      "tie_word_embeddings": tied,
      "text_config": {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000,
      },
      "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": vision_mlp,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
      },
    }
  )


# What the published checkpoints' config.json say.
SIZES = {
  "3b": _size((2048, 36, 16, 2, 11008, 151936), tied=True, vision_mlp=3420),
  "7b": _size((3584, 28, 28, 4, 18944, 152064), tied=False, vision_mlp=3420),
  "32b": _size((5120, 64, 40, 8, 27648, 152064), tied=False, vision_mlp=3456),
  "72b": _size((8192, 80, 64, 8, 29568, 152064), tied=False, vision_mlp=3456),
}


class VisionTower(nnx.Module):
  """HF: Qwen2_5_VisionTransformerPretrainedModel.

  Patches come sorted by window and leave so.
  """

  def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
    size, std = config.hidden_size, config.initializer_range
    self.config = config
    make_norm = functools.partial(RMSNorm, size, eps=vision.EPS, dtype=dtype)

    def make_block(*, rngs: nnx.Rngs) -> vision.VisionBlock:
      make_mlp = functools.partial(
        GatedMLP,
        size,
        config.intermediate_size,
        axis="vision_embed",
        use_bias=True,
        std=std,
        dtype=dtype,
        rngs=rngs,
      )
      return vision.VisionBlock(
        size,
        num_heads=config.num_heads,
        make_norm=make_norm,
        make_mlp=make_mlp,
        std=std,
        dtype=dtype,
        rngs=rngs,
      )

    self.patch_embed = vision.PatchEmbed(
      config.patch_shape, size, use_bias=False, std=std, dtype=dtype, rngs=rngs
    )
    self.blocks = stack(make_block, config.depth, rngs=rngs)
    self.merger = vision.PatchMerger(
      size,
      config.out_hidden_size,
      patches=config.spatial_merge_size**2,
      norm=make_norm(),
      norm_after=False,
      std=std,
      dtype=dtype,
      rngs=rngs,
    )

  def see(
    self,
    inputs: Vision,
    *,
    dtype: Any,
    remat: str,
    attend: Callable[..., jax.Array],  # as block_attention's
  ) -> Unmerged:
    """All but the merger."""
    config = self.config
    assert inputs.window_segments is not None  # its Layout has windows
    whole, windows = (
      functools.partial(
        attend, visibility=of_segments(jnp.asarray(segments), block)
      )
      for segments, block in (
        (inputs.full_segments, WIDE),
        (inputs.window_segments, BLOCK),
      )
    )
    angles = rope.vision_angles(
      jnp.asarray(inputs.rows),
      jnp.asarray(inputs.cols),
      head_dim=config.head_dim,
      theta=config.rope_theta,
    )
    turns = rope.turns(angles, jnp.float32)
    full = np.isin(np.arange(config.depth), config.fullatt_block_indexes)

    def call(
      block: vision.VisionBlock, x: jax.Array, full: jax.Array
    ) -> tuple[jax.Array, None]:
      x = block(x, turns, functools.partial(jax.lax.cond, full, whole, windows))
      return constrain(x, "lane", None, None), None

    x = self.patch_embed(jnp.asarray(inputs.pixel_values, dtype))
    x, _ = scan(self.blocks, call, x, jnp.asarray(full), remat=remat)
    tokens = vision.by_token(x, config.spatial_merge_size)
    return Unmerged(tokens=tokens, levels=None)

  def merge(
    self,
    seen: Unmerged,
    *,
    remat: str,  # for towers of several mergers
  ) -> Features:
    """What `see` gave, merged."""
    return Features(tokens=self.merger(seen.tokens), levels=None)


class Model(base.Model):
  """The whole tree of weights, with HF's names."""

  def __init__(self, config: Config, **how: Any):
    text = config.text_config
    super().__init__(
      config,
      tower=VisionTower,
      axis_of=rope.chunked_axes(text.mrope_section),
      qkv_bias=True,
      qk_norm=False,
      **how,
    )
