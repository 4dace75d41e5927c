"""The decoder's attention: of whole rows, and of a group over its prompt."""

import functools
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxvlm.nn import kv_cache, rope
from jaxvlm.nn.block_attention import Attend, scale_product
from jaxvlm.nn.kv_cache import KVCache
from jaxvlm.nn.layers import Linear, RMSNorm
from jaxvlm.sharding import constrain


def attend_group(
  query: Float[Array, "Q G N H"],
  prompt: KVCache,
  prompt_mask: Bool[Array, "Q P"],
  completion: KVCache,
  completion_mask: Bool[Array, "Q C"],
) -> Float[Array, "Q G N H"]:
  """Attention of one new token of each completion: two products, one softmax.

  The prompt's keys, [Q K P H], are read once for all G completions of it; the
  completions' own are [Q K G C H]. Heads are split as the caches' are, and all
  on each device where those do not divide: else the caches would travel.
  """
  query = rearrange(query, "Q G (K R) H -> Q K G R H", K=prompt.keys.shape[1])
  query = constrain(query, "question", "kv_heads", None, None, "head_dim")
  masked = _masked(
    scale_product("qkgrh,qkph->qkgrp", query, prompt.keys), prompt_mask
  )
  own = _masked(
    scale_product("qkgrh,qkgch->qkgrc", query, completion.keys), completion_mask
  )
  # One softmax over both, which are never joined: that would copy the scores.
  top = jnp.maximum(masked.max(-1), own.max(-1))[..., None]
  weights, own_weights = jnp.exp(masked - top), jnp.exp(own - top)
  total = weights.sum(-1) + own_weights.sum(-1)
  out = _weigh("qkgrp,qkph->qkgrh", weights, prompt.values)
  out += _weigh("qkgrc,qkgch->qkgrh", own_weights, completion.values)
  out = (out / total[..., None]).astype(prompt.values.dtype)
  return rearrange(out, "Q K G R H -> Q G (K R) H")


def _masked(
  scores: Float[Array, "Q K G R C"], mask: Bool[Array, "Q C"]
) -> Float[Array, "Q K G R C"]:
  # Finite: a row that sees nothing (padding) must not turn into NaN.
  least = jnp.finfo(scores.dtype).min
  return jnp.where(mask[:, None, None, None, :], scores, least)


def _weigh(
  equation: str, weights: Float[Array, "..."], values: Float[Array, "..."]
) -> Float[Array, "..."]:
  return jnp.einsum(
    equation,
    weights.astype(values.dtype),
    values,
    preferred_element_type=jnp.float32,
  )


class Attention(nnx.Module):
  """The decoder's attention. HF: Qwen2_5_VLAttention, Qwen3VLTextAttention."""

  def __init__(
    self,
    size: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    qkv_bias: bool,
    qk_norm_eps: float | None,  # None: queries and keys are not normalized
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(Linear, std=std, dtype=dtype, rngs=rngs)
    head = ("heads", "head_dim")
    kv_head = ("kv_heads", "head_dim")
    q_shape = (num_heads, head_dim)
    kv_shape = (num_kv_heads, head_dim)
    self.q_proj = linear(
      (size,), q_shape, axes=("embed", *head), use_bias=qkv_bias
    )
    self.k_proj = linear(
      (size,), kv_shape, axes=("embed", *kv_head), use_bias=qkv_bias
    )
    self.v_proj = linear(
      (size,), kv_shape, axes=("embed", *kv_head), use_bias=qkv_bias
    )
    self.o_proj = linear(
      q_shape, (size,), axes=(*head, "embed"), use_bias=False
    )
    self.q_norm: Any = nnx.data(None)
    self.k_norm: Any = nnx.data(None)
    if qk_norm_eps is not None:
      # One weight for all heads.
      self.q_norm = RMSNorm(head_dim, eps=qk_norm_eps, dtype=dtype)
      self.k_norm = RMSNorm(head_dim, eps=qk_norm_eps, dtype=dtype)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    turns: rope.Turns,  # [B T F]
    attend: Attend,
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    query, new = self._project(x, turns)
    out = attend(query, new.keys, new.values)
    return self.o_proj(out), kv_cache.heads_first(new)

  def decode(
    self,
    x: Float[Array, "Q G D"],
    turns: rope.Turns,  # [Q 1 F]
    prompt: KVCache,
    prompt_mask: Bool[Array, "Q P"],
    completion: KVCache,
    written: Bool[Array, "Q C"],  # this token's column too
    column: Int[Array, ""],
  ) -> tuple[Float[Array, "Q G D"], KVCache]:
    query, new = self._project(x, turns)
    completion = kv_cache.write(completion, new, column)
    out = attend_group(query, prompt, prompt_mask, completion, written)
    return self.o_proj(out), completion

  def _project(
    self, x: Float[Array, "B T D"], turns: rope.Turns
  ) -> tuple[Float[Array, "B T N H"], KVCache]:
    query, keys = self.q_proj(x), self.k_proj(x)
    if self.q_norm is not None:
      query, keys = self.q_norm(query), self.k_norm(keys)
    query = rope.rotate(query, turns)
    keys = rope.rotate(keys, turns)
    return query, KVCache(keys=keys, values=self.v_proj(x))
