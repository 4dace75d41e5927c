"""A step's groups: joined, taken, and chosen among."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxvlm.batch import best_first, join
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
