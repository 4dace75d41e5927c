"""Rotary positions: two axes for patches, three for tokens (M-RoPE)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxvlm.types import record


@record
class Turns:
  """By what the pairs of every head are turned, for all layers."""

  cos: Float[Array, "*B F"]
  sin: Float[Array, "*B F"]


def _frequencies(size: int, theta: float) -> Float[np.ndarray, " F"]:
  """HF's inv_freq in float32: theta ** (-2 i / size), i < size / 2."""
  exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
  # numpy's float32 power is an ulp off torch's, which far positions magnify.
  powers = np.power(theta, exponents, dtype=np.float64).astype(np.float32)
  return np.float32(1) / powers


def vision_angles(
  rows: Int[Array, "*B"],
  cols: Int[Array, "*B"],
  *,
  head_dim: int,
  theta: float,
) -> Float[Array, "*B F"]:
  """Angles of patches: the row turns the first F / 2 pairs, the column the rest.

  F = head_dim / 2. HF: Qwen2_5_VisionRotaryEmbedding.
  """
  frequencies = jnp.asarray(_frequencies(head_dim // 2, theta))
  return jnp.concatenate(
    [_times(rows, frequencies), _times(cols, frequencies)], axis=-1
  )


def mrope_angles(
  position_ids: Int[Array, "3 *B"],
  *,
  head_dim: int,
  theta: float,
  axis_of: tuple[int, ...],
) -> Float[Array, "*B F"]:
  """Angles of tokens: pair i turns by the position on axis `axis_of[i]`.

  F = head_dim / 2; axes are 0 time, 1 height, 2 width. Text has the same
  position on all three, for which this is ordinary rope.
  """
  frequencies = jnp.asarray(_frequencies(head_dim, theta))
  positions = jnp.moveaxis(position_ids[np.asarray(axis_of), ...], 0, -1)
  positions = positions.astype(jnp.float32)
  return positions * jnp.broadcast_to(frequencies, positions.shape)


def chunked_axes(mrope_section: tuple[int, ...]) -> tuple[int, ...]:
  """Qwen2.5-VL's layout: consecutive chunks of time, height and width."""
  return tuple(int(i) for i in np.repeat(np.arange(3), mrope_section))


def interleaved_axes(
  mrope_section: tuple[int, ...], head_dim: int
) -> tuple[int, ...]:
  """Qwen3-VL's layout: time, height and width in turn, and time to the end."""
  axes = np.zeros(head_dim // 2, np.int64)
  for axis in (1, 2):
    axes[axis : 3 * mrope_section[axis] : 3] = axis
  return tuple(axes.tolist())


def turns(angles: Float[Array, "*B F"], dtype: Any) -> Turns:
  """cos and sin, taken in float32 and cast to what `rotate` computes in."""
  return Turns(
    cos=jnp.cos(angles).astype(dtype), sin=jnp.sin(angles).astype(dtype)
  )


def rotate(x: Float[Array, "*B N H"], turns: Turns) -> Float[Array, "*B N H"]:
  """Turns the pairs (i, i + H / 2) of every head by angle i.

  In the turns' dtype: float32 in HF's vision tower, the model's own in its
  decoder.
  """
  cos = jnp.expand_dims(turns.cos, -2)
  sin = jnp.expand_dims(turns.sin, -2)
  low, high = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  turned = jnp.concatenate(
    [low * cos - high * sin, high * cos + low * sin], axis=-1
  )
  return turned.astype(x.dtype)


def _times(
  positions: Int[Array, "*B"], frequencies: Float[Array, " F"]
) -> Float[Array, "*B F"]:
  # Elementwise in float32: an einsum would run in bfloat16 passes on a TPU.
  grown = jnp.expand_dims(positions.astype(jnp.float32), -1)
  shape = (*positions.shape, frequencies.size)
  return jnp.broadcast_to(grown, shape) * jnp.broadcast_to(frequencies, shape)
