"""rl/kl.py against the values that EasyR1's code gave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxvlm.rl import kl
from jaxvlm.rl.losses import token_sum
from tests.rl.fixture import MASK, NEW, REF


def total(logprobs, ref=REF, mask=MASK, estimator="k3"):
  values, figures = kl.estimate(
    logprobs, ref, mask, estimator=estimator, limit=20.0
  )
  return token_sum(values, mask), figures


@pytest.mark.parametrize(
  ("estimator", "mean"), [("k1", 0.521429), ("k2", 0.528036), ("k3", 0.301223)]
)
def test_token_means_match_the_fixture(estimator, mean):
  value, figures = total(NEW, estimator=estimator)
  np.testing.assert_allclose(value / 7, mean, atol=1e-6)
  np.testing.assert_allclose(token_sum(figures["kl"], MASK), value, rtol=1e-6)
  assert token_sum(figures["kl_clamped"], MASK) == 0.0


@pytest.mark.parametrize(
  ("gap", "value", "slope"),
  [(-2.0, 1.1353, 0.8647), (2.0, 4.3891, -6.3891), (2.6, 9.8637, -12.4637)],
)
def test_k3_of_one_token_matches_the_fixture(gap, value, slope):
  mask = jnp.ones((1, 1, 1), bool)
  ref = jnp.full((1, 1, 1), gap)

  def one(logprob):
    return total(jnp.full((1, 1, 1), logprob), ref, mask)[0]

  result = jax.value_and_grad(one)(0.0)
  np.testing.assert_allclose(result, (value, slope), atol=2e-4)


@pytest.mark.parametrize("estimator", sorted(kl.ESTIMATORS))
def test_gradients_match_finite_differences(estimator):
  check_grads(
    lambda x: total(jnp.asarray(x), estimator=estimator)[0],
    (NEW,),
    order=1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
  )


@pytest.mark.parametrize("estimator", sorted(kl.ESTIMATORS))
def test_the_gap_is_clamped_before_exp(estimator):
  logprobs = jnp.array([[[-500.0, 0.0, -1.0]]])
  ref = jnp.array([[[0.0, -500.0, -1.0]]])
  mask = jnp.ones((1, 1, 3), bool)
  (value, figures), gradient = jax.value_and_grad(
    lambda x: total(x, ref, mask, estimator), has_aux=True
  )(logprobs)
  assert jnp.isfinite(value)
  np.testing.assert_array_equal(gradient[..., :2], [[[0.0, 0.0]]])
  assert token_sum(figures["kl_clamped"], mask) == 2.0


@pytest.mark.parametrize("estimator", sorted(kl.ESTIMATORS))
def test_no_gradient_reaches_the_reference(estimator):
  gradient = jax.grad(lambda ref: total(NEW, ref, estimator=estimator)[0])(REF)
  assert (gradient == 0.0).all()


@pytest.mark.parametrize("estimator", sorted(kl.ESTIMATORS))
@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, -jnp.inf])
def test_masked_tokens_may_hold_anything(estimator, junk):
  def run(new, ref):
    return jax.value_and_grad(lambda x: total(x, ref, estimator=estimator)[0])(
      new
    )

  def spoilt(x):
    return jnp.where(MASK, x, junk)

  clean = run(NEW * MASK, REF * MASK)
  jax.tree.map(
    np.testing.assert_array_equal, run(spoilt(NEW), spoilt(REF)), clean
  )
