"""Qwen3-VL (dense), equal to Hugging Face transformers 5.23."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxvlm.models import base
from jaxvlm.nn import rope, vision
from jaxvlm.nn.block_attention import WIDE, of_segments
from jaxvlm.nn.layers import MLP, Embed, LayerNorm, scan, stack
from jaxvlm.sharding import constrain
from jaxvlm.types import Features, Unmerged, Vision

# As in qwen2_5_vl.py.
BOX_SIDE = 1000
PROCESSOR = {
  "processor_class": "Qwen3VLProcessor",
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
}
RENAMED: dict[str, str] = {}
HUB_NAMES = {
  "language_model.": "model.language_model.",
  "visual.": "model.visual.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(vision.VisionConfig):
  """The vision tower, in config.json's names."""

  num_position_embeddings: int  # of a square table
  deepstack_visual_indexes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(base.Config):
  """A Qwen3-VL architecture."""

  model_type = "qwen3_vl"
  architecture = "Qwen3VLForConditionalGeneration"
  vision_class = VisionConfig
  vision_act = "gelu_pytorch_tanh"
  text_defaults: ClassVar[Mapping[str, Any]] = {
    "head_dim": 128,
    "rope_theta": 500000.0,
    "mrope_section": (24, 20, 20),
  }

  vision_config: VisionConfig

  def __post_init__(self) -> None:
    super().__post_init__()
    tower, layers = self.vision_config, self.text_config.num_hidden_layers
    taps = tower.deepstack_visual_indexes
    rising = list(taps) == sorted(set(taps))
    if not rising or any(not 0 <= tap < tower.depth for tap in taps):
      raise ValueError(
        f"config: deepstack_visual_indexes are {taps}; expected rising numbers "
        f"of the {tower.depth} blocks."
      )
    if len(taps) > layers:
      raise ValueError(
        f"config: {len(taps)} deepstack_visual_indexes for {layers} layers."
      )


def _size(
  text: tuple[int, int, int, int],
  tower: tuple[int, int, int, tuple[int, int, int]],
  *,
  tied: bool,
) -> Config:
  hidden, layers, heads, mlp = text
  depth, vision_hidden, vision_mlp, taps = tower
  return Config.from_hf(
    {
      "model_type": Config.model_type,
      "tie_word_embeddings": tied,
      "text_config": {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": mlp,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000.0,
      },
      "vision_config": {
        "depth": depth,
        "hidden_size": vision_hidden,
        "num_heads": 16,
        "intermediate_size": vision_mlp,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": list(taps),
      },
    }
  )


_SMALL_TOWER = (24, 1024, 4096, (5, 11, 17))
_LARGE_TOWER = (27, 1152, 4304, (8, 16, 24))

# What the published checkpoints' config.json say.
SIZES = {
  "2b": _size((2048, 28, 16, 6144), _SMALL_TOWER, tied=True),
  "4b": _size((2560, 36, 32, 9728), _SMALL_TOWER, tied=True),
  "8b": _size((4096, 36, 32, 12288), _LARGE_TOWER, tied=False),
  "32b": _size((5120, 64, 64, 25600), _LARGE_TOWER, tied=False),
}


