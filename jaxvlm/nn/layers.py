"""The layers that every model is made of, and stacks of them.

A layer computes in the dtype of what it is given: weights stay in the dtype
they are kept in and are cast where they are used. Each weight carries, as
metadata, the names of its logical axes, which `jaxvlm.sharding` maps to a
mesh, and the shape that its tensor has in Hugging Face's files.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")

HOST_MEMORY = "pinned_host"  # jax's name of the memory that devices read too
KEPT = "kept"  # name (checkpoint_name) of what is too dear to compute again


def param(
  value: jax.Array,
  *,
  axes: tuple[str | None, ...],
  hf_shape: tuple[int, ...],
) -> nnx.Param:
  """A weight that knows the names of its axes and its shape in HF's files."""
  assert value.ndim == len(axes), (value.shape, axes)
  return nnx.Param(value, axes=axes, hf_shape=hf_shape)


def normal(
  shape: tuple[int, ...], *, std: float, dtype: Any, rngs: nnx.Rngs
) -> jax.Array:
  """How transformers draws every Linear, Conv and Embedding."""
  return std * jax.random.normal(rngs.params(), shape, dtype)


class Linear(nnx.Module):
  """Contracts the trailing axes of its input: x @ kernel + bias.

  Sizes may be tuples: attention maps D -> (N, H) and (N, H) -> D without
  reshapes, so that heads keep an axis of their own to be sharded by.
  """

  def __init__(
    self,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    *,
    axes: tuple[str | None, ...],
    use_bias: bool,
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
    hf_shape: tuple[int, ...] | None = None,  # None: [out, in]
  ):
    self.in_axes, self.out_shape = len(in_shape), out_shape
    shape, outputs = (*in_shape, *out_shape), math.prod(out_shape)
    self.kernel = param(
      normal(shape, std=std, dtype=dtype, rngs=rngs),
      axes=axes,
      hf_shape=hf_shape or (outputs, math.prod(in_shape)),
    )
    self.bias = nnx.data(None)
    if use_bias:
      self.bias = param(
        jnp.zeros(out_shape, dtype),
        axes=axes[len(in_shape) :],
        hf_shape=(outputs,),
      )

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    lead = x.shape[: x.ndim - self.in_axes]
    # Of two axes alone: XLA turns products over more around in memory, which
    # costs the backward pass half its time on a CPU.
    kernel = self.kernel.astype(x.dtype).reshape(-1, math.prod(self.out_shape))
    y = x.reshape(-1, kernel.shape[0]) @ kernel
    y = y.reshape(*lead, *self.out_shape)
    if self.bias is not None:
      y += jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)
    return y


