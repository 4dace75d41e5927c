"""From the rewards of a group to the advantage of each completion."""

import numpy as np
from jaxtyping import Float

# Two weighted sums of the same rewards may differ by this much in float64.
_ROUNDING = 1e-9


def grpo(
  rewards: Float[np.ndarray, "Q G"], *, eps: float
) -> Float[np.ndarray, "Q G"]:
  """Group-normalised advantages: (r - mean) / (std + eps).

  The standard deviation is the sample's (ddof 1), as in DeepSeekMath
  (arXiv 2402.03300, eq. 3) and the trainers that followed it. All of it is
  float64 on the host: in float32 the mean of eight times 0.9 is not 0.9, and
  the division turns that rounding into a signal. A group of equal rewards
  gets exactly 0.

  Args:
    rewards: one for each completion, any float.
    eps: added to the standard deviation.

  Returns:
    float32 advantages.

  Raises:
    ValueError: groups of fewer than two, or a reward that is not finite.
  """
  if rewards.shape[1] < 2:
    raise ValueError(
      f"advantages: groups of {rewards.shape[1]}; a group is compared with "
      "itself and needs num_completions of at least 2."
    )
  exact = rewards.astype(np.float64)
  if not np.isfinite(exact).all():
    raise ValueError("advantages: a reward is not finite.")
  mean = exact.mean(axis=1, keepdims=True)
  std = exact.std(axis=1, ddof=1, keepdims=True)
  equal = np.ptp(exact, axis=1, keepdims=True) <= _ROUNDING
  scale = np.where(equal, 1.0, std + eps)
  return np.where(equal, 0.0, (exact - mean) / scale).astype(np.float32)
