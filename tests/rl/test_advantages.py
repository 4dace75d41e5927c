"""rl/advantages.py against hand-computed groups."""

import numpy as np
import pytest

from jaxvlm.rl.advantages import grpo


def test_groups_match_the_fixture_of_easyr1():
  rewards = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0.1, 0.1, 0, 0]])
  advantages = grpo(rewards, eps=1e-6)
  expected = [
    [1.788850, -0.447213, -0.447213, -0.447213, -0.447213],
    [1.095443, 1.095443, -0.730295, -0.730295, -0.730295],
    [1.776589, -0.327266, -0.327266, -0.561028, -0.561028],
  ]
  np.testing.assert_allclose(advantages, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 5, 6, 7, 8, 12, 16, 24])
def test_equal_rewards_give_exactly_zero_advantage(dtype, size):
  values = np.array([0.1, 0.3, 0.7, 0.9, 1.0, -1.0, 1 / 3], dtype)
  rewards = np.repeat(values[:, None], size, axis=1)
  assert (grpo(rewards, eps=1e-9) == 0.0).all()


def test_the_rounding_of_a_weighted_sum_is_no_signal():
  same = np.array([[0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]])
  assert same[0, 0] != same[0, 1]
  assert (grpo(same, eps=1e-9) == 0.0).all()


def test_without_eps_a_group_of_equal_rewards_divides_by_nothing():
  """No NaN, and no warning, which these tests take for an error."""
  rewards = np.array([[0.9, 0.9], [0.0, 1.0]])
  advantages = grpo(rewards, eps=0.0)
  np.testing.assert_array_equal(advantages[0], 0.0)
  np.testing.assert_allclose(advantages[1], [-(2**-0.5), 2**-0.5], rtol=1e-6)


def test_eps_shrinks_the_advantage_of_a_narrow_group():
  rewards = np.array([[0.0, 1e-3]])
  narrow = grpo(rewards, eps=1e-1)
  assert np.abs(narrow).max() < 0.01 < np.abs(grpo(rewards, eps=1e-6)).max()


def test_advantages_of_a_group_sum_to_zero_and_keep_the_order():
  rewards = np.random.default_rng(0).normal(size=(4, 6))
  advantages = grpo(rewards, eps=1e-6)
  np.testing.assert_allclose(advantages.sum(axis=1), 0.0, atol=1e-6)
  assert (advantages.argsort(axis=1) == rewards.argsort(axis=1)).all()


def test_groups_do_not_see_each_other():
  rewards = np.random.default_rng(1).normal(size=(3, 4))
  alone = np.concatenate([grpo(row[None], eps=1e-6) for row in rewards])
  np.testing.assert_array_equal(grpo(rewards, eps=1e-6), alone)


def test_a_group_of_one_is_refused():
  with pytest.raises(ValueError, match="num_completions of at least 2"):
    grpo(np.zeros((3, 1)), eps=1e-6)


def test_a_reward_that_is_not_finite_is_refused():
  with pytest.raises(ValueError, match="not finite"):
    grpo(np.array([[0.0, np.nan]]), eps=1e-6)
