"""What attention does with one block of scores, in whichever kernel."""

import jax
import jax.numpy as jnp

NEVER = -1e30  # finite: a query that sees nothing must not turn into NaN


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Of two matrices over an axis of each, summed in float32."""
  # Products of bfloat16 are exact whatever precision float32 is to have.
  exact = a.dtype == jnp.bfloat16
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.DEFAULT if exact else None,
    preferred_element_type=jnp.float32,
  )


def weigh(
  top: jax.Array,
  total: jax.Array,
  scores: jax.Array,
  seen: jax.Array,
  *,
  axis: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """One more block of keys under the softmax (Milakov and Gimelshein 2018).

  Args:
    top: of each query the highest score so far; 1 along `axis`.
    total: the sum of its weights relative to that.
    scores: of a block.
    seen: which of them count.
    axis: of the keys.

  Returns:
    the new top and total, the block's weights, and the factor that what was
    summed by the old top now has.
  """
  scores = jnp.where(seen, scores, NEVER)
  higher = jnp.maximum(top, scores.max(axis, keepdims=True))
  weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
  shrink = jnp.exp(top - higher)
  total = total * shrink + weights.sum(axis, keepdims=True)
  return higher, total, weights, shrink


def settle(top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The divisor of summed values, and the normaliser that `slope` is given.

  exp(scores - normaliser) are the weights; 0 of a query that sees nothing.
  """
  some = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
  return some, jnp.where(total > 0, top + jnp.log(some), -NEVER)


def slope(
  scores: jax.Array,
  asked: jax.Array,
  seen: jax.Array,
  normaliser: jax.Array,
  paid: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Weights of a block once more, and the gradient of its scores.

  Args:
    scores: of the block.
    asked: gradient of its weights.
    seen: which of them count.
    normaliser: of each query, as `settle` gave it; 1 along the keys.
    paid: of each query, output times its gradient, summed.
  """
  weights = jnp.where(seen, jnp.exp(scores - normaliser), 0.0)
  return weights, weights * (asked - paid)
