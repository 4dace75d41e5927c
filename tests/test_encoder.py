"""A frozen tower is asked once, and nothing else changes."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from flax import traverse_util

from jaxvlm import encoder as encoder_module
from jaxvlm import learner as learner_module
from jaxvlm import step, watch
from jaxvlm.data.vision_layout import pack_vision
from jaxvlm.encoder import Encoder
from jaxvlm.filling import Known
from jaxvlm.packing import Packed
from tests.learners import RATE
from tests.naive import assert_trees_close, gradients
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
def unmerged(network, mesh, layout, placed, questions):
  """What the mergers of a frozen tower are given."""
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  return encoder(placed, questions, merge=False)


@pytest.fixture(scope="module")
def change(network, params, place_params, mesh):
  """Weights with those of some part as a function says, on the mesh."""

  def make(**functions):
    flat = traverse_util.flatten_dict(params)
    changed = {
      path: functions.get(network.part_of(path), np.copy)(x)
      for path, x in flat.items()
    }
    return place_params(traverse_util.unflatten_dict(changed), mesh)

  return make


def half(x):
  return x / np.float32(2)


def lost(x):
  return np.full_like(x, np.nan)


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


def test_it_is_asked_where_the_tower_is_frozen(questions):
  def encoder(params, questions, *, merge):
    return params, merge

  for freeze, expected in (
    ((), questions),
    (("merger",), questions),
    (("vision_tower",), (7, False)),
    (("merger", "vision_tower"), (7, True)),
  ):
    stage = types.SimpleNamespace(freeze=freeze)
    assert step.encode_frozen(stage, encoder, 7, questions) == expected


# -- mergers that are trained behind a frozen tower ----------------------------


def test_each_token_has_the_patches_that_it_is_merged_of(unmerged, encoded):
  for question, whole in zip(unmerged, encoded, strict=True):
    assert question.features.shape == (*whole.features.shape[:2], 4, 32)


@families
def test_a_mesh_sees_the_same(
  network, layout, questions, unmerged, params, place_params, make_mesh
):
  mesh = make_mesh(2, 2, 2)
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  found = encoder(place_params(params, mesh), questions, merge=False)
  for own, expected in zip(found, unmerged, strict=True):
    np.testing.assert_allclose(
      own.features, expected.features, rtol=1e-5, atol=1e-4
    )


@families
def test_completions_are_those_of_the_pictures_without_the_towers_weights(
  unmerged, make_sampler, mesh, change, draws, rollout
):
  sampler = make_sampler(mesh)
  weights = sampler.weights(change(vision_tower=lost))
  again = sampler.sample(weights, unmerged, key=jax.random.key(0), draws=draws)
  np.testing.assert_array_equal(again.completion_ids, rollout.completion_ids)


@families
def test_policy_and_reference_merge_each_by_their_own_weights(
  unmerged, questions, make_packed, make_learner, mesh, change
):
  learner = make_learner(mesh, frozen=("vision_tower",))
  expected = learner.logprobs(
    [change(), change(merger=half)], make_packed(questions)
  )
  found = learner.logprobs(
    [change(vision_tower=lost), change(vision_tower=lost, merger=half)],
    make_packed(unmerged),
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(found[0] - found[1]).max() > 1e-3


@families
def test_loss_and_every_gradient_are_those_of_a_tower_that_is_asked_again(
  network,
  layout,
  questions,
  make_packed,
  make_learner,
  mesh,
  change,
  rollout,
):
  """Those of the mergers too, of which DeepStack has several."""
  learner = make_learner(mesh, frozen=("vision_tower",))
  # Attention that is less sharp leaves less rounding to tell.
  calm = dict.fromkeys(("vision_tower", "merger", "decoder"), half)
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  unmerged = encoder(change(**calm), questions, merge=False)

  def update(params, questions):
    micro = experiences(make_packed(questions), rollout.completion_mask)
    state, metrics = learner.update(learner.init(params), micro, RATE)
    return gradients(state, metrics), jax.device_get(metrics["loss"])

  expected, loss = update(change(**calm), questions)
  found, other = update(change(**calm | {"vision_tower": lost}), unmerged)
  np.testing.assert_allclose(other, loss, rtol=1e-5)
  assert_trees_close(found, expected, 1e-5)
  mergers = learner.program.by_part(found)["merger"]
  assert all((x != 0).any() for x in mergers.values())


@families
def test_a_step_asks_the_tower_of_each_picture_once(
  questions, placed, make_sampler, mesh, draws, monkeypatch
):
  """Whatever then asks for features: they are merged of what is known."""
  asked = []
  see = encoder_module.see

  def count(network, params, vision):
    asked.append(int((vision.full_segments >= 0).sum()))
    return see(network, params, vision)

  monkeypatch.setattr(encoder_module, "see", count)
  stage = types.SimpleNamespace(freeze=("vision_tower",))
  sampler = make_sampler(mesh)
  again = [*questions, questions[0], questions[5]]
  found = step.encode_frozen(stage, sampler.encoder, placed, again)
  assert sum(asked) == sum(len(q.pixel_values) for q in questions)
  calls = len(asked)
  assert step.encode_frozen(stage, sampler.encoder, None, found) == found
  merged = sampler.encoder(placed, found)
  assert [q.features.ndim for q in merged] == [3] * len(again)
  assert len(asked) == calls


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
    lambda params, vision, merge: (
      shapes.append(vision.rows.shape) or see(params, vision, merge)
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
  for merge in (True, False):
    found = encoder(None, text, merge=merge)
    assert encoder(None, found, merge=merge) == found


@pytest.mark.parametrize("merge", [True, False])
def test_text_alone_joins_what_a_tower_has_seen(
  network, mesh, layout, questions, placed, merge
):
  """Whichever of them comes first, and on a host that has no such batch."""
  encoder = Encoder(network=network, mesh=mesh, layout=layout)
  text = encoder(placed, [questions[2], questions[6]], merge=merge)
  shown = encoder(placed, questions[:2], merge=merge)
  assert text[0].features.shape[1] == 0 < shown[0].features.shape[1]
  for joined in (text + shown, shown + text):
    lanes = pack_vision([joined], layout=layout)
    alone = pack_vision([shown], layout=layout)
    jax.tree.map(np.testing.assert_array_equal, lanes, alone)
  assert pack_vision([text], layout=layout) is None


def test_pictures_that_are_exchanged_take_their_features_along(encoded):
  others, changed = watch.exchanged(encoded)
  for own, other, moved in zip(encoded, others, changed.ravel(), strict=True):
    assert other.features.shape == own.features.shape
    assert (other.features != own.features).any() == moved
  assert changed.any()
  plain = [dataclasses.replace(q, features=None) for q in encoded]
  np.testing.assert_array_equal(watch.exchanged(plain)[1], changed)
