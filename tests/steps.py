"""For tests of a step: a rollout of eight questions, and a scripted learner."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm import step
from jaxvlm.filling import UNKNOWN
from jaxvlm.types import Rollout, Scores


@pytest.fixture(name="job")
def job_fixture(mesh, layout):
  return types.SimpleNamespace(
    config={"limits": {"blind_every": 0}},
    mesh=mesh,
    processor=types.SimpleNamespace(
      layout=layout, decode=lambda ids: "-".join(map(str, ids))
    ),
    known=UNKNOWN,
    matrix_sizes=(1000, 100),
  )


@pytest.fixture(name="stage")
def stage_fixture():
  return types.SimpleNamespace(
    kind="grpo",
    advantage={"name": "grpo", "eps": 1e-9},
    rewards=(("exact", 1.0),),
    kl_coef=0.0,
    kl_target="loss",
    reference="stage_start",
    kl_estimator="k1",
    kl_limit=20.0,
    update_questions=8,
    updates_per_rollout=2,
    microbatch_tokens=32,
    max_rollouts=1,
    mask_truncated=False,
    asks_old_logprobs=False,
    labels=(),
    learning_rate_at=lambda update: 0.1 * update,
  )


REWARDS = np.array(
  [[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]]
  + [[0] * 3] * 2,
  np.float64,
)
FAILED = np.array([False, False, True, False, False, False, False, True])


@pytest.fixture(name="completions")
def completions_fixture():
  """Completion (q, g) has 1 + (q + g) % 4 tokens."""
  lengths = 1 + (np.arange(8)[:, None] + np.arange(3)) % 4
  mask = np.arange(4) < lengths[..., None]
  ids = np.where(mask, np.arange(96).reshape(8, 3, 4) % 40 + 7, 0)
  return Rollout(
    completion_ids=ids.astype(np.int32),
    completion_mask=mask,
    truncated=lengths == 4,
    sampler_logprobs=np.where(mask, -1.0 - ids / 100, 0).astype(np.float32),
  )


@pytest.fixture(name="scores")
def scores_fixture():
  # Question 5 has another reward of its own.
  own = np.arange(8)[:, None] == 5
  parts = {
    "exact": np.where(own, np.nan, REWARDS),
    "mine": np.where(own, REWARDS, np.nan),
  }
  return Scores(rewards=REWARDS, parts=parts, failed=FAILED, accuracy=REWARDS)


@pytest.fixture(name="batch")
def batch_fixture(stage, questions, completions, scores):
  return advantages_of(stage, questions, completions, scores)


def advantages_of(stage, questions, completions, scores, old=None, ref=None):
  return step.advantages_of(stage, questions, completions, scores, old, ref)


class Learner:
  """Logprobs are its parameters; an update adds 1 to them."""

  def __init__(self):
    self.updates = []

  def logprobs(self, policies, packed):
    trees = [packed.tree(u) for u in range(len(packed))]
    return [
      packed.collect([self.score(params, tree) for tree in trees])
      for params in policies
    ]

  def score(self, params, tree):
    return jnp.full(tree.slots.shape, float(params))

  def update(self, state, microbatches, rate):
    microbatches = list(microbatches)
    self.updates.append((state.params, microbatches, rate))
    tokens = float(sum(micro.completion_mask.sum() for micro in microbatches))
    moved = types.SimpleNamespace(params=state.params + 1)
    one = np.float32(1.0)
    return moved, {"loss": (2 * tokens * one, tokens * one)}


def places(tree):
  """The number of the question at each place of a microbatch; -1: none.

  It stands in the third token of its prompt.
  """
  rows = len(tree.ids)
  numbers = np.full((rows, len(tree.slots) // rows), -1)
  ids, trees = np.asarray(tree.ids), np.asarray(tree.tree_ids)
  for row, place in np.argwhere(numbers < 0):
    own = ids[row, trees[row] == place]
    if own.size:
      numbers[row, place] = own[2] - 20
  return numbers.reshape(-1)


def by_question(microbatches, pick):
  """What is picked of each, [Q ...] in the order of the questions."""
  found = {}
  for micro in microbatches:
    values = np.asarray(pick(micro))
    for place, question in enumerate(places(micro.tree)):
      if question >= 0:
        found[question] = values[place]
  return np.stack([found[question] for question in sorted(found)])


@pytest.fixture(name="learner")
def learner_fixture():
  return Learner()
