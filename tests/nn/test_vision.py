"""The tower's pieces against transformers' modules."""

import functools
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLVisionConfig, Qwen3VLVisionConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from jaxvlm.nn import rope, vision
from jaxvlm.nn.block_attention import attend, of_segments
from jaxvlm.nn.layers import MLP, GatedMLP, LayerNorm, RMSNorm

SIZE, HEADS, MLP_SIZE = 48, 4, 56
MAKE = {"std": 0.1, "dtype": "float32"}
QWEN3 = Qwen3VLVisionConfig(
  hidden_size=SIZE,
  num_heads=HEADS,
  intermediate_size=MLP_SIZE,
  out_hidden_size=32,
  patch_size=16,
)
make_norm = {
  "qwen2_5_vl": functools.partial(RMSNorm, eps=vision.EPS, dtype="float32"),
  "qwen3_vl": functools.partial(LayerNorm, eps=vision.EPS, dtype="float32"),
}


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
  for name, weight in theirs.named_parameters():
    getattr(norm, name)[...] = jnp.asarray(weight.detach().numpy())


def assert_close(got, expected):
  expected = expected.detach().numpy()
  np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
  ("make", "patch"),
  [
    (functools.partial(qwen2_5.Qwen2_5_VisionPatchEmbed, embed_dim=SIZE), 14),
    (functools.partial(qwen3.Qwen3VLVisionPatchEmbed, QWEN3), 16),
  ],
)
def test_patch_embed_equals_the_convolution(make, patch):
  theirs = fill(make())
  ours = vision.PatchEmbed(
    (3, 2, patch, patch),
    SIZE,
    use_bias=theirs.proj.bias is not None,
    rngs=nnx.Rngs(0),
    **MAKE,
  )
  copy(ours.proj, theirs.proj)
  patches = np.random.default_rng(0).normal(size=(5, 6 * patch**2))
  patches = patches.astype(np.float32)
  assert_close(ours(patches[None])[0], theirs(torch.tensor(patches)))


# -- mergers -----------------------------------------------------------------


def make_merger(norm, *, norm_after):
  return vision.PatchMerger(
    SIZE,
    32,
    patches=4,
    norm=norm,
    norm_after=norm_after,
    rngs=nnx.Rngs(0),
    **MAKE,
  )


def make_qwen2_5_merger():
  theirs = fill(qwen2_5.Qwen2_5_VLPatchMerger(32, SIZE))
  ours = make_merger(make_norm["qwen2_5_vl"](SIZE), norm_after=False)
  copy_norm(ours.norm, theirs.ln_q)
  copy(ours.linear_fc1, theirs.mlp[0])
  copy(ours.linear_fc2, theirs.mlp[2])
  return ours, theirs


def make_qwen3_merger(norm_after):
  theirs = fill(
    qwen3.Qwen3VLVisionPatchMerger(QWEN3, use_postshuffle_norm=norm_after)
  )
  norm = make_norm["qwen3_vl"](4 * SIZE if norm_after else SIZE)
  ours = make_merger(norm, norm_after=norm_after)
  copy_norm(ours.norm, theirs.norm)
  copy(ours.linear_fc1, theirs.linear_fc1)
  copy(ours.linear_fc2, theirs.linear_fc2)
  return ours, theirs


MERGERS = {
  "qwen2_5_vl": make_qwen2_5_merger,
  "qwen3_vl": functools.partial(make_qwen3_merger, False),
  "deepstack": functools.partial(make_qwen3_merger, True),
}


def merge(merger, x):
  """Patches [L E] -> tokens [M D]."""
  return merger(vision.by_token(x[None], 2))[0]


@pytest.mark.parametrize("kind", MERGERS)
def test_merger_equals_transformers(kind, x):
  ours, theirs = MERGERS[kind]()
  assert_close(merge(ours, x), theirs(torch.tensor(x)))


@pytest.mark.parametrize("kind", MERGERS)
def test_epsilon_is_that_of_transformers(kind, x):
  """It shows where the variance is as small."""
  ours, theirs = MERGERS[kind]()
  small = np.float32(1e-3) * x
  assert_close(merge(ours, small), theirs(torch.tensor(small)))


