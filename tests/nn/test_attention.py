"""Attention against torch, and a group's against each row's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as reference

from jaxvlm.nn import kv_cache
from jaxvlm.nn.attention import Attention, attend_group
from jaxvlm.nn.block_attention import of_trees
from jaxvlm.nn.kv_cache import KVCache

B, T, N, K, H = 2, 6, 4, 2, 8


@pytest.fixture
def draw():
  random = np.random.default_rng(0)
  return lambda *shape: random.normal(size=shape).astype(np.float32)


def dense(query, keys, values):
  """All queries see all keys, as torch does it."""
  return torch.nn.functional.scaled_dot_product_attention(
    *(torch.tensor(x).transpose(1, 2) for x in (query, keys, values)),
    enable_gqa=True,
  ).transpose(1, 2)


def test_a_group_attends_as_its_rows_would_alone(draw):
  Q, G, P, C, written = 2, 3, 5, 4, 3
  query = draw(Q, G, N, H)
  prompt = KVCache(keys=draw(Q, P, K, H), values=draw(Q, P, K, H))
  completion = KVCache(keys=draw(Q, G, C, K, H), values=draw(Q, G, C, K, H))
  prompt_mask = np.arange(P) < np.array([[5], [2]])
  got = attend_group(
    query,
    prompt,
    prompt_mask,
    completion,
    np.tile(np.arange(C) < written, (Q, 1)),
  )
  for q in range(Q):
    for g in range(G):
      p = int(prompt_mask[q].sum())
      keys, values = (
        np.concatenate([shared[q, :p], own[q, g, :written]])[None]
        for shared, own in (
          (prompt.keys, completion.keys),
          (prompt.values, completion.values),
        )
      )
      alone = dense(query[q, g][None, None], keys, values)
      np.testing.assert_allclose(got[q, g], alone[0, 0], rtol=0, atol=1e-6)


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
  angles = jnp.asarray(draw(B, T, H // 2))
  causal = of_trees(*2 * [jnp.zeros((B, T), jnp.int32)])
  expected, cache = attention(x, angles, causal)
  start = 2
  prompt = jax.tree.map(lambda x: x[:, :start], cache)
  own = kv_cache.empty((B, 1, T - start, K, H), "float32")
  decode = jax.jit(lambda *args: attention.decode(*args))
  for column in range(T - start):
    here = slice(start + column, start + column + 1)
    got, own = decode(
      x[:, here],
      angles[:, here],
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
  causal = of_trees(*2 * [jnp.zeros((B, T), jnp.int32)])
  got, _ = ours(x, jnp.asarray(angles), causal)
  return np.asarray(got), expected.detach().numpy()


def test_attention_with_normalized_heads_equals_transformers(normed, draw):
  got, expected = both_of(normed, draw)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_attention_is_off_without(name, normed, draw, monkeypatch):
  monkeypatch.setattr(normed[0], name, lambda x: x)
  got, expected = both_of(normed, draw)
  assert np.abs(got - expected).max() > 1e-2
