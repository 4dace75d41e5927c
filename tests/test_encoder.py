"""A frozen tower is asked once, and nothing else changes."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxvlm import encoder as encoder_module
from jaxvlm import learner as learner_module
from jaxvlm import step, watch
from jaxvlm.encoder import Encoder
from jaxvlm.filling import Known
from jaxvlm.packing import Packed
from tests.test_counters import experiences

families = pytest.mark.parametrize(
  "family", ["qwen2_5_vl", "qwen3_vl"], indirect=True
)


@pytest.fixture(scope="module")
def learner(make_learner, mesh):
  return make_learner(mesh, frozen=("vision_tower", "merger"))


@pytest.fixture(scope="module")
def placed(params, place_params, mesh):
  return place_params(params, mesh)


@pytest.fixture(scope="module")
def encoded(network, mesh, layout, placed, questions):
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  return encoder(placed, questions)


@pytest.fixture(scope="module")
def make_packed(rollout, mesh, layout):
  def make(questions):
    return Packed(
      *(questions, rollout.completion_ids, rollout.completion_mask),
      tokens=96,
      mesh=mesh,
      layout=layout,
    )

  return make


def test_each_picture_has_its_tokens(encoded, questions):
  for question, plain in zip(encoded, questions, strict=True):
    assert question.features.shape[1] == len(plain.pixel_values) // 4
    assert (question.features != 0).any() == (len(plain.pixel_values) > 0)


@families
def test_logprobs_and_completions_stay_those_of_the_pictures(
  encoded,
  questions,
  make_packed,
  learner,
  placed,
  make_sampler,
  mesh,
  draws,
  rollout,
):
  (expected,) = learner.logprobs([placed], make_packed(questions))
  (found,) = learner.logprobs([placed], make_packed(encoded))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  sampler = make_sampler(mesh)
  again = sampler.sample(
    sampler.weights(placed), encoded, key=jax.random.key(0), draws=draws
  )
  np.testing.assert_array_equal(again.completion_ids, rollout.completion_ids)


def test_the_update_does_without_the_tower(
  encoded, questions, make_packed, learner, placed, rollout
):
  def flops(questions):
    packed = make_packed(questions)
    micro = next(experiences(packed, rollout.completion_mask))
    program = learner.program
    total = learner_module.zeros(program, placed)
    found = learner_module.add_gradient.lower(
      program, total, placed, learner._banned, micro
    ).compile()
    return found.cost_analysis()["flops"]

  assert flops(encoded) < 0.8 * flops(questions)


def test_it_is_asked_where_tower_and_merger_are_frozen_alone(questions):
  asked = []

  def encoder(params, questions):
    asked.append(params)
    return ["encoded"]

  for freeze, expected in (
    ((), questions),
    (("vision_tower",), questions),
    (("merger", "vision_tower"), ["encoded"]),
  ):
    stage = types.SimpleNamespace(freeze=freeze)
    assert step.encode_frozen(stage, encoder, 7, questions) == expected
  assert asked == [7]


def test_pictures_share_lanes_and_calls(
  network, mesh, layout, placed, questions, encoded, monkeypatch
):
  """Lanes of several small pictures, a lane a call: the same features."""
  monkeypatch.setitem(encoder_module._LANE, "cpu", 96)
  monkeypatch.setitem(encoder_module._TOGETHER, "cpu", 96)
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  shapes = []
  see = encoder._see
  monkeypatch.setattr(
    encoder,
    "_see",
    lambda params, vision: (
      shapes.append(vision.rows.shape) or see(params, vision)
    ),
  )
  found = encoder(placed, questions)
  assert len(shapes) > 1 and len(set(shapes)) == 1
  lanes = sum(count for count, _ in shapes)
  patches = [len(q.pixel_values) for q in questions]
  assert lanes < np.count_nonzero(patches)
  size = lanes * shapes[0][1]
  assert encoder.padding == {"padding/lanes": (size - sum(patches), size)}
  for own, expected in zip(found, encoded, strict=True):
    np.testing.assert_allclose(own.features, expected.features, atol=1e-5)


def test_what_is_known_is_not_asked_again(network, mesh, layout, encoded):
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  assert encoder(None, encoded) == encoded
  assert encoder.padding == {}


def test_a_lane_is_as_wide_as_the_data_need(
  network, mesh, layout, placed, questions
):
  """Batches of any pictures have one width."""
  encoder = Encoder(
    network=network, mesh=mesh, layout=layout, known=Known(patches=1000)
  )
  encoder(placed, questions[:2])
  assert encoder.padding["padding/lanes"][1] == 1000


@pytest.mark.parametrize("pictures", [19, 24, 40, 96])
def test_calls_are_as_large_as_leaves_few_lanes_empty(
  network, mesh, layout, pictures
):
  """Of 96 questions so many have a picture: at most 15 % are empty lanes."""
  sizes = np.zeros((2, 96, 2), int)
  sizes[0, :pictures, 1] = sizes[1, :, 1] = 16
  known = Known(0, 16, sizes)
  encoder = Encoder(network=network, mesh=mesh, layout=layout, known=known)
  lane, together = encoder.shape(16, 96)
  assert lane == 16 and together >= 12
  for count in (pictures, 96):
    assert count >= 0.85 * -(-count // together) * together


@families
def test_pictures_of_several_questions_are_encoded_once(
  network, mesh, layout, placed, questions, encoded
):
  again = [questions[0], *questions, questions[0], questions[5]]
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  found = encoder(placed, again)
  expected = [encoded[0], *encoded, encoded[0], encoded[5]]
  for own, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(own.features, other.features, atol=1e-5)
  empty, size = encoder.padding["padding/lanes"]
  assert size - empty == sum(len(q.pixel_values) for q in questions)


def test_text_alone_needs_no_tower(network, mesh, layout, questions):
  text = [questions[2], questions[6]]
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  assert encoder(None, text) == text


def test_pictures_that_are_exchanged_take_their_features_along(encoded):
  others, changed = watch.exchanged(encoded)
  for own, other, moved in zip(encoded, others, changed.ravel(), strict=True):
    assert other.features.shape == own.features.shape
    assert (other.features != own.features).any() == moved
  assert changed.any()
  plain = [dataclasses.replace(q, features=None) for q in encoded]
  np.testing.assert_array_equal(watch.exchanged(plain)[1], changed)
