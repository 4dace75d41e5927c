"""Rotary angles and rotations against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
  Qwen2_5_VLTextConfig,
  Qwen2_5_VLVisionConfig,
  Qwen3VLTextConfig,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as reference
from transformers.models.qwen3_vl import modeling_qwen3_vl

from jaxvlm.nn import rope

SECTION = (16, 24, 24)


def make_reference():
  return reference.Qwen2_5_VLRotaryEmbedding(
    Qwen2_5_VLTextConfig(
      hidden_size=256,
      num_attention_heads=2,
      rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": list(SECTION),
      },
    )
  )


def make_angles(position_ids):
  return rope.mrope_angles(
    position_ids,
    head_dim=128,
    theta=1e6,
    axis_of=rope.chunked_axes(SECTION),
  )


@pytest.fixture(scope="module")
def position_ids():
  return np.random.default_rng(0).integers(0, 3000, (3, 2, 7))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_rotation_equals_transformers(position_ids, dtype):
  q, k = np.random.default_rng(1).normal(size=(2, 2, 3, 7, 128))
  q, k = (torch.tensor(x).to(getattr(torch, dtype)) for x in (q, k))
  cos, sin = make_reference()(q, torch.tensor(position_ids))
  expected, _ = reference.apply_rotary_pos_emb(q, k, cos, sin)
  x = jnp.asarray(q.float().numpy(), dtype).swapaxes(1, 2)
  got = rope.rotate(x, rope.turns(make_angles(position_ids), dtype))
  got = got.swapaxes(1, 2).astype(jnp.float32)
  # One unit in the last place of bfloat16: torch fuses no multiply-add.
  atol = 2e-6 if dtype == "float32" else 2**-6
  np.testing.assert_allclose(got, expected.float(), rtol=0, atol=atol)


def test_each_pair_turns_by_one_axis(position_ids):
  angles = make_angles(position_ids)
  for axis, pairs in enumerate((range(16), range(16, 40), range(40, 64))):
    moved = position_ids.copy()
    moved[axis] += 1
    difference = np.abs(make_angles(moved) - angles).max((0, 1))
    assert set(np.flatnonzero(difference)) == set(pairs)


@pytest.mark.parametrize(
  "section", [(24, 20, 20), (30, 17, 17), (20, 24, 20), (62, 1, 1)]
)
def test_interleaved_angles_equal_transformers(position_ids, section):
  theirs = modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding(
    Qwen3VLTextConfig(
      head_dim=128,
      rope_parameters={
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": list(section),
        "mrope_interleaved": True,
      },
    )
  )
  expected = theirs(torch.zeros(1), torch.tensor(position_ids))
  axis_of = rope.interleaved_axes(section, 128)
  assert axis_of != rope.chunked_axes(section)
  angles = rope.mrope_angles(
    position_ids, head_dim=128, theta=5e6, axis_of=axis_of
  )
  # torch's float32 power is an ulp off here and there; positions reach 3000.
  for ours, want in zip((jnp.cos, jnp.sin), expected, strict=True):
    np.testing.assert_allclose(ours(angles), want[..., :64], rtol=0, atol=4e-6)


def test_time_turns_the_pairs_that_interleaving_leaves():
  axes = rope.interleaved_axes((24, 20, 20), 128)
  assert axes == (0, 1, 2) * 20 + (0,) * 4
  assert rope.interleaved_axes((6, 3, 3), 24) == (0, 1, 2) * 3 + (0,) * 3


def test_equal_positions_are_ordinary_rope():
  positions = np.broadcast_to(np.arange(9), (3, 1, 9))
  expected = np.outer(np.arange(9), 1e6 ** (-np.arange(0, 128, 2) / 128))
  np.testing.assert_allclose(make_angles(positions)[0], expected, rtol=1e-6)


def test_vision_rotation_equals_transformers():
  rows, cols = np.random.default_rng(0).integers(0, 60, (2, 10))
  q, k = torch.tensor(np.random.default_rng(1).normal(size=(2, 10, 3, 80)))
  theirs = reference.Qwen2_5_VLVisionRotaryEmbedding(
    Qwen2_5_VLVisionConfig(hidden_size=240, num_heads=3)
  )
  positions = torch.tensor(np.stack([rows, cols], axis=1))
  expected, _ = reference.apply_rotary_pos_emb_vision(
    q.float(), k.float(), *theirs(q, positions)
  )
  got = rope.rotate(
    jnp.asarray(q, jnp.float32),
    rope.turns(
      rope.vision_angles(rows, cols, head_dim=80, theta=1e4), jnp.float32
    ),
  )
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_differences_alone():
  random = np.random.default_rng(0)
  q, k = jnp.asarray(random.normal(size=(2, 1, 1, 128)), jnp.float32)

  def product(i, j):
    turned, other = (
      rope.rotate(
        x, rope.turns(make_angles(np.full((3, 1), place)), jnp.float32)
      )
      for x, place in ((q, i), (k, j))
    )
    assert abs(jnp.linalg.norm(turned) - jnp.linalg.norm(q)) < 1e-4
    return float((turned * other).sum())

  assert abs(product(7, 3) - product(104, 100)) < 1e-3
  assert abs(product(7, 3) - product(7, 4)) > 1e-2