class VisionTower(nnx.Module):
  """HF: Qwen3VLVisionModel."""

  def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
    size, std = config.hidden_size, config.initializer_range
    patches = config.spatial_merge_size**2
    norm = functools.partial(LayerNorm, eps=vision.EPS, dtype=dtype)

    def make_block(*, rngs: nnx.Rngs) -> vision.VisionBlock:
      make_mlp = functools.partial(
        MLP,
        size,
        config.intermediate_size,
        size,
        act=functools.partial(jax.nn.gelu, approximate=True),
        axes=("vision_embed", "vision_embed"),
        std=std,
        dtype=dtype,
        rngs=rngs,
      )
      return vision.VisionBlock(
        size,
        num_heads=config.num_heads,
        make_norm=functools.partial(norm, size),
        make_mlp=make_mlp,
        std=std,
        dtype=dtype,
        rngs=rngs,
      )

    def make_merger(*, norm_after: bool, rngs: nnx.Rngs) -> vision.PatchMerger:
      return vision.PatchMerger(
        size,
        config.out_hidden_size,
        patches=patches,
        norm=norm(patches * size if norm_after else size),
        norm_after=norm_after,
        std=std,
        dtype=dtype,
        rngs=rngs,
      )

    self.config = config
    self.patch_embed = vision.PatchEmbed(
      config.patch_shape, size, use_bias=True, std=std, dtype=dtype, rngs=rngs
    )
    self.pos_embed = Embed(
      config.num_position_embeddings,
      size,
      axes=("place", "vision_embed"),
      std=std,
      dtype=dtype,
      rngs=rngs,
    )
    self.blocks = stack(make_block, config.depth, rngs=rngs)
    self.merger = make_merger(norm_after=False, rngs=rngs)
    self.deepstack_merger_list: Any = nnx.data(None)
    if config.deepstack_visual_indexes:
      self.deepstack_merger_list = stack(
        functools.partial(make_merger, norm_after=True),
        len(config.deepstack_visual_indexes),
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
    """All but the mergers."""
    config = self.config
    angles = rope.vision_angles(
      jnp.asarray(inputs.rows),
      jnp.asarray(inputs.cols),
      head_dim=config.head_dim,
      theta=config.rope_theta,
    )
    turns = rope.turns(angles, jnp.float32)
    look = functools.partial(
      attend, visibility=of_segments(jnp.asarray(inputs.full_segments), WIDE)
    )
    x = self.patch_embed(jnp.asarray(inputs.pixel_values, dtype))
    x += self._places(inputs).astype(dtype)
    taps = config.deepstack_visual_indexes

    def call(
      block: vision.VisionBlock, carry: Any, slot: jax.Array
    ) -> tuple[Any, None]:
      x, tapped = carry
      x = constrain(block(x, turns, look), "lane", None, None)
      if taps:
        tapped = jax.lax.cond(
          slot >= 0, _put, lambda tapped, x, slot: tapped, tapped, x, slot
        )
      return (x, tapped), None

    # Where each block's output goes; -1: it is no tap.
    slots = np.full(config.depth, -1, np.int32)
    slots[list(taps)] = np.arange(len(taps))
    tapped = jnp.zeros((len(taps), *x.shape), x.dtype)
    (x, tapped), _ = scan(
      self.blocks, call, (x, tapped), jnp.asarray(slots), remat=remat
    )
    size = config.spatial_merge_size
    return Unmerged(
      tokens=vision.by_token(x, size),
      levels=vision.by_token(tapped, size) if taps else None,
    )

  def merge(self, seen: Unmerged, *, remat: str) -> Features:
    """What `see` gave, merged."""
    levels = seen.levels
    if levels is not None:
      levels = _merge_levels(self.deepstack_merger_list, levels, remat=remat)
    return Features(tokens=self.merger(seen.tokens), levels=levels)

  def _places(self, inputs: Vision) -> Float[Array, "S L E"]:
    """Learned positions, interpolated from the table's four nearest places."""
    assert inputs.place_index is not None and inputs.place_weight is not None
    total = jnp.float32(0)
    for i in range(inputs.place_index.shape[-1]):
      row = self.pos_embed(inputs.place_index[..., i], jnp.float32)
      weight = jnp.asarray(inputs.place_weight[..., i, None])
      total += row * jnp.broadcast_to(weight, row.shape)
    return total


def _put(tapped: jax.Array, x: jax.Array, slot: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(tapped, x, slot, axis=0)


def _merge_levels(
  mergers: vision.PatchMerger,
  tapped: Float[Array, "K S M B E"],
  *,
  remat: str,
) -> Float[Array, "K S M D"]:
  """Each tap through its own merger."""

  def call(
    merger: vision.PatchMerger, none: None, x: jax.Array
  ) -> tuple[None, jax.Array]:
    return none, merger(x)

  _, levels = scan(mergers, call, None, tapped, remat=remat)
  return levels


class Model(base.Model):
  """The whole tree of weights, with HF's names."""

  def __init__(self, config: Config, **how: Any):
    text = config.text_config
    super().__init__(
      config,
      tower=VisionTower,
      axis_of=rope.interleaved_axes(text.mrope_section, text.head_dim),
      qkv_bias=False,
      qk_norm=True,
      **how,
    )
