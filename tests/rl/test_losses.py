"""rl/losses.py against the values that EasyR1's and verl's code gave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxvlm.rl.losses import clipped_surrogate, k3, token_sum

OLD = jnp.array([[[-1, -2, -0.5, -3]], [[-0.7, -1.2, -2.2, 0]]])
NEW = jnp.array([[[-0.6, -2.3, -0.45, -1]], [[-0.9, -0.5, -1.9, 0]]])
REF = jnp.array([[[-1.1, -1.8, -0.6, -3.5]], [[-0.8, -1, -2.5, 0]]])
MASK = jnp.array([[[1, 1, 1, 1]], [[1, 1, 1, 0]]], bool)
GOOD_BAD = jnp.array([[1.0], [-0.5]])
BAD_GOOD = jnp.array([[-1.0], [0.5]])

surrogate = functools.partial(
  clipped_surrogate, clip_low=0.2, clip_high=0.3, clip_dual=3.0
)


def token_mean(logprobs, advantages, mask=MASK, **bounds):
  loss, _ = surrogate(logprobs, OLD, advantages, mask, **bounds)
  return token_sum(loss, mask) / jnp.sum(mask)


@pytest.mark.parametrize(
  ("advantages", "bounds", "value"),
  [
    (GOOD_BAD, {}, -0.328703),
    (BAD_GOOD, {}, 0.661961),
    (BAD_GOOD, {"clip_dual": None}, 1.288970),
  ],
)
def test_token_mean_matches_the_fixture(advantages, bounds, value):
  np.testing.assert_allclose(
    token_mean(NEW, advantages, **bounds), value, atol=1e-6
  )


def test_gradients_match_the_fixture():
  good_bad = [[[0, -0.10583, -0.15018, 0]], [[0.05848, 0.14384, 0.09642, 0]]]
  bad_good = [[[0.21312, 0, 0.15018, 0]], [[-0.05848, 0, 0, 0]]]
  gradient = jax.grad(token_mean)
  np.testing.assert_allclose(gradient(NEW, GOOD_BAD), good_bad, atol=1e-5)
  np.testing.assert_allclose(gradient(NEW, BAD_GOOD), bad_good, atol=1e-5)


def test_the_dual_bound_alone_stops_a_huge_ratio():
  without = jax.grad(token_mean)(NEW, BAD_GOOD, clip_dual=None)
  assert without[0, 0, 3] > 1.0
  assert jax.grad(token_mean)(NEW, BAD_GOOD)[0, 0, 3] == 0.0


@pytest.mark.parametrize("advantages", [GOOD_BAD, BAD_GOOD])
def test_surrogate_gradients_match_finite_differences(advantages):
  check_grads(
    lambda logprobs: token_mean(jnp.asarray(logprobs), advantages),
    (NEW,),
    order=1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
  )


def test_clip_shares_match_the_fixture():
  _, stats = surrogate(NEW, OLD, BAD_GOOD, MASK)
  shares = {name: total / count for name, (total, count) in stats.items()}
  # EasyR1's clipfrac_higher counts both ends of the interval.
  np.testing.assert_allclose(
    shares["clip_low"] + shares["clip_high"], 0.4286, atol=1e-4
  )
  np.testing.assert_allclose(shares["clip_low"], 1 / 7, atol=1e-6)
  np.testing.assert_allclose(shares["clip_dual"], 0.1429, atol=1e-4)
  np.testing.assert_allclose(shares["approx_kl"], -0.4214, atol=1e-4)


def test_wider_bounds_clip_less():
  _, stats = surrogate(
    NEW, OLD, BAD_GOOD, MASK, clip_low=0.3, clip_high=1.1, clip_dual=8.0
  )
  assert [float(total) for total, _ in list(stats.values())[:3]] == [0, 0, 0]


def test_an_only_update_has_ratio_one_and_the_policy_gradient():
  def loss(logprobs):
    return token_sum(surrogate(logprobs, logprobs, GOOD_BAD, MASK)[0], MASK)

  value, gradient = jax.value_and_grad(loss)(NEW)
  np.testing.assert_allclose(value, -(4 * 1.0 - 3 * 0.5), rtol=1e-6)
  expected = jnp.where(MASK, -GOOD_BAD[..., None] * jnp.ones_like(NEW), 0.0)
  np.testing.assert_array_equal(gradient, expected)


def test_zero_advantage_gives_zero_loss_and_gradient():
  value, gradient = jax.value_and_grad(token_mean)(NEW, 0.0 * GOOD_BAD)
  assert value == 0.0
  assert (gradient == 0.0).all()


def test_k3_matches_the_fixture():
  kl, stats = k3(NEW, REF, MASK, limit=20.0)
  np.testing.assert_allclose(token_sum(kl, MASK) / 7, 0.301223, atol=1e-6)
  np.testing.assert_allclose(stats["kl"][0] / stats["kl"][1], 0.301223, 1e-5)
  assert stats["kl_clamped"][0] == 0.0


@pytest.mark.parametrize(
  ("gap", "value", "slope"),
  [(-2.0, 1.1353, 0.8647), (2.0, 4.3891, -6.3891), (2.6, 9.8637, -12.4637)],
)
def test_k3_of_one_token_matches_the_fixture(gap, value, slope):
  mask = jnp.ones((1, 1, 1), bool)

  def one(logprob):
    kl, _ = k3(
      jnp.full((1, 1, 1), logprob), gap + 0.0 * OLD[:1, :, :1], mask, limit=20.0
    )
    return token_sum(kl, mask)

  result = jax.value_and_grad(one)(0.0)
  np.testing.assert_allclose(result, (value, slope), atol=2e-4)


def test_k3_gradients_match_finite_differences():
  def total(logprobs):
    kl, _ = k3(jnp.asarray(logprobs), REF, MASK, limit=20.0)
    return token_sum(kl, MASK)

  check_grads(total, (NEW,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_k3_is_clamped_before_exp():
  logprobs = jnp.array([[[-500.0, 0.0, -1.0]]])
  ref = jnp.array([[[0.0, -500.0, -1.0]]])
  mask = jnp.ones((1, 1, 3), bool)

  def total(logprobs):
    kl, stats = k3(logprobs, ref, mask, limit=20.0)
    return token_sum(kl, mask), stats

  (value, stats), gradient = jax.value_and_grad(total, has_aux=True)(logprobs)
  assert jnp.isfinite(value)
  np.testing.assert_array_equal(gradient, [[[0.0, 0.0, 0.0]]])
  assert stats["kl_clamped"] == (2.0, 3.0)


def test_no_gradient_reaches_the_reference_or_the_old_policy():
  def total(old, ref):
    loss, _ = surrogate(NEW, old, BAD_GOOD, MASK)
    return token_sum(loss + k3(NEW, ref, MASK, limit=20.0)[0], MASK)

  for gradient in jax.grad(total, (0, 1))(OLD, REF):
    assert (gradient == 0.0).all()


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, -jnp.inf, -1e30])
def test_masked_tokens_may_hold_anything(junk):
  def total(new, old, ref, advantages=BAD_GOOD):
    loss, stats = surrogate(new, old, advantages, MASK)
    kl, more = k3(new, ref, MASK, limit=20.0)
    return token_sum(loss + kl, MASK), (stats, more)

  def spoilt(x):
    return jnp.where(MASK, x, junk)

  clean = jax.value_and_grad(total, has_aux=True)(
    NEW * MASK, OLD * MASK, REF * MASK
  )
  dirty = jax.value_and_grad(total, has_aux=True)(
    spoilt(NEW), spoilt(OLD), spoilt(REF)
  )
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_a_ratio_beyond_float_stays_finite():
  logprobs = OLD + 300.0
  value, gradient = jax.value_and_grad(token_mean)(
    logprobs, BAD_GOOD, clip_dual=None
  )
  assert jnp.isfinite(value)
  assert jnp.isfinite(gradient).all()


def test_sums_do_not_depend_on_split_or_padding():
  whole, stats = surrogate(NEW, OLD, BAD_GOOD, MASK)
  parts = [
    surrogate(
      NEW[i : i + 1], OLD[i : i + 1], BAD_GOOD[i : i + 1], MASK[i : i + 1]
    )
    for i in range(2)
  ]
  split = sum(
    token_sum(loss, MASK[i : i + 1]) for i, (loss, _) in enumerate(parts)
  )
  np.testing.assert_allclose(split, token_sum(whole, MASK), rtol=1e-6)
  for name, (total, count) in stats.items():
    np.testing.assert_allclose(
      sum(part[name][0] for _, part in parts), total, rtol=1e-6
    )
    assert sum(part[name][1] for _, part in parts) == count

  def pad(x):
    return jnp.pad(x, [(0, 0), (0, 0), (0, 3)])

  wide, wide_stats = surrogate(pad(NEW), pad(OLD), BAD_GOOD, pad(MASK))
  np.testing.assert_allclose(
    token_sum(wide, pad(MASK)), token_sum(whole, MASK), rtol=1e-6
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), wide_stats, stats
  )


def test_sums_are_made_in_float32():
  ones = jnp.ones((1, 1, 4096), jnp.bfloat16)
  assert token_sum(ones, ones.astype(bool)) == 4096.0
