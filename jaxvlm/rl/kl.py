"""Schulman's estimates of KL(policy | reference) from one token each.

With d = ref_logprob - logprob: k1 = -d, k2 = d ** 2 / 2, k3 = exp(d) - d - 1
(joschu.net/blog/kl-approx.html). In a loss, the gradient of k2 is that of the
reverse KL in expectation, that of k3 the forward's, and that of k1 vanishes;
k1 belongs into the reward.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ESTIMATORS = {
  "k1": lambda d: -d,
  "k2": lambda d: 0.5 * d * d,
  # expm1 keeps its digits near d = 0, where a policy starts.
  "k3": lambda d: jnp.expm1(d) - d,
}


def estimate(
  logprobs: Float[Array, "Q G C"],
  ref_logprobs: Float[Array, "Q G C"],
  mask: Bool[Array, "Q G C"],
  *,
  estimator: str,
  limit: float,
) -> tuple[Float[Array, "Q G C"], dict[str, Float[Array, "Q G C"]]]:
  """The estimate of each token.

  d is clamped to [-limit, limit] before exp, which otherwise overflows. Beyond
  the limit a token has no gradient, that is, no pull back: the share of such
  tokens is a metric to watch. (EasyR1 clamps d to 20 and then the value of k3
  to 10, which cuts the pull from d = 2.6 on.)

  Args:
    logprobs: of the policy.
    ref_logprobs: of the reference; no gradient goes there.
    mask: True where a token counts; other entries may be anything, NaN too.
    estimator: k1, k2 or k3.
    limit: largest |d|.

  Returns:
    The estimates, 0 where masked, and figures of each token without gradient:
    kl and kl_clamped.
  """
  ref_logprobs = jax.lax.stop_gradient(ref_logprobs)
  gap = jnp.where(mask, ref_logprobs, 0.0) - jnp.where(mask, logprobs, 0.0)
  bounded = jnp.clip(gap, -limit, limit)
  values = jnp.where(mask, ESTIMATORS[estimator](bounded), 0.0)
  return values, {
    "kl": jax.lax.stop_gradient(values),
    "kl_clamped": (jnp.abs(gap) > limit).astype(jnp.float32),
  }
