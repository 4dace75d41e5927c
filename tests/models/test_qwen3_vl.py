"""What only Qwen3-VL has, taken away; and its other shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm.nn import attention, rope
from jaxvlm.nn.layers import MLP, RMSNorm

pytestmark = pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)


def change_vision(prompts, **changes):
  vision = dataclasses.replace(prompts.vision, **changes)
  return dataclasses.replace(prompts, vision=vision)


# -- DeepStack ---------------------------------------------------------------


def keep(*kept):
  """Zeroes all levels but these."""
  return lambda levels: levels * np.isin(np.arange(3), kept).reshape(3, 1, 1, 1)


LEVELS = {
  "any level": keep(),
  "the first level": keep(1, 2),
  "the second level": keep(0, 2),
  "the third level": keep(0, 1),
  "the order of levels": lambda levels: levels[::-1],
}


@pytest.mark.parametrize("part", LEVELS)
def test_logits_move_without(
  part, run, network, params, prompts, features, logits
):
  levels = jnp.asarray(LEVELS[part](features.levels), jnp.float32)
  without = dataclasses.replace(features, levels=levels)
  moved = np.abs(run.reading(network, params, prompts, without) - logits).max()
  assert moved > 0.05, moved


def test_levels_that_come_a_layer_late_move_the_logits(
  run, network, params, prompts, features, logits
):
  pad = lambda *zeros: jnp.pad(features.levels, (zeros, *[(0, 0)] * 3))
  read = lambda levels: run.reading(
    network, params, prompts, dataclasses.replace(features, levels=levels)
  )
  # A fourth level of zeros after the others is nothing.
  np.testing.assert_allclose(read(pad(0, 1)), logits, rtol=0, atol=1e-5)
  assert np.abs(read(pad(1, 0)) - logits).max() > 0.05


def test_levels_reach_columns_of_pictures_alone(
  run, network, params, prompts, questions, features
):
  """A prompt of text alone, and what stands before a picture, stay."""
  mask = np.asarray(prompts.prompt_mask)
  read = lambda levels: run.reading(
    network, params, prompts, dataclasses.replace(features, levels=levels)
  )
  moved = np.zeros(mask.shape)
  difference = read(features.levels) - read(features.levels + 1)
  moved[mask] = np.abs(difference).max(-1)
  shown = np.asarray(prompts.vision_index) >= 0
  after = np.cumsum(shown, axis=1) > 0
  assert not after[2].any()
  assert moved[~after].max() == 0
  assert moved[shown].min() > 1e-3


# -- positions ---------------------------------------------------------------


def test_logits_move_with_chunks_for_interleaving(
  monkeypatch, network, changed, logits
):
  monkeypatch.setattr(
    rope, "interleaved_axes", lambda section, _: rope.chunked_axes(section)
  )
  moved = np.abs(changed(network) - logits).max()
  assert moved > 0.05, moved


def nearest(vision):
  weight = vision.place_weight
  best = jnp.argmax(weight, axis=-1, keepdims=True)
  return (jnp.arange(4)[None, None] == best).astype(jnp.float32)


PLACES = {
  "interpolation": lambda p: change_vision(p, place_weight=nearest(p.vision)),
  "learned positions": lambda p: change_vision(
    p, place_weight=0 * p.vision.place_weight
  ),
  "their order": lambda p: change_vision(
    p, place_weight=p.vision.place_weight[..., ::-1]
  ),
}


@pytest.mark.parametrize("part", PLACES)
def test_logits_move_without_the_places(
  part, run, network, params, prompts, logits
):
  moved = np.abs(run(network, params, PLACES[part](prompts)) - logits).max()
  assert moved > 0.05, moved


# -- layers ------------------------------------------------------------------


def test_logits_move_without_the_norm_of_queries_and_keys(
  monkeypatch, network, changed, logits
):
  class Plain(RMSNorm):
    def __call__(self, x):
      return x

  monkeypatch.setattr(attention, "RMSNorm", Plain)
  moved = np.abs(changed(network) - logits).max()
  assert moved > 0.05, moved


def test_blocks_with_the_exact_gelu_fail_the_gates(
  monkeypatch, network, changed, logits
):
  call = MLP.__call__

  def exact(self, x):
    self.act = lambda x: jax.nn.gelu(x, approximate=False)
    return call(self, x)

  # The merger's is exact as it is.
  monkeypatch.setattr(MLP, "__call__", exact)
  assert np.abs(changed(network) - logits).max() > 2e-4


# -- other shapes ------------------------------------------------------------


@pytest.mark.parametrize(
  "changes",
  [
    {"taps": (1, 4), "tie_word_embeddings": True},
    {"taps": (3,), "head_dim": 16},
    {"taps": ()},
  ],
)
def test_other_taps_heads_and_a_tied_head_equal_transformers(
  changes, make_variant, assert_equal_logits
):
  variant = make_variant(**changes)
  assert ("lm_head" in variant.params) != bool(
    changes.get("tie_word_embeddings")
  )
  taps = changes["taps"]
  assert variant.network.config.vision_config.deepstack_visual_indexes == taps
  assert ("deepstack_merger_list" in variant.params["visual"]) == bool(taps)
  assert_equal_logits(variant)
