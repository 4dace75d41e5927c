"""Losses of one token, and their sums; each takes and gives [Q, G, C].

Means are not made here: a sum and its count travel, so that the mean over an
update does not depend on how it was split into microbatches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pair = tuple[Float[Array, ""], Float[Array, ""]]  # a sum and its count

# Bounds log ratios before exp; 20 is far beyond any clip and exp(20) finite.
_LOG_RATIO_LIMIT = 20.0


def clipped_surrogate(
  logprobs: Float[Array, "Q G C"],
  old_logprobs: Float[Array, "Q G C"],
  advantages: Float[Array, "Q G"],
  mask: Bool[Array, "Q G C"],
  *,
  clip_low: float,
  clip_high: float,
  clip_dual: float | None,
) -> tuple[Float[Array, "Q G C"], dict[str, Pair]]:
  """PPO's clipped surrogate, with a second bound for bad completions.

  With r = exp(logprob - old): max(-A r, -A clip(r, 1 - low, 1 + high)), and
  where A < 0 at most -A dual (Ye et al., arXiv 1912.09729), which keeps one
  token with a huge ratio from ruling an update.

  Args:
    logprobs: of the policy.
    old_logprobs: of the policy that the update starts from; no gradient goes
      there, so a rollout's only update may hand in `logprobs` itself.
    advantages: of each completion.
    mask: True where a token counts; other entries may be anything, NaN too.
    clip_low: r below 1 - clip_low is clipped where A < 0.
    clip_high: r above 1 + clip_high is clipped where A > 0.
    clip_dual: bound on r where A < 0, above 1; None: no such bound.

  Returns:
    The loss of each token, 0 where masked, and shares of tokens by name:
    clip_low, clip_high and clip_dual (no gradient there), and approx_kl,
    the mean of old - new.
  """
  old_logprobs = jax.lax.stop_gradient(old_logprobs)
  # Masked before exp, not after: the gradient of where(m, exp(x), 0) is NaN
  # where x is infinite.
  log_ratio = jnp.where(mask, logprobs, 0.0) - jnp.where(
    mask, old_logprobs, 0.0
  )
  bounded = jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
  ratio = jnp.exp(bounded)
  advantage = jnp.broadcast_to(advantages[..., None], ratio.shape)
  plain = -advantage * ratio
  clipped = -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  loss = jnp.maximum(plain, clipped)
  over = jnp.zeros_like(mask)
  if clip_dual is not None:
    over = (advantage < 0) & (ratio > clip_dual)
    loss = jnp.where(over, -advantage * clip_dual, loss)
  stats = {
    "clip_low": _share((advantage < 0) & (ratio < 1 - clip_low), mask),
    "clip_high": _share((advantage > 0) & (ratio > 1 + clip_high), mask),
    "clip_dual": _share(over, mask),
    "approx_kl": _share(-log_ratio, mask),
  }
  return jnp.where(mask, loss, 0.0), stats


def k3(
  logprobs: Float[Array, "Q G C"],
  ref_logprobs: Float[Array, "Q G C"],
  mask: Bool[Array, "Q G C"],
  *,
  limit: float,
) -> tuple[Float[Array, "Q G C"], dict[str, Pair]]:
  """Schulman's estimate of KL(policy | reference): exp(d) - d - 1.

  d = ref_logprob - logprob is clamped to [-limit, limit] before exp, which
  otherwise overflows. Beyond the limit a token has no gradient, that is, no
  pull back: the share of such tokens is a metric to watch. (EasyR1 clamps d
  to 20 and then the value to 10, which cuts the pull from d = 2.6 on.)

  Args:
    logprobs: of the policy.
    ref_logprobs: of the reference; no gradient goes there.
    mask: True where a token counts; other entries may be anything, NaN too.
    limit: largest |d|.

  Returns:
    The estimate of each token, 0 where masked; its mean (kl) and the share
    of clamped tokens (kl_clamped).
  """
  ref_logprobs = jax.lax.stop_gradient(ref_logprobs)
  gap = jnp.where(mask, ref_logprobs, 0.0) - jnp.where(mask, logprobs, 0.0)
  bounded = jnp.clip(gap, -limit, limit)
  # expm1 keeps its digits near d = 0, where a policy starts.
  kl = jnp.where(mask, jnp.expm1(bounded) - bounded, 0.0)
  stats = {
    "kl": _share(kl, mask),
    "kl_clamped": _share(jnp.abs(gap) > limit, mask),
  }
  return kl, stats


def token_sum(
  values: Float[Array, "Q G C"], mask: Bool[Array, "Q G C"]
) -> Float[Array, ""]:
  """Sum over the tokens that count, in float32."""
  return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0))


def _share(values: Array, mask: Bool[Array, "Q G C"]) -> Pair:
  values = jax.lax.stop_gradient(values.astype(jnp.float32))
  return token_sum(values, mask), jnp.sum(mask, dtype=jnp.float32)
