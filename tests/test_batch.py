"""A step's groups: joined, taken, and chosen among."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm.batch import best_first, from_npz, join, to_npz
from tests.steps import (  # noqa: F401
  FAILED,
  REWARDS,
  batch_fixture,
  completions_fixture,
  scores_fixture,
  stage_fixture,
)


@pytest.mark.parametrize(
  ("count", "rows", "rest"),
  [
    (2, [1, 3], [5]),
    (3, [1, 3, 5], []),
    (4, [0, 1, 3, 5], []),
    (6, [0, 1, 3, 4, 5, 6], []),
    (7, [0, 1, 2, 3, 4, 5, 6], []),
    (8, [0, 1, 2, 3, 4, 5, 6, 7], []),
  ],
)
def test_live_groups_are_chosen_first_failed_last_in_their_order(
  batch, count, rows, rest
):
  found = best_first(batch, count)
  np.testing.assert_array_equal(found[0], rows)
  np.testing.assert_array_equal(found[1], rest)


def test_a_failed_group_is_last_even_if_it_looks_alive(batch):
  failed = np.arange(8) == 1
  scores = dataclasses.replace(batch.scores, failed=failed)
  rows, rest = best_first(dataclasses.replace(batch, scores=scores), 7)
  assert 1 not in rows and 1 not in rest


def test_taking_rows_takes_them_everywhere(batch):
  rows = np.array([3, 5])
  old = np.arange(96.0).reshape(8, 3, 4)
  taken = dataclasses.replace(batch, old_logprobs=old).take(rows)
  assert [q.question_id for q in taken.questions] == [103, 105]
  np.testing.assert_array_equal(taken.advantages, batch.advantages[rows])
  np.testing.assert_array_equal(taken.scores.rewards, REWARDS[rows])
  np.testing.assert_array_equal(taken.scores.parts["exact"][0], REWARDS[3])
  assert np.isnan(taken.scores.parts["exact"][1]).all()
  np.testing.assert_array_equal(taken.scores.accuracy, REWARDS[rows])
  np.testing.assert_array_equal(taken.scores.failed, FAILED[rows])
  np.testing.assert_array_equal(taken.old_logprobs, old[rows])
  assert taken.ref_logprobs is None
  for found, whole in zip(
    jax.tree.leaves(taken.rollout), jax.tree.leaves(batch.rollout), strict=True
  ):
    np.testing.assert_array_equal(found, whole[rows])


def test_joined_batches_are_those_that_were_taken_apart(batch):
  parts = [batch.take(np.arange(3)), batch.take(np.arange(3, 8))]
  joined = join(parts)
  assert list(joined.questions) == list(batch.questions)
  np.testing.assert_array_equal(joined.advantages, batch.advantages)
  np.testing.assert_array_equal(joined.scores.failed, FAILED)
  np.testing.assert_array_equal(
    joined.rollout.completion_ids, batch.rollout.completion_ids
  )
  assert joined.old_logprobs is None


def test_a_batch_is_frozen(batch):
  with pytest.raises(dataclasses.FrozenInstanceError):
    batch.advantages = None


def assert_same_arrays(found, expected):
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes() and a.shape == b.shape


@pytest.mark.parametrize("known", [None, (2, 7, 4), (2, 7, 4, 3)])
def test_a_batch_comes_back_from_a_file_bit_for_bit(batch, questions, known):
  """Whether logprobs and features are known or not, merged or not; of each
  question, too.
  """
  if known:
    random = np.random.default_rng(0)
    parts = batch.scores.parts | {"/my/file.py:score(a=1)": batch.advantages}
    seen = dataclasses.replace(
      questions[0], features=random.normal(size=known).astype(jnp.bfloat16)
    )
    batch = dataclasses.replace(
      batch,
      questions=[seen, *questions[1:]],
      scores=dataclasses.replace(batch.scores, parts=parts),
      old_logprobs=random.normal(size=(8, 3, 4)).astype(np.float32),
      ref_logprobs=random.normal(size=(8, 3, 4)).astype(np.float32),
    )
  asked = []

  def question(question_id):
    asked.append(question_id)
    return questions[question_id - 100]

  found = from_npz(to_npz(batch), question)
  assert asked == [q.question_id for q in batch.questions]
  logprobs = ("old_logprobs", "ref_logprobs")
  for name in ("rollout", "advantages", "unequal", *logprobs):
    assert_same_arrays(getattr(found, name), getattr(batch, name))
  for name in ("rewards", "parts", "failed", "accuracy"):
    assert_same_arrays(getattr(found.scores, name), getattr(batch.scores, name))
  for ours, theirs in zip(found.questions, batch.questions, strict=True):
    assert ours.example is theirs.example
    assert_same_arrays(ours.features, theirs.features)