class Embed(nnx.Module):
  """A table of vectors. The caller names the dtype: ids have none to follow."""

  def __init__(
    self,
    count: int,
    size: int,
    *,
    axes: tuple[str, str],
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    shape = (count, size)
    self.embedding = param(
      normal(shape, std=std, dtype=dtype, rngs=rngs),
      axes=axes,
      hf_shape=shape,
    )

  def __call__(self, ids: Int[Array, "*B"], dtype: Any) -> Float[Array, "*B D"]:
    # Cast after the gather: the gradient then adds up in the table's dtype.
    return self.embedding[...][ids].astype(dtype)


class RMSNorm(nnx.Module):
  """HF's Qwen2RMSNorm: float32 inside, cast back, THEN times the weight."""

  def __init__(self, size: int, *, eps: float, dtype: Any):
    self.eps = eps
    self.weight = param(jnp.ones(size, dtype), axes=("norm",), hf_shape=(size,))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    weight = self.weight.astype(x.dtype)
    return y.astype(x.dtype) * jnp.broadcast_to(weight, x.shape)


class LayerNorm(nnx.Module):
  """torch's LayerNorm: all of it in float32, then cast back."""

  def __init__(self, size: int, *, eps: float, dtype: Any):
    self.eps = eps
    self.weight = param(jnp.ones(size, dtype), axes=("norm",), hf_shape=(size,))
    self.bias = param(jnp.zeros(size, dtype), axes=("norm",), hf_shape=(size,))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    y = x.astype(jnp.float32)
    # Two passes: E[y^2] - E[y]^2 loses digits of a stream with an offset.
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    weight, bias = (
      jnp.broadcast_to(p.astype(jnp.float32), x.shape)
      for p in (self.weight, self.bias)
    )
    return (y * weight + bias).astype(x.dtype)


class MLP(nnx.Module):
  """fc2(act(fc1(x))): the two layers of HF's Qwen3VLVisionMLP and mergers."""

  def __init__(
    self,
    size: int,
    mlp_size: int,
    out_size: int,
    *,
    act: Callable[[jax.Array], jax.Array],
    axes: tuple[str, str],  # of its input and its output
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.act = act
    linear = functools.partial(
      Linear, use_bias=True, std=std, dtype=dtype, rngs=rngs
    )
    self.linear_fc1 = linear((size,), (mlp_size,), axes=(axes[0], "vision_mlp"))
    self.linear_fc2 = linear(
      (mlp_size,), (out_size,), axes=("vision_mlp", axes[1])
    )

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    return self.linear_fc2(self.act(self.linear_fc1(x)))


class GatedMLP(nnx.Module):
  """down(silu(gate(x)) * up(x)): HF's Qwen2MLP and Qwen2_5_VLMLP."""

  def __init__(
    self,
    size: int,
    mlp_size: int,
    *,
    axis: str,
    use_bias: bool,
    std: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(
      Linear, use_bias=use_bias, std=std, dtype=dtype, rngs=rngs
    )
    mlp = "vision_mlp" if axis == "vision_embed" else "mlp"
    self.gate_proj = linear((size,), (mlp_size,), axes=(axis, mlp))
    self.up_proj = linear((size,), (mlp_size,), axes=(axis, mlp))
    self.down_proj = linear((mlp_size,), (size,), axes=(mlp, axis))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def stack(make: Callable[..., M], count: int, *, rngs: nnx.Rngs) -> M:
  """One module whose weights are those of `count` layers, layer axis first."""
  layers = nnx.vmap(lambda rngs: make(rngs=rngs))(rngs.split(count))
  definition, weights = nnx.split(layers)
  return nnx.merge(
    definition,
    jax.tree.map(
      lambda weight: weight.replace(axes=("layer", *weight.axes)),
      weights,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    ),
  )


def scan(
  layers: M,
  call: Callable[[M, T, Any], tuple[T, Any]],
  x: T,
  inputs: Any = None,
  *,
  remat: str,
) -> tuple[T, Any]:
  """Runs x through stacked layers, compiled once whatever their number.

  Args:
    layers: what `stack` made.
    call: (layer, x, its slice of inputs) -> (x, output).
    x: the stream, a pytree.
    inputs: pytree of arrays with a leading layer axis.
    remat: "none" keeps what the backward pass needs; "dots" only products
      with weights, x between layers and what is named KEPT, "offload" the same
      with the products in the host's memory, "full" only x; they compute the
      rest again.

  Returns:
    x after the last layer, and the outputs stacked over layers.
  """
  definition, weights = nnx.split(layers)

  def body(x: T, layer: tuple[Any, Any]) -> tuple[T, Any]:
    weights, inputs = layer
    return call(nnx.merge(definition, weights), x, inputs)

  if remat != "none":
    body = jax.checkpoint(body, prevent_cse=False, policy=_policy(remat))
  return jax.lax.scan(body, x, (weights, inputs))


def _policy(remat: str) -> Callable[..., Any]:
  policies = jax.checkpoint_policies
  if remat == "full":
    return policies.nothing_saveable
  named = policies.save_only_these_names(KEPT)
  products = policies.dots_with_no_batch_dims_saveable
  if remat == "offload":
    products = policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY)
  # jax's own "either" takes no policy that offloads.
  return lambda *args, **params: (
    named(*args, **params) or products(*args, **params)
  )
