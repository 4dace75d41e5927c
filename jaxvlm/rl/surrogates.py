"""What a completion's advantage asks of its tokens: each loss takes [Q G C].

Every surrogate here is a function of

  logprobs       of the policy
  old_logprobs   of the policy that the update starts from; no gradient goes
                 there, so a rollout's only update may hand in `logprobs`
  advantages     of each completion
  mask           True where a token counts; other entries may be anything, NaN too

and of its own bounds, and returns the loss of each token, 0 where masked, and
figures of each token by name (no gradient there), to be averaged over mask.
r is exp(logprob - old_logprob).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Tokens = Float[Array, "Q G C"]
Figures = dict[str, Float[Array, "Q G C"]]

# Bounds log ratios before exp; 20 is far beyond any clip and exp(20) finite.
_LOG_RATIO_LIMIT = 20.0
# verl's bound on a sequence's mean log ratio (GSPO).
_SEQUENCE_LIMIT = 10.0


def clip(
  logprobs: Tokens,
  old_logprobs: Tokens,
  advantages: Float[Array, "Q G"],
  mask: Bool[Array, "Q G C"],
  *,
  clip_low: float,
  clip_high: float,
  clip_dual: float | None,
) -> tuple[Tokens, Figures]:
  """PPO's clipped surrogate, with a second bound for bad completions.

  max(-A r, -A clip(r, 1 - low, 1 + high)), and where A < 0 at most -A dual
  (Ye et al., arXiv 1912.09729), which keeps one token with a huge ratio from
  ruling an update.

  The figures are the shares of tokens at each bound: clip_low (A < 0),
  clip_high (A > 0) and clip_dual; clip_dual None: no such bound.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  ratio = _exp(log_ratio)
  advantage = jnp.broadcast_to(advantages[..., None], ratio.shape)
  loss, figures = _clipped(ratio, advantage, clip_low, clip_high)
  if clip_dual is not None:
    over = (advantage < 0) & (ratio > clip_dual)
    loss = jnp.where(over, -advantage * clip_dual, loss)
    figures["clip_dual"] = over
  return _finish(loss, figures, log_ratio, mask)


def gspo(
  logprobs: Tokens,
  old_logprobs: Tokens,
  advantages: Float[Array, "Q G"],
  mask: Bool[Array, "Q G C"],
  *,
  clip_low: float,
  clip_high: float,
) -> tuple[Tokens, Figures]:
  """GSPO (Zheng et al., arXiv 2507.18071): one ratio for a completion.

  The ratio is exp(mean over tokens of logprob - old_logprob), clipped as in
  `clip`; each token carries its completion's loss, so that the paper's loss
  is the mean over sequences.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  mean = _sequence_mean(log_ratio, mask)
  return _sequence_clipped(
    mean, log_ratio, advantages, mask, clip_low, clip_high
  )


def gspo_token(
  logprobs: Tokens,
  old_logprobs: Tokens,
  advantages: Float[Array, "Q G"],
  mask: Bool[Array, "Q G C"],
  *,
  clip_low: float,
  clip_high: float,
) -> tuple[Tokens, Figures]:
  """GSPO's token form: the completion's ratio, the token's own gradient.

  The log ratio is stop_gradient(mean) + logprob - stop_gradient(logprob).
  With one advantage for a completion, and the mean over sequences, loss and
  gradient are those of `gspo`.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  mean = jax.lax.stop_gradient(_sequence_mean(log_ratio, mask))
  own = log_ratio - jax.lax.stop_gradient(log_ratio)
  return _sequence_clipped(
    mean + own, log_ratio, advantages, mask, clip_low, clip_high
  )


def cispo(
  logprobs: Tokens,
  old_logprobs: Tokens,
  advantages: Float[Array, "Q G"],
  mask: Bool[Array, "Q G C"],
  *,
  weight_low: float,
  weight_high: float,
) -> tuple[Tokens, Figures]:
  """CISPO (MiniMax-M1, arXiv 2506.13585): -A logprob, weighted by the ratio.

  The weight stop_gradient(clip(r, weight_low, weight_high)) bounds how much a
  token counts, but every token keeps a gradient. The bounds are absolute:
  MiniMax's and TRL's are (0, 5); EasyR1 and verl write theirs as offsets from
  1, and EasyR1's recipe (offsets 0 and 4) is (1, 5) here, so it never weighs a
  token less than 1.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  ratio = _exp(log_ratio)
  weight = jax.lax.stop_gradient(jnp.clip(ratio, weight_low, weight_high))
  loss = -weight * advantages[..., None] * jnp.where(mask, logprobs, 0.0)
  figures = {"clip_low": ratio < weight_low, "clip_high": ratio > weight_high}
  return _finish(loss, figures, log_ratio, mask)


def sapo(
  logprobs: Tokens,
  old_logprobs: Tokens,
  advantages: Float[Array, "Q G"],
  mask: Bool[Array, "Q G C"],
  *,
  tau_positive: float,
  tau_negative: float,
) -> tuple[Tokens, Figures]:
  """SAPO (Gao et al., arXiv 2511.20347): a soft gate in place of the clip.

  -A (4 / tau) sigmoid(tau (r - 1)): slope 1 at r = 1, fading on both sides,
  the faster the larger tau, which is tau_positive where A > 0.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  advantage = advantages[..., None]
  tau = jnp.where(advantage > 0, tau_positive, tau_negative)
  gate = jax.nn.sigmoid(tau * (_exp(log_ratio) - 1)) * 4 / tau
  return _finish(-advantage * gate, {}, log_ratio, mask)


