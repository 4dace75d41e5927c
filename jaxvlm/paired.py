"""Which differences stand out of the noise: paired tests over seeds."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.05  # two-sided
POWER = 0.8
_MOST_SEEDS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
  """An arm against another, seed by seed; in the unit of what is compared.

  NaN where one seed says nothing of the noise.
  """

  seeds: int
  mean: float
  sd: float  # of the differences, n - 1
  low: float  # 95 % confidence interval of the mean
  high: float
  p: float  # of no difference, Student's t
  needed: float  # seeds that would show `effect` at 80 % power; inf: too many


def compare(differences: Sequence[float], *, effect: float) -> Paired:
  """Tests whether differences of pairs have a mean other than 0.

  Args:
    differences: one a seed.
    effect: what size of the mean is asked for in `needed`.

  Raises:
    ValueError: there are none.
  """
  values = np.asarray(differences, np.float64)
  if not values.size:
    raise ValueError("paired: no seed that both arms have.")
  mean = float(values.mean())
  if values.size == 1:
    nan = math.nan
    return Paired(
      seeds=1, mean=mean, sd=nan, low=nan, high=nan, p=nan, needed=nan
    )
  sd = float(values.std(ddof=1))
  error = sd / math.sqrt(values.size)
  if error == 0.0:  # all pairs alike
    p = 1.0 if mean == 0.0 else 0.0
  else:
    p = float(2 * stats.t.sf(abs(mean) / error, values.size - 1))
  reach = float(stats.t.ppf(1 - LEVEL / 2, values.size - 1)) * error
  return Paired(
    seeds=values.size,
    mean=mean,
    sd=sd,
    low=mean - reach,
    high=mean + reach,
    p=p,
    needed=seeds_needed(sd, effect),
  )


def power(seeds: int, sd: float, effect: float) -> float:
  """Chance that the paired t-test over so many seeds finds the effect."""
  if sd == 0.0:
    return 1.0
  edge = stats.t.ppf(1 - LEVEL / 2, seeds - 1)
  shift = effect * math.sqrt(seeds) / sd
  above = stats.nct.sf(edge, seeds - 1, shift)
  below = stats.nct.cdf(-edge, seeds - 1, shift)
  return float(above + below)


def seeds_needed(sd: float, effect: float) -> float:
  """The fewest seeds, at least 2, at which `power` reaches 80 %.

  Args:
    sd: of the differences of a pair.
    effect: their mean, other than 0.

  Returns:
    Their number; infinity above 100,000.
  """
  low, high = 1, 2  # power grows with the seeds: double, then halve
  while power(high, sd, effect) < POWER:
    low, high = high, 2 * high
    if high > _MOST_SEEDS:
      return math.inf
  while high - low > 1:
    middle = (low + high) // 2
    if power(middle, sd, effect) < POWER:
      low = middle
    else:
      high = middle
  return high


def holm(ps: Sequence[float]) -> list[float]:
  """p-values of one family, adjusted for their number (Holm 1979).

  NaN stays and counts for nothing.
  """
  known = [i for i, p in enumerate(ps) if not math.isnan(p)]
  adjusted = list(ps)
  largest = 0.0
  for rank, i in enumerate(sorted(known, key=lambda i: ps[i])):
    largest = max(largest, min(1.0, (len(known) - rank) * ps[i]))
    adjusted[i] = largest
  return adjusted