@pytest.mark.parametrize("kind", MERGERS)
def test_the_merger_without_the_exact_gelu_is_off(kind, x):
  ours, theirs = MERGERS[kind]()
  ours.act = jax.nn.gelu  # the tanh form
  with pytest.raises(AssertionError):
    assert_close(merge(ours, x), theirs(torch.tensor(x)))


def test_a_deepstack_merger_that_norms_each_patch_is_off(x):
  ours, theirs = make_qwen3_merger(True)
  weight, bias = ours.norm.weight, ours.norm.bias

  def each(x):
    patches = x.reshape(1, -1, 4, SIZE)
    patches -= patches.mean(-1, keepdims=True)
    patches /= np.sqrt((patches**2).mean(-1, keepdims=True) + 1e-6)
    return patches.reshape(x.shape) * weight[None, None] + bias[None, None]

  ours.norm = each
  got = merge(ours, x * np.repeat([1, 2, 4, 8], 6)[:, None])
  ours.norm = make_norm["qwen3_vl"](4 * SIZE)
  with pytest.raises(AssertionError):
    assert_close(got, theirs(torch.tensor(x)))


# -- blocks ------------------------------------------------------------------


def seeing(segments):
  return functools.partial(attend, visibility=of_segments(segments))


def make_block(family, theirs, make_mlp):
  ours = vision.VisionBlock(
    SIZE,
    num_heads=HEADS,
    make_norm=functools.partial(make_norm[family], SIZE),
    make_mlp=make_mlp,
    rngs=nnx.Rngs(0),
    **MAKE,
  )
  copy_norm(ours.norm1, theirs.norm1)
  copy_norm(ours.norm2, theirs.norm2)
  copy(ours.attn.qkv, theirs.attn.qkv)
  copy(ours.attn.proj, theirs.attn.proj)
  for name, linear in theirs.mlp.named_children():
    if isinstance(linear, torch.nn.Linear):
      copy(getattr(ours.mlp, name), linear)
  return ours, theirs


def make_qwen2_5_block():
  config = Qwen2_5_VLVisionConfig(
    hidden_size=SIZE, num_heads=HEADS, intermediate_size=MLP_SIZE
  )
  make_mlp = functools.partial(
    GatedMLP,
    SIZE,
    MLP_SIZE,
    axis="vision_embed",
    use_bias=True,
    rngs=nnx.Rngs(0),
    **MAKE,
  )
  theirs = fill(qwen2_5.Qwen2_5_VLVisionBlock(config))
  return make_block("qwen2_5_vl", theirs, make_mlp)


def make_qwen3_block():
  make_mlp = functools.partial(
    MLP,
    SIZE,
    MLP_SIZE,
    SIZE,
    act=jax.nn.gelu,
    axes=("vision_embed", "vision_embed"),
    rngs=nnx.Rngs(0),
    **MAKE,
  )
  theirs = fill(qwen3.Qwen3VLVisionBlock(QWEN3))
  return make_block("qwen3_vl", theirs, make_mlp)


@pytest.fixture(scope="module", params=[make_qwen2_5_block, make_qwen3_block])
def block(request):
  return request.param()


def turn(angles):
  return rope.turns(angles[None], jnp.float32)


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
  look = seeing(jnp.asarray(segments[None]))
  assert_close(ours(x[None], turn(angles), look)[0], expected)


def test_vision_rope_stays_float32_in_a_bfloat16_tower(block, x):
  ours, theirs = block
  rows, cols = np.random.default_rng(1).integers(900, 1000, (2, 24))
  angles = rope.vision_angles(rows, cols, head_dim=12, theta=1e4)
  both = torch.tensor(np.concatenate([angles, angles], axis=-1))
  expected = deepcopy(theirs).to(torch.bfloat16)(
    torch.tensor(x).to(torch.bfloat16),
    cu_seqlens=torch.tensor([0, 24], dtype=torch.int32),
    position_embeddings=(both.cos(), both.sin()),
  )
  low = jnp.asarray(x[None], jnp.bfloat16)
  look = seeing(jnp.zeros((1, 24), jnp.int32))
  got = ours(low, turn(angles), look)[0]
  assert got.dtype == jnp.bfloat16
  expected = expected.detach().float().numpy()
  error = np.linalg.norm(got.astype(jnp.float32) - expected)
  assert error < 3e-2 * np.linalg.norm(expected)
