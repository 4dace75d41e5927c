"""Layers against torch, and stacks against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as reference

from jaxvlm.nn.layers import (
  MLP,
  Embed,
  GatedMLP,
  LayerNorm,
  Linear,
  RMSNorm,
  scan,
  stack,
)


def make_linear(in_shape, out_shape, *, use_bias=True, rngs=None):
  axes = (None,) * (len(in_shape) + len(out_shape))
  return Linear(
    in_shape,
    out_shape,
    axes=axes,
    use_bias=use_bias,
    std=1.0,
    dtype="float32",
    rngs=rngs or nnx.Rngs(0),
  )


def test_linear_contracts_its_input_axes():
  linear = make_linear((2, 3), (4, 5))
  linear.bias[...] = jnp.arange(20.0).reshape(4, 5)
  x = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
  kernel = np.asarray(linear.kernel[...]).reshape(6, 20)
  expected = x.reshape(7, 6) @ kernel + np.arange(20.0)
  np.testing.assert_allclose(
    linear(x), expected.reshape(7, 4, 5), rtol=1e-5, atol=1e-5
  )


def test_linear_computes_in_the_dtype_of_its_input():
  x = jnp.ones((1, 3), jnp.bfloat16)
  assert make_linear((3,), (4,))(x).dtype == jnp.bfloat16


def test_the_gradient_of_repeated_ids_adds_up_in_the_dtype_of_the_table():
  embed = Embed(
    2,
    1,
    axes=("vocab", "embed"),
    std=1.0,
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  ids = np.zeros(1000, int)
  definition, weights = nnx.split(embed)

  def loss(weights):
    return nnx.merge(definition, weights)(ids, jnp.bfloat16).sum(
      dtype=jnp.float32
    )

  gradient = jax.grad(loss)(weights)["embedding"][...]
  # bfloat16 counts 1 + 1 + ... only to 256.
  np.testing.assert_array_equal(gradient, [[1000.0], [0.0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_equals_transformers(dtype):
  theirs = reference.Qwen2_5_VLRMSNorm(64, eps=1e-5)
  with torch.no_grad():
    theirs.weight.copy_(torch.linspace(0.5, 2, 64))
  theirs = theirs.to(getattr(torch, dtype))
  ours = RMSNorm(64, eps=1e-5, dtype=dtype)
  ours.weight[...] = jnp.asarray(theirs.weight.detach().float().numpy(), dtype)
  x = 3 * np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
  expected = theirs(torch.tensor(x).to(getattr(torch, dtype)))
  got = ours(jnp.asarray(x, dtype)).astype(jnp.float32)
  atol = 1e-6 if dtype == "float32" else 0
  np.testing.assert_allclose(
    got, expected.detach().float().numpy(), rtol=1e-6, atol=atol
  )


def test_rms_norm_multiplies_by_its_weight_after_the_cast():
  x, weight = np.random.default_rng(0).normal(size=(2, 1, 64))
  x = jnp.asarray(x, jnp.bfloat16)
  norm = RMSNorm(64, eps=0.0, dtype="float32")
  norm.weight[...] = jnp.asarray(weight[0], jnp.float32)
  y = x.astype(jnp.float32)
  y /= jnp.sqrt(jnp.mean(y**2))
  after = y.astype(jnp.bfloat16) * jnp.asarray(weight, jnp.bfloat16)
  before = (y * jnp.asarray(weight, jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(norm(x), after)
  assert not jnp.array_equal(after, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_equals_torch(dtype):
  theirs = torch.nn.LayerNorm(64, eps=1e-5)
  with torch.no_grad():
    theirs.weight.copy_(torch.linspace(0.5, 2, 64))
    theirs.bias.copy_(torch.linspace(-1, 1, 64))
  theirs = theirs.to(getattr(torch, dtype))
  ours = LayerNorm(64, eps=1e-5, dtype=dtype)
  for name in ("weight", "bias"):
    value = getattr(theirs, name).detach().float().numpy()
    getattr(ours, name)[...] = jnp.asarray(value, dtype)
  x = 3 * np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
  expected = theirs(torch.tensor(x).to(getattr(torch, dtype)))
  got = ours(jnp.asarray(x, dtype)).astype(jnp.float32)
  # One unit in the last place of bfloat16, where a sum falls between two.
  rtol, atol = (1e-6, 2e-6) if dtype == "float32" else (2**-7, 1e-5)
  np.testing.assert_allclose(
    got, expected.detach().float().numpy(), rtol=rtol, atol=atol
  )


def test_layer_norm_keeps_its_digits_beside_a_large_offset():
  x = 1000 + np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
  exact = x.astype(np.float64)
  exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-6)
  got = LayerNorm(64, eps=1e-6, dtype="float32")(jnp.asarray(x))
  np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4)


def test_mlp_applies_its_own_activation_between_its_layers():
  mlp = MLP(
    4,
    6,
    3,
    act=jnp.sin,
    axes=("vision_embed", "embed"),
    std=1.0,
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  mlp.linear_fc1.bias[...] = jnp.arange(6.0)
  x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
  hidden = np.sin(x @ np.asarray(mlp.linear_fc1.kernel[...]) + np.arange(6.0))
  np.testing.assert_allclose(
    mlp(x), hidden @ mlp.linear_fc2.kernel[...], rtol=1e-5, atol=1e-5
  )


def test_gated_mlp_equals_its_formula():
  mlp = GatedMLP(
    4,
    6,
    axis="embed",
    use_bias=True,
    std=1.0,
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  gate = x @ mlp.gate_proj.kernel[...]
  hidden = gate / (1 + np.exp(-gate)) * (x @ mlp.up_proj.kernel[...])
  np.testing.assert_allclose(
    mlp(x), hidden @ mlp.down_proj.kernel[...], rtol=1e-5, atol=1e-5
  )


@pytest.fixture(scope="module")
def layers():
  make = lambda rngs: make_linear((3,), (3,), use_bias=False, rngs=rngs)
  return stack(make, 4, rngs=nnx.Rngs(0))


def test_a_stack_has_layers_of_its_own(layers):
  kernel = layers.kernel
  assert kernel.shape == (4, 3, 3)
  assert kernel.axes == ("layer", None, None)
  assert not jnp.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize("remat", ["none", "dots", "offload", "full"])
def test_scan_equals_a_loop_in_values_and_gradients(layers, remat):
  x = jnp.arange(6.0).reshape(2, 3) / 6
  scales = jnp.arange(1.0, 5.0)
  definition, weights = nnx.split(layers)

  def scanned(weights, x):
    y, outputs = scan(
      nnx.merge(definition, weights),
      lambda layer, x, scale: (jnp.tanh(layer(x)) * scale, x.sum()),
      x,
      scales,
      remat=remat,
    )
    return y.sum() + (outputs**2).sum()

  def looped(kernel, x):
    total = 0.0
    for i in range(4):
      total += x.sum() ** 2
      x = jnp.tanh(x @ kernel[i]) * scales[i]
    return x.sum() + total

  expected = jax.value_and_grad(looped)(layers.kernel[...], x)
  value, gradient = jax.value_and_grad(scanned)(weights, x)
  np.testing.assert_allclose(value, expected[0], rtol=1e-5)
  np.testing.assert_allclose(
    gradient["kernel"][...], expected[1], rtol=1e-4, atol=1e-5
  )
  program = str(jax.make_jaxpr(jax.grad(scanned))(weights, x))
  assert ("Host" in program) == (remat == "offload")
