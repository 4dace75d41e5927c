"""Packed rows of any shape learn what naive rows do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from jaxvlm import packing
from jaxvlm.packing import Packed
from jaxvlm.types import Rollout
from tests.learners import OBJECTIVE, RATE
from tests.naive import (
  Batch,
  Naive,
  assert_trees_close,
  experiences,
  gradients,
  grpo_loss,
)
from tests.questions import make_question

families = pytest.mark.parametrize(
  "family", ["qwen2_5_vl", "qwen3_vl"], indirect=True
)
LENGTH = 8  # C
# Rows, columns, places and patches that all draws fit in, so that two programs
# do: those whose groups share no picture, or few, and others.
SHAPES = (4, 64, 16, 256), (2, 256, 16, 448)

pictures = st.lists(
  st.sampled_from([(2, 2), (2, 4), (4, 4), (6, 4)]), max_size=3
)
lengths = st.lists(st.integers(0, LENGTH), min_size=3, max_size=3)
# Pictures (None: those of the group before), words, and completions' tokens.
groups = st.lists(
  st.tuples(st.none() | pictures, st.integers(0, 8), lengths),
  min_size=1,
  max_size=6,
)


@pytest.fixture(scope="module")
def naive(network, layout, banned):
  return Naive(network, layout, banned)


@pytest.fixture(scope="module")
def learner(make_learner, mesh):
  return make_learner(mesh)


@pytest.fixture(scope="module")
def calm(params):
  """Weights that do not make attention as sharp: less rounding to tell."""
  return jax.tree.map(lambda x: x / 2, params)


@pytest.fixture(scope="module")
def start(learner, calm, place_params, mesh):
  return learner.init(place_params(calm, mesh))


def make_questions(random, layout, groups):
  questions = []
  for number, (sizes, words, _) in enumerate(groups):
    like = questions[-1] if sizes is None and questions else None
    if like:
      sizes = like.image_grid_thw[:, 1:].tolist()
    made = make_question(random, layout, number, sizes or [], words)
    if like:
      made = dataclasses.replace(made, pixel_values=like.pixel_values)
    questions.append(made)
  return questions


def widened(plan):
  """The plan in calls of one of the sizes, whatever it holds."""
  rows, columns, places, patches = SHAPES[plan.columns > SHAPES[0][1]]
  room = np.subtract((rows, places), plan.groups.shape[1:])
  return dataclasses.replace(
    plan,
    groups=np.pad(
      plan.groups, [(0, 0), (0, room[0]), (0, room[1])], constant_values=-1
    ),
    columns=columns,
    patches=patches if plan.patches else 0,
  )


@pytest.fixture(scope="module")
def compare(naive, learner, calm, start, mesh, layout):
  """Asserts that both learn the same from a rollout of some questions."""

  def check(questions, rollout, tokens, random):
    mask = rollout.completion_mask
    expected, _ = naive(calm, questions, rollout, OBJECTIVE.temperature)
    old, ref = expected + random.normal(size=(2, *mask.shape)) * 0.5
    batch = Batch(
      advantages=random.normal(size=mask.shape[:2]).astype(np.float32),
      old=old.astype(np.float32),
      ref=ref.astype(np.float32),
    )
    loss = grpo_loss(rollout, batch)
    _, slopes = naive(calm, questions, rollout, OBJECTIVE.temperature, loss)

    packed = Packed(
      questions,
      rollout.completion_ids,
      mask,
      tokens=tokens,
      mesh=mesh,
      layout=layout,
      patch_cost=100.0,
    )
    packed.plan = widened(packed.plan)
    state = jax.tree.map(jnp.copy, start)
    (found,) = learner.logprobs([state.params], packed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    everything = np.ones((len(questions), 1), bool)
    state, metrics = learner.update(
      state, experiences(packed, rollout, batch, everything), RATE
    )
    total, count = metrics["loss"]
    assert count == mask.sum()
    np.testing.assert_allclose(
      total / count, jax.jit(loss)(expected), rtol=1e-5, atol=1e-5
    )
    found = gradients(jax.device_get(state), metrics)
    assert_trees_close(found, slopes, 1e-5)

  return check


@families
# Making a failure smaller would take minutes.
@settings(
  max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate]
)
# Five groups about the same pictures, longer than a row is for other groups.
@example(
  [([(6, 4), (4, 4)], 0, [8, 8, 8]), *[(None, 2, [8, 3, 5])] * 4], 3, 256, 0
)
@given(
  groups.filter(lambda drawn: any(own[0] for *_, own in drawn)),
  st.sampled_from([1, 3]),
  st.sampled_from([32, 64, 128, 256]),
  st.integers(0, 2**32 - 1),
)
def test_loss_and_every_gradient_are_those_of_naive_rows(
  compare, layout, groups, completions, tokens, seed
):
  """Groups of text and of pictures, own or shared, in rows of several."""
  random = np.random.default_rng(seed)
  lengths = np.array([own[:completions] for *_, own in groups])
  mask = np.arange(LENGTH) < lengths[..., None]
  rollout = Rollout(
    completion_ids=random.integers(17, 48, mask.shape).astype(np.int32),
    completion_mask=mask,
    truncated=np.ones(lengths.shape, bool),
    sampler_logprobs=np.zeros(mask.shape, np.float32),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packing, "_ROW", SHAPES[0][1])
    compare(make_questions(random, layout, groups), rollout, tokens, random)
