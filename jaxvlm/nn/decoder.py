"""The decoder: pre-norm layers of attention and a gated MLP."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxvlm.nn import rope
from jaxvlm.nn.attention import Attention
from jaxvlm.nn.block_attention import Attend
from jaxvlm.nn.kv_cache import KVCache
from jaxvlm.nn.layers import Embed, GatedMLP, RMSNorm, scan, stack
from jaxvlm.sharding import constrain
from jaxvlm.types import record


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """The decoder, in config.json's names."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  rms_norm_eps: float
  max_position_embeddings: int
  initializer_range: float
  head_dim: int
  rope_theta: float
  mrope_section: tuple[int, ...]


@record
class Embeds:
  """What the decoder reads."""

  tokens: Float[Array, "B T D"]
  # DeepStack: features of the pictures from K depths of the vision tower. The
  # k-th are added to the visual tokens after the k-th layer.
  levels: Float[Array, "K S M D"] | None
  vision_index: Int[Array, "B T"]


def visual_columns(
  features: Float[Array, "S M D"],
  vision_index: Int[Array, "B T"],
  other: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
  """Each visual token's own feature; `other` at the columns of text.

  Args:
    features: of S lanes.
    vision_index: place of a visual token within the question's own lane,
      which is the s-th for the s-th of S equal slices of the questions; -1
      for text.
    other: what stands at the columns of text.
  """
  index = vision_index.reshape(features.shape[0], -1)
  shown = jnp.take_along_axis(
    features, jnp.maximum(index, 0)[:, :, None], axis=1
  )
  shown = constrain(shown.reshape(other.shape), "question", None, None)
  return jnp.where((vision_index >= 0)[:, :, None], shown, other)


class DecoderLayer(nnx.Module):
  """HF: Qwen2_5_VLDecoderLayer, Qwen3VLTextDecoderLayer."""

  def __init__(
    self,
    config: TextConfig,
    *,
    qkv_bias: bool,
    qk_norm: bool,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    norm = functools.partial(
      RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype
    )
    self.input_layernorm = norm()
    self.self_attn = Attention(
      config.hidden_size,
      num_heads=config.num_attention_heads,
      num_kv_heads=config.num_key_value_heads,
      head_dim=config.head_dim,
      qkv_bias=qkv_bias,
      qk_norm_eps=config.rms_norm_eps if qk_norm else None,
      std=config.initializer_range,
      dtype=dtype,
      rngs=rngs,
    )
    self.post_attention_layernorm = norm()
    self.mlp = GatedMLP(
      config.hidden_size,
      config.intermediate_size,
      axis="embed",
      use_bias=False,
      std=config.initializer_range,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(
    self, x: jax.Array, turns: rope.Turns, attend: Attend
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    out, cache = self.self_attn(self.input_layernorm(x), turns, attend)
    return self._mlp(x + out), cache

  def decode(
    self, x: jax.Array, *args: Any
  ) -> tuple[Float[Array, "Q G D"], KVCache]:
    """`args` are those of Attention.decode after x."""
    out, cache = self.self_attn.decode(self.input_layernorm(x), *args)
    return self._mlp(x + out), cache

  def _mlp(self, x: jax.Array) -> jax.Array:
    x += self.mlp(self.post_attention_layernorm(x))
    return constrain(x, "question", None, None)


class Decoder(nnx.Module):
  """HF: Qwen2_5_VLTextModel, Qwen3VLTextModel.

  Layers are stacked, or a list for decoding.
  """

  def __init__(
    self,
    config: TextConfig,
    *,
    axis_of: tuple[int, ...],  # of position_ids, for each rotary pair
    qkv_bias: bool,
    qk_norm: bool,
    stacked: bool,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.config = config
    self.axis_of = axis_of
    self.embed_tokens = Embed(
      config.vocab_size,
      config.hidden_size,
      axes=("vocab", "embed"),
      std=config.initializer_range,
      dtype=dtype,
      rngs=rngs,
    )
    layer = functools.partial(
      DecoderLayer, config, qkv_bias=qkv_bias, qk_norm=qk_norm, dtype=dtype
    )
    count = config.num_hidden_layers
    self.layers: Any
    if stacked:
      self.layers = stack(layer, count, rngs=rngs)
    else:
      self.layers = nnx.List([layer(rngs=rngs) for _ in range(count)])
    self.norm = RMSNorm(
      config.hidden_size, eps=config.rms_norm_eps, dtype=dtype
    )

  def __call__(
    self,
    embeds: Embeds,
    position_ids: Int[Array, "3 B T"],
    attend: Attend,
    *,
    keep_cache: bool,
    remat: str,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Hidden states after the last norm; K and V stacked over layers."""
    turns = self.turns(position_ids, embeds.tokens.dtype)
    levels = embeds.levels
    count = 0 if levels is None else len(levels)

    def add_level(x: jax.Array, i: jax.Array) -> jax.Array:
      features = jax.lax.dynamic_index_in_dim(levels, i, keepdims=False)
      return x + visual_columns(
        features, embeds.vision_index, jnp.zeros_like(x)
      )

    def call(
      layer: DecoderLayer, x: jax.Array, i: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
      x, cache = layer(x, turns, attend)
      if count:
        x = jax.lax.cond(i < count, add_level, lambda x, i: x, x, i)
      return x, cache if keep_cache else None

    places = jnp.arange(self.config.num_hidden_layers)
    x, caches = scan(self.layers, call, embeds.tokens, places, remat=remat)
    return self.norm(x), caches

  def decode(
    self,
    x: Float[Array, "Q G D"],
    turns: rope.Turns,  # [Q 1 F]
    prompt_cache: list[KVCache],
    prompt_mask: Bool[Array, "Q P"],
    completion_cache: list[KVCache],
    written: Bool[Array, "Q C"],
    column: Int[Array, ""],
  ) -> tuple[Float[Array, "Q G D"], list[KVCache]]:
    """One token of every completion, through a list of layers."""
    caches = []
    for layer, prompt, completion in zip(
      self.layers, prompt_cache, completion_cache, strict=True
    ):
      x, cache = layer.decode(
        x, turns, prompt, prompt_mask, completion, written, column
      )
      caches.append(cache)
    return self.norm(x), caches

  def turns(self, position_ids: Int[Array, "3 *B"], dtype: Any) -> rope.Turns:
    """What tokens at these positions are turned by in every layer."""
    angles = rope.mrope_angles(
      position_ids,
      head_dim=self.config.head_dim,
      theta=self.config.rope_theta,
      axis_of=self.axis_of,
    )
    return rope.turns(angles, dtype)
