"""The decoder: pre-norm layers of attention and a gated MLP."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxvlm.nn import rope
from jaxvlm.nn.attention import Attention
from jaxvlm.nn.kv_cache import KVCache
from jaxvlm.nn.layers import Embed, GatedMLP, RMSNorm, scan, stack
from jaxvlm.sharding import constrain


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
  rope_theta: float
  mrope_section: tuple[int, ...]

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads


class DecoderLayer(nnx.Module):
  """HF: Qwen2_5_VLDecoderLayer."""

  def __init__(self, config: TextConfig, *, dtype: Any, rngs: nnx.Rngs):
    norm = functools.partial(
      RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype
    )
    self.input_layernorm = norm()
    self.self_attn = Attention(
      config.hidden_size,
      num_heads=config.num_attention_heads,
      num_kv_heads=config.num_key_value_heads,
      head_dim=config.head_dim,
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
    self, x: jax.Array, angles: jax.Array, mask: jax.Array
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    out, cache = self.self_attn(self.input_layernorm(x), angles, mask)
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
  """HF: Qwen2_5_VLTextModel. Layers are stacked, or a list for decoding."""

  def __init__(
    self,
    config: TextConfig,
    *,
    axis_of: tuple[int, ...],  # of position_ids, for each rotary pair
    stacked: bool,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.config = config
    self.axis_of = axis_of
    self.embed_tokens = Embed(
      config.vocab_size,
      config.hidden_size,
      std=config.initializer_range,
      dtype=dtype,
      rngs=rngs,
    )
    layer = functools.partial(DecoderLayer, config, dtype=dtype)
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
    x: Float[Array, "B T D"],
    position_ids: Int[Array, "3 B T"],
    mask: Bool[Array, "B T T"],
    *,
    keep_cache: bool,
    remat: str,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Hidden states after the last norm; K and V stacked over layers."""
    angles = self._angles(position_ids)

    def call(
      layer: DecoderLayer, x: jax.Array, _: None
    ) -> tuple[jax.Array, KVCache | None]:
      x, cache = layer(x, angles, mask)
      return x, cache if keep_cache else None

    x, caches = scan(self.layers, call, x, remat=remat)
    return self.norm(x), caches

  def decode(
    self,
    x: Float[Array, "Q G D"],
    position_ids: Int[Array, "3 Q G"],
    prompt_cache: list[KVCache],
    prompt_mask: Bool[Array, "Q P"],
    completion_cache: list[KVCache],
    column: Int[Array, ""],
  ) -> tuple[Float[Array, "Q G D"], list[KVCache]]:
    """One token of every completion, through a list of layers."""
    angles = self._angles(position_ids)
    caches = []
    for layer, prompt, completion in zip(
      self.layers, prompt_cache, completion_cache, strict=True
    ):
      x, cache = layer.decode(
        x, angles, prompt, prompt_mask, completion, column
      )
      caches.append(cache)
    return self.norm(x), caches

  def _angles(self, position_ids: Int[Array, "3 *B"]) -> jax.Array:
    return rope.mrope_angles(
      position_ids,
      head_dim=self.config.head_dim,
      theta=self.config.rope_theta,
      axis_of=self.axis_of,
    )
