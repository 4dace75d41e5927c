"""rl/losses.py: how tokens become a loss, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm.rl.losses import AGGREGATIONS, aggregate, by_group, token_sum

# EasyR1's "seq" gives .1667, .2143 or .8571 for these by the microbatch split.
LOSSES = jnp.array(
  [[[-1.0, 9, 9, 9]], [[2.0, 2, 2, 2]], [[-0.5, -0.5, 9, 9]], [[9.0] * 4]]
)
LENGTHS = np.array([1, 4, 2, 0])
MASK = jnp.asarray(np.arange(4) < LENGTHS[:, None, None])


@pytest.mark.parametrize(
  ("aggregation", "total", "count"),
  [
    ("token", 6.0, 7),
    ("sequence", 0.5, 3),
    ("sequence_sum", 6.0, 3),
    ("fixed", 1.5, 3),
  ],
)
def test_sums_and_counts_are_those_made_by_hand(aggregation, total, count):
  """A completion that is masked as a whole does not count."""
  found = aggregate(LOSSES, MASK, aggregation=aggregation, length=4)
  np.testing.assert_allclose(found, (total, count))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_tokens_may_hold_anything(aggregation):
  spoilt = jnp.where(MASK, LOSSES, jnp.nan)
  found, expected = (
    aggregate(x, MASK, aggregation=aggregation, length=4)
    for x in (spoilt, LOSSES)
  )
  np.testing.assert_array_equal(found, expected)


def test_figures_are_summed_over_the_questions_of_a_group():
  groups = jnp.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]], bool)
  spoilt = jnp.where(MASK, LOSSES, jnp.nan)
  sums, counts = by_group(spoilt, MASK, groups)
  np.testing.assert_allclose(sums, [6, -2, 8])
  np.testing.assert_allclose(counts, [7, 3, 4])


def test_sums_are_made_in_float32():
  ones = jnp.ones((1, 1, 4096), jnp.bfloat16)
  assert token_sum(ones, ones.astype(bool)) == 4096.0
