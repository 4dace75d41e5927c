"""The tower's pieces against transformers' modules."""

from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as reference

from jaxvlm.nn import rope, vision

SIZE, HEADS, MLP = 48, 4, 56
MAKE = {"std": 0.1, "dtype": "float32"}


@pytest.fixture
def x():
  random = np.random.default_rng(0)
  return random.normal(size=(24, SIZE)).astype(np.float32)


def fill(theirs):
  """Random weights everywhere, also in biases and norms."""
  torch.manual_seed(0)
  with torch.no_grad():
    for weight in theirs.parameters():
      weight.add_(0.2 * torch.randn_like(weight))
  return theirs


def copy(linear, theirs):
  kernel = theirs.weight.detach().numpy()
  kernel = kernel.reshape(kernel.shape[0], -1).T
  linear.kernel[...] = jnp.asarray(kernel.reshape(linear.kernel.shape))
  if theirs.bias is not None:
    bias = theirs.bias.detach().numpy()
    linear.bias[...] = jnp.asarray(bias.reshape(linear.bias.shape))


def copy_norm(norm, theirs):
  norm.weight[...] = jnp.asarray(theirs.weight.detach().numpy())


def assert_close(got, expected):
  expected = expected.detach().numpy()
  np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


def test_patch_embed_equals_the_convolution():
  theirs = fill(reference.Qwen2_5_VisionPatchEmbed(embed_dim=SIZE))
  ours = vision.PatchEmbed((3, 2, 14, 14), SIZE, rngs=nnx.Rngs(0), **MAKE)
  copy(ours.proj, theirs.proj)
  patches = np.random.default_rng(0).normal(size=(5, 1176))
  patches = patches.astype(np.float32)
  assert_close(ours(patches[None])[0], theirs(torch.tensor(patches)))


@pytest.fixture(scope="module")
def merger():
  theirs = fill(reference.Qwen2_5_VLPatchMerger(32, SIZE))
  ours = vision.PatchMerger(SIZE, 32, patches=4, rngs=nnx.Rngs(0), **MAKE)
  copy_norm(ours.ln_q, theirs.ln_q)
  copy(ours.linear_fc1, theirs.mlp[0])
  copy(ours.linear_fc2, theirs.mlp[2])
  return ours, theirs


def test_merger_equals_transformers(merger, x):
  ours, theirs = merger
  assert_close(ours(x[None])[0], theirs(torch.tensor(x)))


def test_the_merger_without_the_exact_gelu_is_off(merger, x, monkeypatch):
  ours, theirs = merger
  gelu = jax.nn.gelu
  monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x))
  with pytest.raises(AssertionError):
    assert_close(ours(x[None])[0], theirs(torch.tensor(x)))


@pytest.fixture(scope="module")
def block():
  config = Qwen2_5_VLVisionConfig(
    hidden_size=SIZE, num_heads=HEADS, intermediate_size=MLP
  )
  theirs = fill(reference.Qwen2_5_VLVisionBlock(config))
  ours = vision.VisionBlock(
    SIZE, MLP, num_heads=HEADS, rngs=nnx.Rngs(0), **MAKE
  )
  copy_norm(ours.norm1, theirs.norm1)
  copy_norm(ours.norm2, theirs.norm2)
  copy(ours.attn.qkv, theirs.attn.qkv)
  copy(ours.attn.proj, theirs.attn.proj)
  for name in ("gate_proj", "up_proj", "down_proj"):
    copy(getattr(ours.mlp, name), getattr(theirs.mlp, name))
  return ours, theirs


@pytest.mark.parametrize("lengths", [[24], [16, 8], [4, 12, 8]])
def test_block_equals_transformers_within_segments(block, x, lengths):
  ours, theirs = block
  rows, cols = np.random.default_rng(1).integers(0, 9, (2, 24))
  angles = rope.vision_angles(rows, cols, head_dim=12, theta=1e4)
  both = torch.tensor(np.concatenate([angles, angles], axis=-1))
  expected = theirs(
    torch.tensor(x),
    cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
    position_embeddings=(both.cos(), both.sin()),
  )
  segments = np.repeat(np.arange(len(lengths)), lengths)
  mask = segments[:, None] == segments
  assert_close(ours(x[None], angles[None], mask[None])[0], expected)


def test_vision_rope_stays_float32_in_a_bfloat16_tower(block, x):
  ours, theirs = block
  rows, cols = np.random.default_rng(1).integers(900, 1000, (2, 24))
  angles = rope.vision_angles(rows, cols, head_dim=12, theta=1e4)
  assert angles.dtype == jnp.float32
  both = torch.tensor(np.concatenate([angles, angles], axis=-1))
  expected = deepcopy(theirs).to(torch.bfloat16)(
    torch.tensor(x).to(torch.bfloat16),
    cu_seqlens=torch.tensor([0, 24], dtype=torch.int32),
    position_embeddings=(both.cos(), both.sin()),
  )
  low = jnp.asarray(x[None], jnp.bfloat16)
  got = ours(low, angles[None], np.ones((1, 24, 24), bool))[0]
  assert got.dtype == jnp.bfloat16
  expected = expected.detach().float().numpy()
  error = np.linalg.norm(got.astype(jnp.float32) - expected)
  assert error < 3e-2 * np.linalg.norm(expected)
