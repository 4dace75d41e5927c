"""rl/surrogates.py against the values that other trainers' code gave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxvlm.rl import losses, surrogates
from tests.rl.fixture import BAD_GOOD, GOOD_BAD, MASK, NEW, OLD

BOUNDS = {
  "clip": {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0},
  "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
  "gspo_token": {"clip_low": 3e-4, "clip_high": 4e-4},
  "cispo": {"weight_low": 1.0, "weight_high": 5.0},
  "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
}
NAMES = sorted(surrogates.SURROGATES)


def mean(
  logprobs,
  advantages,
  name="clip",
  aggregation="token",
  old=OLD,
  mask=MASK,
  **bounds,
):
  loss, _ = surrogates.SURROGATES[name](
    logprobs, old, advantages, mask, **BOUNDS[name] | bounds
  )
  total, count = losses.aggregate(loss, mask, aggregation=aggregation, length=4)
  return total / count


def shares(advantages, name="clip", **bounds):
  _, figures = surrogates.SURROGATES[name](
    NEW, OLD, advantages, MASK, **BOUNDS[name] | bounds
  )
  return {
    figure: float(losses.token_sum(values, MASK) / 7)
    for figure, values in figures.items()
  }


# -- the fixture ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "aggregation", "bounds", "good_bad", "bad_good"),
  [
    ("clip", "token", {}, -0.328703, 0.661961),
    ("clip", "sequence", {}, -0.200483, 0.507993),
    ("clip", "sequence_sum", {}, -1.150459, 2.316865),
    ("clip", "fixed", {}, -0.287615, 0.579216),
    ("clip", "token", {"clip_dual": None}, -0.328703, 1.288970),
    ("clip", "sequence", {"clip_dual": None}, -0.200483, 1.056625),
    ("clip", "fixed", {"clip_dual": None}, -0.287615, 1.127848),
    ("gspo", "sequence", {}, -0.173799, 0.605761),
    ("gspo_token", "sequence", {}, -0.173799, 0.605761),
    ("cispo", "token", {}, 0.918909, -0.918909),
    ("cispo", "token", {"weight_low": 0.0}, 0.845402, -0.845402),
    ("sapo", "token", {}, -0.980758, 0.891960),
  ],
)
def test_values_match_the_fixture(
  name, aggregation, bounds, good_bad, bad_good
):
  found = [
    mean(NEW, advantages, name, aggregation, **bounds)
    for advantages in (GOOD_BAD, BAD_GOOD)
  ]
  np.testing.assert_allclose(found, (good_bad, bad_good), atol=1e-6)


def test_gradients_match_the_fixture():
  good_bad = [[[0, -0.10583, -0.15018, 0]], [[0.05848, 0.14384, 0.09642, 0]]]
  bad_good = [[[0.21312, 0, 0.15018, 0]], [[-0.05848, 0, 0, 0]]]
  gradient = jax.grad(mean)
  np.testing.assert_allclose(gradient(NEW, GOOD_BAD), good_bad, atol=1e-5)
  np.testing.assert_allclose(gradient(NEW, BAD_GOOD), bad_good, atol=1e-5)


def test_clip_shares_match_the_fixture():
  found = shares(BAD_GOOD)
  # EasyR1's clipfrac_higher counts both ends of the interval.
  np.testing.assert_allclose(
    found["clip_low"] + found["clip_high"], 0.4286, atol=1e-4
  )
  np.testing.assert_allclose(found["clip_low"], 1 / 7, atol=1e-6)
  np.testing.assert_allclose(found["clip_dual"], 0.1429, atol=1e-4)
  np.testing.assert_allclose(found["approx_kl"], -0.4214, atol=1e-4)


# -- what holds for each of them -----------------------------------------------


@pytest.mark.parametrize("advantages", [GOOD_BAD, BAD_GOOD])
@pytest.mark.parametrize("name", ["clip", "gspo", "sapo"])
def test_gradients_match_finite_differences(name, advantages):
  check_grads(
    lambda logprobs: mean(jnp.asarray(logprobs), advantages, name),
    (NEW,),
    order=1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
  )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("advantages", [GOOD_BAD, BAD_GOOD])
def test_an_only_update_has_the_policy_gradient(name, advantages):
  gradient = jax.grad(
    lambda x: mean(x, advantages, name, "sequence_sum", old=x)
  )(NEW)
  expected = jnp.where(MASK, -advantages[..., None] * jnp.ones_like(NEW), 0.0)
  np.testing.assert_allclose(2 * gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_zero_advantage_gives_zero_loss_and_gradient(name):
  value, gradient = jax.value_and_grad(mean)(NEW, 0.0 * GOOD_BAD, name)
  assert value == 0.0
  assert (gradient == 0.0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_old_policy(name):
  gradient = jax.grad(lambda old: mean(NEW, BAD_GOOD, name, old=old))(OLD)
  assert (gradient == 0.0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, -jnp.inf, -1e30])
def test_masked_tokens_may_hold_anything(name, junk):
  def run(new, old):
    def total(new):
      loss, figures = surrogates.SURROGATES[name](
        new, old, BAD_GOOD, MASK, **BOUNDS[name]
      )
      return losses.token_sum(loss, MASK), [
        losses.token_sum(x, MASK) for x in figures.values()
      ]

    return jax.value_and_grad(total, has_aux=True)(new)

  def spoilt(x):
    return jnp.where(MASK, x, junk)

  clean, dirty = run(NEW * MASK, OLD * MASK), run(spoilt(NEW), spoilt(OLD))
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [300.0, -300.0])
def test_a_ratio_beyond_float_stays_finite(name, shift):
  value, gradient = jax.value_and_grad(mean)(OLD + shift, BAD_GOOD, name)
  assert jnp.isfinite(value)
  assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_neither_padding_nor_split_matters(name, aggregation):
  def pair(rows, extra=0):
    def cut(x):
      return jnp.pad(x[rows], [(0, 0), (0, 0), (0, extra)])

    loss, _ = surrogates.SURROGATES[name](
      cut(NEW), cut(OLD), BAD_GOOD[rows], cut(MASK), **BOUNDS[name]
    )
    return np.array(
      losses.aggregate(loss, cut(MASK), aggregation=aggregation, length=4)
    )

  whole = pair(slice(None))
  np.testing.assert_allclose(pair(slice(None), extra=3), whole, rtol=1e-6)
  split = pair(slice(0, 1)) + pair(slice(1, 2), extra=1)
  np.testing.assert_allclose(split, whole, rtol=1e-6)


# -- what makes each of them itself ----------------------------------------------


def test_the_dual_bound_alone_stops_a_huge_ratio():
  without = jax.grad(mean)(NEW, BAD_GOOD, clip_dual=None)
  assert without[0, 0, 3] > 1.0
  assert jax.grad(mean)(NEW, BAD_GOOD)[0, 0, 3] == 0.0


def test_wider_bounds_clip_less():
  found = shares(BAD_GOOD, clip_low=0.3, clip_high=1.1, clip_dual=8.0)
  assert found["clip_low"] == found["clip_high"] == found["clip_dual"] == 0


def test_gspo_weighs_all_tokens_of_a_completion_alike():
  gradient = jax.grad(mean)(NEW, GOOD_BAD, "gspo", clip_high=5.0)
  np.testing.assert_allclose(gradient[0, 0], gradient[0, 0, :1].repeat(4))
  assert gradient[0, 0, 0] != gradient[1, 0, 0] != 0


@pytest.mark.parametrize("advantages", [GOOD_BAD, BAD_GOOD])
def test_both_forms_of_gspo_have_the_same_gradient(advantages):
  """So they do where a completion has one advantage, as it has here."""
  gradients = [
    jax.grad(mean)(NEW, advantages, name, "sequence", clip_high=0.5)
    for name in ("gspo", "gspo_token")
  ]
  np.testing.assert_allclose(*gradients, rtol=1e-6)
  assert (gradients[0] != 0).any()


def test_cispo_keeps_a_gradient_where_the_clip_takes_it():
  assert jax.grad(mean)(NEW, GOOD_BAD)[0, 0, 0] == 0.0
  gradient = jax.grad(mean)(NEW, GOOD_BAD, "cispo")
  np.testing.assert_allclose(gradient[0, 0, 0], -jnp.exp(0.4) / 7, rtol=1e-5)
  np.testing.assert_allclose(gradient[0, 0, 3], -5.0 / 7, rtol=1e-5)
  np.testing.assert_allclose(shares(GOOD_BAD, "cispo")["clip_high"], 1 / 7)


def test_sapos_slope_fades_on_both_sides_of_one():
  def slope(ratio, advantage):
    one = jnp.ones((1, 1, 1), bool)
    return jax.grad(
      lambda x: mean(
        x, jnp.full((1, 1), advantage), "sapo", old=0.0 * x, mask=one
      )
    )(jnp.full((1, 1, 1), jnp.log(ratio)))[0, 0, 0]

  np.testing.assert_allclose(slope(1.0, 1.0), -1.0, rtol=1e-6)
  assert 0 < -slope(4.0, 1.0) / 4.0 < 0.5
  assert 0 < -slope(0.1, 1.0) / 0.1 < 1.0
  # The larger tau, which is the bad completions', fades faster.
  assert slope(4.0, -1.0) < -slope(4.0, 1.0)


# -- importance ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("mode", "expected"),
  [
    ("token_truncate", [[[0.5, 2, 2, 1]], [[1, 1, 1, 1]]]),
    ("token_mask", [[[0.5, 2, 0, 1]], [[1, 1, 1, 1]]]),
    ("sequence_truncate", [[[2] * 4], [[1] * 4]]),
    ("sequence_mask", [[[0] * 4], [[1] * 4]]),
  ],
)
def test_importance_weights_are_those_made_by_hand(mode, expected):
  ratios = jnp.array([[[0.5, 2.0, 4.0, 1.0]], [[1.0, 1.0, 1.0, 9.0]]])
  weights, figures = surrogates.importance_weights(
    OLD + jnp.log(ratios), OLD, MASK, mode=mode, cap=2.0
  )
  np.testing.assert_allclose(weights, expected, rtol=1e-5)
  over = {"token": 1, "sequence": 4}[mode.partition("_")[0]]
  assert losses.token_sum(figures["importance_capped"], MASK) == over


def test_importance_weights_have_no_gradient():
  def total(new):
    weights, _ = surrogates.importance_weights(
      new, OLD, MASK, mode="token_truncate", cap=9.0
    )
    return weights.sum()

  assert (jax.grad(total)(NEW) == 0).all()
