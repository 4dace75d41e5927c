"""The vision tower's pieces. Patches stand in lanes: [S L ...]."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jaxvlm.nn import rope
from jaxvlm.nn.block_attention import Attend
from jaxvlm.nn.layers import MLP, Linear

EPS = 1e-6  # hard-coded in HF's towers


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """A vision tower, in config.json's names."""

  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  in_channels: int
  patch_size: int
  temporal_patch_size: int
  spatial_merge_size: int
  out_hidden_size: int
  initializer_range: float
  rope_theta: float

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def patch_shape(self) -> tuple[int, int, int, int]:
    sides = (self.patch_size, self.patch_size)
    return (self.in_channels, self.temporal_patch_size, *sides)


class PatchEmbed(nnx.Module):
  """HF's Conv3d over one patch, which is one matmul."""

  def __init__(
    self,
    patch_shape: tuple[int, ...],  # channels, time, rows, columns
    size: int,
    *,
    use_bias: bool,
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.proj = Linear(
      (math.prod(patch_shape),),
      (size,),
      axes=("patch", "vision_embed"),
      hf_shape=(size, *patch_shape),
      use_bias=use_bias,
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
      (size,),
      (3, *head),
      axes=("vision_embed", None, "vision_heads", "head_dim"),
    )
    self.proj = linear(
      head, (size,), axes=("vision_heads", "head_dim", "vision_embed")
    )

  def __call__(
    self,
    x: Float[Array, "S L E"],
    turns: rope.Turns,  # [S L F], float32
    attend: Attend,
  ) -> Float[Array, "S L E"]:
    query, keys, values = jnp.moveaxis(self.qkv(x), 2, 0)
    query = rope.rotate(query, turns)
    keys = rope.rotate(keys, turns)
    return self.proj(attend(query, keys, values))


class VisionBlock(nnx.Module):
  """HF: Qwen2_5_VLVisionBlock, Qwen3VLVisionBlock."""

  def __init__(
    self,
    size: int,
    *,
    num_heads: int,
    make_norm: Callable[[], nnx.Module],
    make_mlp: Callable[[], nnx.Module],
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.norm1, self.norm2 = make_norm(), make_norm()
    self.attn = VisionAttention(
      size, num_heads=num_heads, std=std, dtype=dtype, rngs=rngs
    )
    self.mlp = make_mlp()

  def __call__(
    self,
    x: Float[Array, "S L E"],
    turns: rope.Turns,  # [S L F], float32
    attend: Attend,
  ) -> Float[Array, "S L E"]:
    x += self.attn(self.norm1(x), turns, attend)
    return x + self.mlp(self.norm2(x))


def by_token(x: Float[Array, "*K S L E"], size: int) -> jax.Array:
  """[*K S L E] -> [*K S M B E], the B = size**2 patches of each token."""
  return rearrange(x, "... (M B) E -> ... M B E", B=size**2)


class PatchMerger(MLP):
  """Four neighbouring patches -> one token.

  HF: Qwen2_5_VLPatchMerger, Qwen3VLVisionPatchMerger. The first calls norm
  ln_q and the two linear layers mlp.0 and mlp.2; here they have the second's
  names. The norm is over a patch, or over all four where it is wide.
  """

  def __init__(
    self,
    size: int,
    out_size: int,
    *,
    patches: int,
    norm: nnx.Module,
    norm_after: bool,
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    wide = patches * size
    # The exact GELU, not the tanh form that is jax's default.
    super().__init__(
      wide,
      wide,
      out_size,
      act=functools.partial(jax.nn.gelu, approximate=False),
      axes=("vision_embed", "embed"),
      std=std,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = norm
    self.norm_after = norm_after

  def __call__(self, x: Float[Array, "S M B E"]) -> Float[Array, "S M D"]:
    if not self.norm_after:
      x = self.norm(x)
    x = rearrange(x, "S M B E -> S M (B E)")
    if self.norm_after:
      x = self.norm(x)
    return super().__call__(x)
