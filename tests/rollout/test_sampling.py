"""Filters against transformers' warpers; draws as a function of their key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from jaxvlm.rl.logprobs import BANNED_LOGIT
from jaxvlm.rollout.sampling import draw, draw_keys, keep_top_k, keep_top_p

LOGITS = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 2
KEY = jax.random.key(0)
IDS = jnp.array([7, 3, 11], jnp.uint32)


def warped(warper):
  """Which entries transformers keeps."""
  return np.isfinite(warper(None, torch.tensor(LOGITS)).numpy())


@pytest.mark.parametrize("k", [1, 3, 39, 40])
def test_top_k_keeps_what_transformers_keeps(k):
  found = np.asarray(keep_top_k(jnp.asarray(LOGITS), k))
  kept = warped(TopKLogitsWarper(k))
  assert (kept.sum(-1) == k).all()
  np.testing.assert_array_equal(found, np.where(kept, LOGITS, BANNED_LOGIT))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 0.95, 0.999])
def test_top_p_keeps_what_transformers_keeps(p):
  found = np.asarray(keep_top_p(jnp.asarray(LOGITS), p))
  kept = warped(TopPLogitsWarper(p))
  np.testing.assert_array_equal(found, np.where(kept, LOGITS, BANNED_LOGIT))


def test_top_p_keeps_the_token_that_crosses():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
  kept = keep_top_p(logits, 0.6) > BANNED_LOGIT
  np.testing.assert_array_equal(kept, [True, True, False, False])


@jax.jit
def plain(logits, keys, column):
  columns = jnp.full(len(logits), column)
  return draw(logits, keys, columns, greedy=False, top_k=0, top_p=1.0)


def rows(logits, questions, group):
  return jnp.broadcast_to(logits, (questions, group, logits.shape[-1]))


@pytest.mark.parametrize("repeats", [1, 64])
def test_draws_follow_the_distribution(repeats):
  logits = np.array([1.0, 0.0, -1.0, BANNED_LOGIT, 2.0], np.float32)
  logits = np.tile(logits, repeats)  # 5 is a block of ids, 320 are 64 of them
  expected = np.asarray(jax.nn.softmax(logits))
  keys = draw_keys(KEY, jnp.arange(2), 4000)
  ids, logprobs = plain(rows(jnp.asarray(logits), 2, 4000), keys, 0)
  counts = np.bincount(np.asarray(ids).ravel(), minlength=logits.size)
  assert (counts[3::5] == 0).all()
  np.testing.assert_allclose(
    logprobs, np.log(np.maximum(expected, 1e-30))[ids], atol=1e-5
  )
  # By places within the repeats, and by repeats.
  for axis in range(min(repeats, 2)):
    share = expected.reshape(repeats, 5).sum(axis)
    deviation = np.sqrt(8000 * share * (1 - share))
    found = counts.reshape(repeats, 5).sum(axis)
    assert (np.abs(found - 8000 * share) <= 4 * deviation).all()


def test_filters_bound_the_draws_but_not_their_logprobs():
  logits = rows(jnp.asarray(LOGITS[0]), 1, 500)
  keys = draw_keys(KEY, IDS[:1], 500)
  whole = np.asarray(jax.nn.log_softmax(LOGITS[0]))
  for bounds, warper in (
    ({"top_k": 3, "top_p": 1.0}, TopKLogitsWarper(3)),
    ({"top_k": 0, "top_p": 0.6}, TopPLogitsWarper(0.6)),
  ):
    ids, logprobs = draw(
      logits, keys, jnp.zeros(1, int), greedy=False, **bounds
    )
    assert set(np.unique(ids)) == set(np.flatnonzero(warped(warper)[0]))
    np.testing.assert_allclose(logprobs, whole[ids], atol=1e-5)


def test_greedy_takes_the_largest_whatever_the_filters():
  logits = jnp.asarray(LOGITS).reshape(3, 2, -1)
  ids, logprobs = draw(
    logits,
    draw_keys(KEY, IDS, 2),
    jnp.zeros(3, int),
    greedy=True,
    top_k=5,
    top_p=0.1,
  )
  np.testing.assert_array_equal(ids.reshape(-1), LOGITS.argmax(-1))
  np.testing.assert_allclose(
    logprobs, jax.nn.log_softmax(logits).max(-1), atol=1e-6
  )


def test_a_key_is_of_the_question_and_its_place_in_the_group_alone():
  keys = jax.random.key_data(draw_keys(KEY, IDS, 4))
  turned = jax.random.key_data(draw_keys(KEY, IDS[::-1], 2))
  np.testing.assert_array_equal(turned[::-1], keys[:, :2])
  assert len(np.unique(keys.reshape(12, -1), axis=0)) == 12


def test_steps_columns_and_completions_draw_apart():
  flat = jnp.zeros((3, 8, 1000))
  other = jax.random.fold_in(KEY, 1)
  keys = draw_keys(KEY, IDS, 8)
  drawn = [
    np.asarray(plain(flat, keys, 0)[0]),
    np.asarray(plain(flat, keys, 1)[0]),
    np.asarray(plain(flat, draw_keys(other, IDS, 8), 0)[0]),
  ]
  again, _ = plain(flat, keys, 0)
  np.testing.assert_array_equal(again, drawn[0])
  everything = np.stack(drawn).ravel()
  assert len(np.unique(everything)) > 0.9 * everything.size
