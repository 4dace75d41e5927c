"""Paired tests against cases made by hand, and against other formulas."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxvlm import paired


def test_three_differences_are_tested_as_by_hand():
  """1, 2, 3: mean 2, sd 1, error 1/sqrt(3), t = 2 sqrt(3) at 2 degrees."""
  found = paired.compare([1.0, 2.0, 3.0], effect=1.5)
  assert (found.seeds, found.mean, found.sd) == (3, 2.0, 1.0)
  t = 2 * math.sqrt(3)
  # With 2 degrees of freedom Student's t has a closed form.
  assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
  quantile = 4.302653  # of 0.975
  assert found.high - found.mean == pytest.approx(quantile / math.sqrt(3))
  assert found.low + found.high == pytest.approx(2 * found.mean)


def test_one_seed_says_nothing_of_the_noise():
  found = paired.compare([0.5], effect=1.5)
  assert (found.seeds, found.mean) == (1, 0.5)
  for value in (found.sd, found.low, found.high, found.p, found.needed):
    assert math.isnan(value)


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.25, 0.0)])
def test_pairs_that_are_all_alike_divide_by_nothing(value, p):
  found = paired.compare([value] * 4, effect=1.5)
  assert (found.mean, found.sd, found.p, found.needed) == (value, 0.0, p, 2)


def test_no_pairs_are_refused():
  with pytest.raises(ValueError, match="no seed that both arms have"):
    paired.compare([], effect=1.5)


def test_power_is_how_often_simulated_experiments_find_the_effect():
  draws = np.random.default_rng(0).normal(1.5, 2.0, (20_000, 8))
  found = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
  assert paired.power(8, 2.0, 1.5) == pytest.approx(found.mean(), abs=0.01)


@pytest.mark.parametrize(
  ("sd", "effect"), [(1.5, 1.5), (3.0, 1.5), (40.0, 1.5)]
)
def test_the_seeds_needed_are_the_fewest_that_have_the_power(sd, effect):
  needed = paired.seeds_needed(sd, effect)
  assert paired.power(needed, sd, effect) >= 0.8
  assert paired.power(needed - 1, sd, effect) < 0.8


def test_the_seeds_for_an_effect_as_large_as_the_noise_are_ten():
  """The textbook's example of a paired t-test with d = 1: n = 10."""
  assert paired.seeds_needed(1.0, 1.0) == 10


def test_little_noise_needs_two_seeds_and_much_of_it_too_many():
  assert paired.seeds_needed(1e-6, 1.5) == 2
  assert paired.seeds_needed(1e4, 1.5) == math.inf


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
  assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert paired.holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_leaves_what_is_unknown_out():
  first, second = paired.holm([math.nan, 0.02])
  assert math.isnan(first) and second == 0.02