SURROGATES: dict[str, Callable[..., tuple[Tokens, Figures]]] = {
  "clip": clip,
  "gspo": gspo,
  "gspo_token": gspo_token,
  "cispo": cispo,
  "sapo": sapo,
}


def importance_weights(
  logprobs: Tokens,
  sampler_logprobs: Tokens,
  mask: Bool[Array, "Q G C"],
  *,
  mode: str,
  cap: float,
) -> tuple[Tokens, Figures]:
  """Weights for what the sampler drew with other probabilities.

  They multiply the surrogate (not the KL term, not the entropy) by
  w = exp(logprob - sampler_logprob), of a token or summed over a completion
  ("token", "sequence"), with w above `cap` put to the cap or to 0
  ("truncate", "mask"): truncated importance sampling (Yao et al. 2025) and
  TRL's correction. A sequence's weight grows with its length.

  Args:
    logprobs: of the policy that was sampled from, by the learner.
    sampler_logprobs: of the same tokens, by the sampler.
    mask: True where a token counts.
    mode: token_truncate, token_mask, sequence_truncate or sequence_mask.
    cap: the largest weight.

  Returns:
    Weights without gradient, and the share of capped tokens
    (importance_capped).
  """
  gap = jax.lax.stop_gradient(_log_ratio(logprobs, sampler_logprobs, mask))
  level, _, action = mode.partition("_")
  if level == "sequence":
    gap = jnp.broadcast_to(gap.sum(-1, keepdims=True), gap.shape)
  weights = _exp(gap)
  over = weights > cap
  capped = jnp.where(over, cap if action == "truncate" else 0.0, weights)
  return capped, {"importance_capped": over.astype(jnp.float32)}


IMPORTANCE = (
  "token_truncate",
  "token_mask",
  "sequence_truncate",
  "sequence_mask",
)


def _log_ratio(
  logprobs: Tokens, old_logprobs: Tokens, mask: Bool[Array, "Q G C"]
) -> Tokens:
  # Masked before exp, not after: the gradient of where(m, exp(x), 0) is NaN
  # where x is infinite.
  old_logprobs = jax.lax.stop_gradient(old_logprobs)
  return jnp.where(mask, logprobs, 0.0) - jnp.where(mask, old_logprobs, 0.0)


def _exp(log_ratio: Tokens) -> Tokens:
  return jnp.exp(jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT))


def _sequence_mean(values: Tokens, mask: Bool[Array, "Q G C"]) -> Tokens:
  """The mean over a completion's tokens, at each of them."""
  length = jnp.sum(mask, -1, keepdims=True, dtype=jnp.float32)
  mean = jnp.sum(values, -1, keepdims=True) / jnp.maximum(length, 1.0)
  return jnp.broadcast_to(mean, values.shape)


def _sequence_clipped(
  sequence: Tokens,
  log_ratio: Tokens,
  advantages: Float[Array, "Q G"],
  mask: Bool[Array, "Q G C"],
  clip_low: float,
  clip_high: float,
) -> tuple[Tokens, Figures]:
  ratio = _exp(jnp.minimum(sequence, _SEQUENCE_LIMIT))
  advantage = jnp.broadcast_to(advantages[..., None], ratio.shape)
  loss, figures = _clipped(ratio, advantage, clip_low, clip_high)
  return _finish(loss, figures, log_ratio, mask)


def _clipped(
  ratio: Tokens, advantage: Tokens, clip_low: float, clip_high: float
) -> tuple[Tokens, Figures]:
  bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  figures = {
    "clip_low": (advantage < 0) & (ratio < 1 - clip_low),
    "clip_high": (advantage > 0) & (ratio > 1 + clip_high),
  }
  return jnp.maximum(-advantage * ratio, -advantage * bounded), figures


def _finish(
  loss: Tokens,
  figures: dict[str, Array],
  log_ratio: Tokens,
  mask: Bool[Array, "Q G C"],
) -> tuple[Tokens, Figures]:
  """Masks the loss; approx_kl, the mean of old - new, joins the figures."""
  figures = figures | {"approx_kl": -log_ratio}
  return jnp.where(mask, loss, 0.0), {
    name: jax.lax.stop_gradient(value.astype(jnp.float32))
    for name, value in figures.items()
  }
