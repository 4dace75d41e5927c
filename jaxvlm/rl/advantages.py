"""From the rewards of groups to the advantage of each completion.

All of it is float64 on the host: in float32 the mean of eight times 0.9 is not
0.9, and a division by the group's deviation turns that rounding into a signal.
In every float, a group of equal rewards gets exactly 0.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

Rewards = Float[np.ndarray, "Q G"]
Advantages = Float[np.ndarray, "Q G"]  # float32

# Two weighted sums of the same rewards may differ by this much in float64.
_ROUNDING = 1e-9


def grpo(rewards: Rewards, *, eps: float) -> Advantages:
  """Group-normalised advantages: (r - mean) / (std + eps).

  The standard deviation is the sample's (ddof 1), as in DeepSeekMath
  (arXiv 2402.03300, eq. 3) and the trainers that followed it.

  Args:
    rewards: one for each completion, any float.
    eps: added to the standard deviation.

  Raises:
    ValueError: groups of fewer than two, or a reward that is not finite. So
      do all functions of this file.
  """
  return _normalised(rewards, eps).astype(np.float32)


def dr_grpo(rewards: Rewards) -> Advantages:
  """r - mean: a hard or easy question weighs no more than its spread.

  Liu et al. 2025 (arXiv 2503.20783), who leave the division out.
  """
  return _centred(rewards).astype(np.float32)


def rloo(rewards: Rewards) -> Advantages:
  """r minus the mean of the group's others (Ahmadian et al., 2402.14740)."""
  size = rewards.shape[1]
  return (_centred(rewards) * (size / max(size - 1, 1))).astype(np.float32)


def batch_std(rewards: Rewards, *, eps: float) -> Advantages:
  """(r - mean of the group) / (std of the whole batch + eps).

  TRL's scale_rewards="batch" (Liu et al. 2025, arXiv 2508.08221).

  Args:
    rewards: of every host.
    eps: added to the standard deviation.
  """
  centred = _centred(rewards)
  scale = rewards.astype(np.float64).std(ddof=1) if rewards.size > 1 else 0.0
  return _divided(centred, scale + eps).astype(np.float32)


def gdpo(
  parts: Float[np.ndarray, "R Q G"],
  weights: Float[np.ndarray, "R Q"],
  *,
  eps: float,
) -> Advantages:
  """Each reward normalised within its group, then summed with its weight.

  GDPO (Liu et al. 2026, arXiv 2601.05242): a reward that varies little is not
  drowned by one that varies much. As there, the sums are divided by their
  standard deviation over the batch; their mean is 0 as it is.

  Args:
    parts: each reward of every host; NaN: it does not apply to the row.
    weights: of each reward for each row.
    eps: added to the standard deviations.
  """
  total = np.zeros(parts.shape[1:])
  for part, weight in zip(parts, weights, strict=True):
    applies = ~np.isnan(part).all(axis=1)
    if applies.any():
      normalised = _normalised(part[applies], eps)
      total[applies] += weight[applies, None] * normalised
  scale = total.std(ddof=1) if total.size > 1 else 0.0
  return _divided(total, scale + eps).astype(np.float32)


ESTIMATORS: dict[str, Callable[..., Advantages]] = {
  "grpo": grpo,
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "batch_std": batch_std,
  "gdpo": gdpo,
}


def live(
  advantages: Float[np.ndarray, "Q G"],
) -> Bool[np.ndarray, " Q"]:
  """Whether a group teaches anything: its advantages are not all 0."""
  return np.any(advantages != 0, axis=1)


def _centred(rewards: Rewards) -> Float[np.ndarray, "Q G"]:
  """r - mean, in float64; exactly 0 where a group's rewards are equal."""
  if rewards.shape[1] < 2:
    raise ValueError(
      f"advantages: groups of {rewards.shape[1]}; a group is compared with "
      "itself and needs num_completions of at least 2."
    )
  exact = rewards.astype(np.float64)
  if not np.isfinite(exact).all():
    raise ValueError("advantages: a reward is not finite.")
  equal = np.ptp(exact, axis=1, keepdims=True) <= _ROUNDING
  return np.where(equal, 0.0, exact - exact.mean(axis=1, keepdims=True))


def _normalised(rewards: Rewards, eps: float) -> Float[np.ndarray, "Q G"]:
  centred = _centred(rewards)
  std = rewards.astype(np.float64).std(axis=1, ddof=1, keepdims=True)
  return _divided(centred, std + eps)


def _divided(
  centred: Float[np.ndarray, "Q G"], scale: np.ndarray | float
) -> Float[np.ndarray, "Q G"]:
  """centred / scale, and 0 wherever centred is, whatever scale is."""
  return centred / np.where(centred == 0, 1.0, scale)
