"""Attention against torch, and a group's against each row's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as reference

from jaxvlm.nn import kv_cache, rope
from jaxvlm.nn.attention import Attention, attend_group
from jaxvlm.nn.block_attention import attend, of_trees
from jaxvlm.nn.kv_cache import KVCache

B, T, N, K, H = 2, 6, 4, 2, 8


@pytest.fixture
def draw():
  random = np.random.default_rng(0)
  return lambda *shape: random.normal(size=shape).astype(np.float32)


def attend_causally():
  visibility = of_trees(*2 * [jnp.zeros((B, T), jnp.int32)])
  return functools.partial(attend, visibility=visibility)


columns = st.lists(st.booleans(), min_size=7, max_size=7)


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.integers(1, 9), min_size=2, max_size=2),
  st.lists(columns.filter(any), min_size=2, max_size=2),
  st.sampled_from([(1, 4, 1), (3, 4, 2), (4, 2, 2)]),
  st.integers(0, 2**32 - 1),
)
def test_a_group_reads_its_prompt_once_and_sees_what_full_attention_does(
  lengths, written, sizes, seed
):
  """Whatever part of the prompt and of the ring of columns is filled."""
  random = np.random.default_rng(seed)
  (group, N, K), prompt, ring = sizes, 9, 7

  def some(*shape):
    return random.normal(size=shape).astype(np.float32)

  query = some(2, group, N, H)
  shared = KVCache(keys=some(2, K, prompt, H), values=some(2, K, prompt, H))
  size = (2, K, group, ring, H)
  own = KVCache(keys=some(*size), values=some(*size))
  mask, written = (
    np.arange(prompt) < np.array(lengths)[:, None],
    np.array(written),
  )
  found = jax.jit(attend_group)(query, shared, mask, own, written)

  def joined(prompts, completions):
    each = np.broadcast_to(prompts[:, :, None], (2, K, group, prompt, H))
    both = np.concatenate([each, completions], axis=3).swapaxes(1, 2)
    return torch.tensor(both.reshape(-1, *both.shape[2:]))

  seen = np.concatenate([mask, written], axis=1).repeat(group, 0)
  expected = torch.nn.functional.scaled_dot_product_attention(
    torch.tensor(query.reshape(-1, 1, N, H)).transpose(1, 2),
    joined(shared.keys, own.keys),
    joined(shared.values, own.values),
    attn_mask=torch.tensor(seen)[:, None, None],
    enable_gqa=True,
  )
  np.testing.assert_allclose(
    found, expected.numpy().reshape(query.shape), rtol=0, atol=1e-5
  )


@pytest.mark.parametrize("qk_norm_eps", [None, 1e-6])
def test_decoding_column_by_column_equals_one_pass(draw, qk_norm_eps):
  attention = Attention(
    16,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    qkv_bias=True,
    qk_norm_eps=qk_norm_eps,
    std=0.3,
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  x = draw(B, T, 16)
  turns = rope.turns(draw(B, T, H // 2), jnp.float32)
  causal = attend_causally()
  expected, cache = attention(x, turns, causal)
  start = 2
  prompt = jax.tree.map(lambda x: x[:, :, :start], cache)
  own = kv_cache.empty((B, K, 1, T - start, H), "float32")
  decode = jax.jit(lambda *args: attention.decode(*args))
  for column in range(T - start):
    here = slice(start + column, start + column + 1)
    got, own = decode(
      x[:, here],
      rope.Turns(cos=turns.cos[:, here], sin=turns.sin[:, here]),
      prompt,
      np.ones((B, start), bool),
      own,
      np.tile(np.arange(T - start) <= column, (B, 1)),
      column,
    )
    np.testing.assert_allclose(got, expected[:, here], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def normed():
  """Attention with q_norm and k_norm, ours and theirs."""
  config = Qwen3VLTextConfig(
    hidden_size=16,
    num_attention_heads=N,
    num_key_value_heads=K,
    head_dim=H,
    rms_norm_eps=1e-3,
    attn_implementation="sdpa",
  )
  torch.manual_seed(0)
  theirs = reference.Qwen3VLTextAttention(config, 0)
  with torch.no_grad():
    for weight in theirs.parameters():
      weight.add_(0.3 * torch.randn_like(weight))
  ours = Attention(
    16,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    qkv_bias=False,
    qk_norm_eps=1e-3,
    std=0.3,
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    kernel = getattr(ours, name).kernel
    weight = getattr(theirs, name).weight.detach().numpy().T
    kernel[...] = jnp.asarray(weight.reshape(kernel.shape))
  for name in ("q_norm", "k_norm"):
    weight = getattr(theirs, name).weight.detach().numpy()
    getattr(ours, name).weight[...] = jnp.asarray(weight)
  return ours, theirs


def both_of(normed, draw):
  ours, theirs = normed
  x, angles = draw(B, T, 16), draw(B, T, H // 2)
  twice = torch.tensor(np.concatenate([angles, angles], axis=-1))
  mask = np.tril(np.ones((1, T, T), bool)).repeat(B, 0)
  expected, _ = theirs(
    torch.tensor(x),
    position_embeddings=(twice.cos(), twice.sin()),
    attention_mask=torch.tensor(mask)[:, None],
  )
  causal = attend_causally()
  got, _ = ours(x, rope.turns(angles, jnp.float32), causal)
  return np.asarray(got), expected.detach().numpy()


def test_attention_with_normalized_heads_equals_transformers(normed, draw):
  got, expected = both_of(normed, draw)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_attention_is_off_without(name, normed, draw, monkeypatch):
  monkeypatch.setattr(normed[0], name, lambda x: x)
  got, expected = both_of(normed, draw)
  assert np.abs(got - expected).max() > 1e-2
