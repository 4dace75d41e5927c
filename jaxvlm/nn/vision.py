"""The vision tower's pieces. Patches stand in lanes: [S L ...]."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxvlm.nn import rope
from jaxvlm.nn.attention import attend
from jaxvlm.nn.layers import GatedMLP, Linear, RMSNorm

EPS = 1e-6  # hard-coded in HF's towers


class PatchEmbed(nnx.Module):
  """HF's Conv3d over one patch, which is one matmul."""

  def __init__(
    self,
    patch_shape: tuple[int, ...],  # channels, time, rows, columns
    size: int,
    *,
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.proj = Linear(
      (math.prod(patch_shape),),
      (size,),
      axes=("patch", "vision_embed"),
      hf_shape=(size, *patch_shape),
      use_bias=False,
      std=std,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, patches: Float[Array, "S L X"]) -> Float[Array, "S L E"]:
    return self.proj(patches)


class VisionAttention(nnx.Module):
  """Attention within segments; every head has its own keys and values."""

  def __init__(
    self, size: int, *, num_heads: int, std: float, dtype: Any, rngs: nnx.Rngs
  ):
    linear = functools.partial(
      Linear, use_bias=True, std=std, dtype=dtype, rngs=rngs
    )
    head = (num_heads, size // num_heads)
    # The fused output splits as (q k v, head, head_dim), not head first.
    self.qkv = linear(
      (size,), (3, *head), axes=("vision_embed", None, "heads", "head_dim")
    )
    self.proj = linear(
      head, (size,), axes=("heads", "head_dim", "vision_embed")
    )

  def __call__(
    self,
    x: Float[Array, "S L E"],
    angles: Float[Array, "S L F"],
    mask: Bool[Array, "S L L"],
  ) -> Float[Array, "S L E"]:
    query, keys, values = jnp.moveaxis(self.qkv(x), 2, 0)
    query = rope.rotate(query, angles, dtype=jnp.float32)
    keys = rope.rotate(keys, angles, dtype=jnp.float32)
    return self.proj(attend(query, keys, values, mask))


class VisionBlock(nnx.Module):
  """HF: Qwen2_5_VLVisionBlock."""

  def __init__(
    self,
    size: int,
    mlp_size: int,
    *,
    num_heads: int,
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.norm1 = RMSNorm(size, eps=EPS, dtype=dtype)
    self.norm2 = RMSNorm(size, eps=EPS, dtype=dtype)
    self.attn = VisionAttention(
      size, num_heads=num_heads, std=std, dtype=dtype, rngs=rngs
    )
    self.mlp = GatedMLP(
      size,
      mlp_size,
      axis="vision_embed",
      use_bias=True,
      std=std,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(
    self,
    x: Float[Array, "S L E"],
    angles: Float[Array, "S L F"],
    mask: Bool[Array, "S L L"],
  ) -> Float[Array, "S L E"]:
    x += self.attn(self.norm1(x), angles, mask)
    return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
  """Four neighbouring patches -> one token. HF: Qwen2_5_VLPatchMerger.

  HF names its two linear layers mlp.0 and mlp.2; here they have the names
  that they have in HF's Qwen3-VL.
  """

  def __init__(
    self,
    size: int,
    out_size: int,
    *,
    patches: int,
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(
      Linear, use_bias=True, std=std, dtype=dtype, rngs=rngs
    )
    self.patches = patches
    wide = patches * size
    self.ln_q = RMSNorm(size, eps=EPS, dtype=dtype)
    self.linear_fc1 = linear((wide,), (wide,), axes=("vision_embed", "mlp"))
    self.linear_fc2 = linear((wide,), (out_size,), axes=("mlp", "embed"))

  def __call__(self, x: Float[Array, "S L E"]) -> Float[Array, "S M D"]:
    x = rearrange(self.ln_q(x), "S (M R) E -> S M (R E)", R=self.patches)
    # The exact GELU, not the tanh form that is jax's default.
    return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))
