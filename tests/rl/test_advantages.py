"""rl/advantages.py against hand-computed groups."""

import functools

import numpy as np
import pytest

from jaxvlm.rl import advantages
from jaxvlm.rl.advantages import batch_std, dr_grpo, gdpo, grpo, rloo


def one_reward(rewards, *, eps):
  return gdpo(rewards[None], np.ones((1, len(rewards))), eps=eps)


ALL = {
  "grpo": functools.partial(grpo, eps=1e-9),
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "batch_std": functools.partial(batch_std, eps=1e-9),
  "gdpo": functools.partial(one_reward, eps=1e-9),
}
each = pytest.mark.parametrize("estimate", ALL.values(), ids=ALL.keys())


def test_groups_match_the_fixture_of_easyr1():
  rewards = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0.1, 0.1, 0, 0]])
  expected = [
    [1.788850, -0.447213, -0.447213, -0.447213, -0.447213],
    [1.095443, 1.095443, -0.730295, -0.730295, -0.730295],
    [1.776589, -0.327266, -0.327266, -0.561028, -0.561028],
  ]
  np.testing.assert_allclose(grpo(rewards, eps=1e-6), expected, atol=1e-6)


def test_every_estimator_is_tried_here():
  assert ALL.keys() == advantages.ESTIMATORS.keys()


@each
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 5, 6, 7, 8, 12, 16, 24])
def test_equal_rewards_give_exactly_zero_advantage(estimate, dtype, size):
  values = np.array([0.1, 0.3, 0.7, 0.9, 1.0, -1.0, 1 / 3], dtype)
  rewards = np.repeat(values[:, None], size, axis=1)
  rewards[-1, 0] = 0  # one group that is alive
  found = estimate(rewards)
  assert (found[:-1] == 0.0).all()
  np.testing.assert_array_equal(advantages.live(found), [False] * 6 + [True])


@each
def test_the_rounding_of_a_weighted_sum_is_no_signal(estimate):
  same = np.array([[0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]])
  assert same[0, 0] != same[0, 1]
  assert (estimate(same) == 0.0).all()


@pytest.mark.parametrize("estimate", [grpo, batch_std, one_reward])
def test_without_eps_equal_rewards_divide_by_nothing(estimate):
  """No NaN, and no warning, which these tests take for an error."""
  assert (estimate(np.full((2, 2), 0.9), eps=0.0) == 0).all()


def test_eps_shrinks_the_advantage_of_a_narrow_group():
  rewards = np.array([[0.0, 1e-3]])
  narrow = grpo(rewards, eps=1e-1)
  assert np.abs(narrow).max() < 0.01 < np.abs(grpo(rewards, eps=1e-6)).max()


@each
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(estimate):
  rewards = np.random.default_rng(0).normal(size=(4, 6))
  found = estimate(rewards)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found.sum(axis=1), 0.0, atol=1e-6)
  assert (found.argsort(axis=1) == rewards.argsort(axis=1)).all()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_groups_do_not_see_each_other(name):
  rewards = np.random.default_rng(1).normal(size=(3, 4))
  alone = np.concatenate([ALL[name](row[None]) for row in rewards])
  np.testing.assert_array_equal(ALL[name](rewards), alone)


def test_dr_grpo_leaves_the_division_out():
  rewards = np.array([[1.0, 0, 0, 0], [0.1, 0, 0, 0]])
  expected = [[0.75, -0.25, -0.25, -0.25], [0.075, -0.025, -0.025, -0.025]]
  np.testing.assert_allclose(dr_grpo(rewards), expected, rtol=1e-6)


def test_rloo_compares_with_the_others():
  rewards = np.array([[3.0, 0.0, 1.0]])
  expected = [[3 - 0.5, 0 - 2.0, 1 - 1.5]]
  np.testing.assert_allclose(rloo(rewards), expected, rtol=1e-6)


def test_batch_std_divides_by_the_deviation_of_all_rewards():
  rewards = np.array([[1.0, 0.0], [5.0, 5.0]])
  scale = np.std([1, 0, 5, 5], ddof=1) + 0.5
  found = batch_std(rewards, eps=0.5)
  np.testing.assert_allclose(found, [[0.5 / scale, -0.5 / scale], [0, 0]])


def test_gdpo_hears_a_reward_that_grpo_drowns():
  """The second reward varies a hundredth as much as the first."""
  loud, quiet = np.array([[1.0, 0, 1, 0]]), np.array([[0.01, 0.01, 0, 0]])
  drowned = grpo(loud + quiet, eps=1e-6)
  heard = gdpo(np.stack([loud, quiet]), np.ones((2, 1)), eps=1e-6)
  assert drowned[0, 0] - drowned[0, 2] < 0.02
  assert heard[0, 0] - heard[0, 2] > 1
  # Two z-scores of 0.866 that agree or cancel, over their own deviation.
  np.testing.assert_allclose(heard, [[1.2247, 0, 0, -1.2247]], atol=1e-3)


def test_gdpo_weighs_rewards_and_leaves_out_those_that_do_not_apply():
  parts = np.array([[[1.0, 0], [1.0, 0]], [[1.0, 0], [np.nan, np.nan]]])
  found = gdpo(parts, np.array([[1.0, 1.0], [3.0, 3.0]]), eps=0.0)
  np.testing.assert_allclose(found[0] / found[1], [4.0, 4.0], rtol=1e-6)


@each
def test_a_group_of_one_is_refused(estimate):
  with pytest.raises(ValueError, match="num_completions of at least 2"):
    estimate(np.zeros((3, 1)))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "batch_std"])
def test_a_reward_that_is_not_finite_is_refused(name):
  with pytest.raises(ValueError, match="not finite"):
    ALL[name](np.array([[0.0, np.nan]]))
