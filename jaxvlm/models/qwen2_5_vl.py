"""Qwen2.5-VL, equal to Hugging Face transformers 5.23: sizes and modules."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxvlm.nn import rope, vision
from jaxvlm.nn.decoder import Decoder, TextConfig
from jaxvlm.nn.layers import Linear, scan, stack
from jaxvlm.sharding import constrain
from jaxvlm.types import Vision

MODEL_TYPE = "qwen2_5_vl"

# Names of tensors: of HF's modules where ours differ, and of the hub's files
# where they differ from HF's modules.
RENAMED = {
  "merger.linear_fc1": "merger.mlp.0",
  "merger.linear_fc2": "merger.mlp.2",
}
HUB_NAMES = {"language_model.": "model."}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """The vision tower, in config.json's names."""

  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  in_channels: int
  patch_size: int
  temporal_patch_size: int
  spatial_merge_size: int
  window_size: int  # pixels
  fullatt_block_indexes: tuple[int, ...]
  out_hidden_size: int
  tokens_per_second: int
  initializer_range: float
  rope_theta: float

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def patch_shape(self) -> tuple[int, int, int, int]:
    sides = (self.patch_size, self.patch_size)
    return (self.in_channels, self.temporal_patch_size, *sides)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A Qwen2.5-VL architecture; `from_hf` reads it, `to_hf` writes it."""

  model_type: ClassVar[str] = MODEL_TYPE

  text_config: TextConfig
  vision_config: VisionConfig
  image_token_id: int
  video_token_id: int
  vision_start_token_id: int
  vision_end_token_id: int
  tie_word_embeddings: bool

  def __post_init__(self) -> None:
    text, tower = self.text_config, self.vision_config
    heads = text.num_attention_heads
    for name, size, parts in (
      ("hidden_size / num_attention_heads", text.hidden_size, heads),
      ("heads / num_key_value_heads", heads, text.num_key_value_heads),
      (
        "vision hidden_size / num_heads / 4",
        tower.hidden_size // 4,
        tower.num_heads,
      ),
    ):
      if size % parts:
        raise ValueError(f"config: {name} is {size} / {parts}, not whole.")
    for name, got, expected in (
      ("sum of mrope_section", sum(text.mrope_section), text.head_dim // 2),
      ("vision out_hidden_size", tower.out_hidden_size, text.hidden_size),
    ):
      if got != expected:
        raise ValueError(f"config: {name} is {got}, expected {expected}.")

  @property
  def vocab_size(self) -> int:
    return self.text_config.vocab_size

  @classmethod
  def from_hf(cls, raw: dict[str, Any]) -> "Config":
    """Reads config.json, text fields nested or (published files) at the root.

    Raises:
      ValueError: another family, a missing field, a feature not built here.
    """
    if raw.get("model_type") != MODEL_TYPE:
      raise ValueError(
        f"config.json: model_type is {raw.get('model_type')!r}, expected "
        f"{MODEL_TYPE!r}."
      )
    text = raw.get("text_config") or raw
    tower = raw.get("vision_config") or {}
    if text.get("use_sliding_window"):
      raise ValueError("config.json: use_sliding_window is not supported.")
    # Each value given here is transformers' own for a file without the field.
    return cls(
      text_config=_read(
        TextConfig,
        {"initializer_range": 0.02, **text, **_rope(text, theta=1000000.0)},
      ),
      vision_config=_read(
        VisionConfig,
        {
          "in_channels": 3,
          "initializer_range": 0.02,
          **tower,
          **_rope(tower, theta=10000.0),
        },
      ),
      image_token_id=raw.get("image_token_id", 151655),
      video_token_id=raw.get("video_token_id", 151656),
      vision_start_token_id=raw.get("vision_start_token_id", 151652),
      vision_end_token_id=raw.get("vision_end_token_id", 151653),
      tie_word_embeddings=bool(
        raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")
      ),
    )

  def to_hf(self) -> dict[str, Any]:
    """config.json in the nested form that transformers 5.23 writes."""
    raw = dataclasses.asdict(self)
    for key in ("text_config", "vision_config"):
      raw[key]["hidden_act"] = "silu"
    text, tower = raw["text_config"], raw["vision_config"]
    text["model_type"] = f"{MODEL_TYPE}_text"
    text["rope_parameters"] = {
      "rope_type": "default",
      "rope_theta": text.pop("rope_theta"),
      "mrope_section": list(text.pop("mrope_section")),
    }
    tower["model_type"] = f"{MODEL_TYPE}_vision"
    tower["rope_parameters"] = {
      "rope_type": "axial",
      "rope_theta": tower.pop("rope_theta"),
    }
    tower["fullatt_block_indexes"] = list(tower["fullatt_block_indexes"])
    return {
      "architectures": ["Qwen2_5_VLForConditionalGeneration"],
      "model_type": MODEL_TYPE,
      **raw,
    }


def _rope(raw: dict[str, Any], *, theta: float) -> dict[str, Any]:
  """rope_theta and mrope_section, from either of the forms in use."""
  rope_parameters = {
    "rope_theta": raw.get("rope_theta", theta),
    "mrope_section": (16, 24, 24),
    **(raw.get("rope_parameters") or raw.get("rope_scaling") or {}),
  }
  for key in ("type", "rope_type"):
    kind = rope_parameters.get(key, "default")
    if kind not in ("default", "mrope", "axial"):
      raise ValueError(f"config.json: {key} {kind!r} is not supported.")
  return {
    "rope_theta": float(rope_parameters["rope_theta"]),
    "mrope_section": tuple(rope_parameters["mrope_section"]),
  }


def _read(cls: Any, raw: dict[str, Any]) -> Any:
  if raw.get("hidden_act", "silu") != "silu":
    raise ValueError(
      f"config.json: hidden_act {raw['hidden_act']!r}, expected 'silu'."
    )
  names = [field.name for field in dataclasses.fields(cls)]
  if missing := [name for name in names if name not in raw]:
    raise ValueError(f"config.json: {cls.__name__} lacks {missing}.")
  return cls(
    **{
      name: tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
      for name in names
    }
  )


class VisionTower(nnx.Module):
  """HF: Qwen2_5_VisionTransformerPretrainedModel, in the patches' own order.

  HF sorts patches by window; a mask by window is equal and needs no sort.
  """

  def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
    size, std = config.hidden_size, config.initializer_range
    self.config = config
    self.patch_embed = vision.PatchEmbed(
      config.patch_shape, size, std=std, dtype=dtype, rngs=rngs
    )
    self.blocks = stack(
      functools.partial(
        vision.VisionBlock,
        size,
        config.intermediate_size,
        num_heads=config.num_heads,
        std=std,
        dtype=dtype,
      ),
      config.depth,
      rngs=rngs,
    )
    self.merger = vision.PatchMerger(
      size,
      config.out_hidden_size,
      patches=config.spatial_merge_size**2,
      std=std,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(
    self, inputs: Vision, *, dtype: Any, remat: str
  ) -> Float[Array, "S M D"]:
    config = self.config
    angles = rope.vision_angles(
      jnp.asarray(inputs.rows),
      jnp.asarray(inputs.cols),
      head_dim=config.head_dim,
      theta=config.rope_theta,
    )
    full = np.isin(np.arange(config.depth), config.fullatt_block_indexes)

    def call(
      block: vision.VisionBlock, x: jax.Array, full: jax.Array
    ) -> tuple[jax.Array, None]:
      segments = jnp.where(full, inputs.full_segments, inputs.window_segments)
      # Padding is a segment too, so that no query is left without a key.
      mask = segments[:, :, None] == segments[:, None, :]
      return constrain(block(x, angles, mask), "lane", None, None), None

    x = self.patch_embed(jnp.asarray(inputs.pixel_values, dtype))
    x, _ = scan(self.blocks, call, x, jnp.asarray(full), remat=remat)
    return self.merger(x)


class Model(nnx.Module):
  """The whole tree of weights, with HF's names."""

  def __init__(
    self, config: Config, *, stacked: bool, dtype: Any, rngs: nnx.Rngs
  ):
    text = config.text_config
    self.visual = VisionTower(config.vision_config, dtype=dtype, rngs=rngs)
    self.language_model = Decoder(
      text,
      axis_of=rope.chunked_axes(text.mrope_section),
      stacked=stacked,
      dtype=dtype,
      rngs=rngs,
    )
    if not config.tie_word_embeddings:
      self.lm_head = Linear(
        (text.hidden_size,),
        (text.vocab_size,),
        axes=("embed", "vocab"),
        use_bias=False,
        std=text.initializer_range,
        dtype=dtype,
        rngs=rngs,
      )
