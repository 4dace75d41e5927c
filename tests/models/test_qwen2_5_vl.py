"""What only Qwen2.5-VL has, taken away."""

import dataclasses

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)


def change_vision(prompts, **changes):
  vision = dataclasses.replace(prompts.vision, **changes)
  return dataclasses.replace(prompts, vision=vision)


TAKEN = {
  "windows": lambda p: change_vision(p, window_segments=p.vision.full_segments),
  "full blocks": lambda p: change_vision(
    p, full_segments=p.vision.window_segments
  ),
}


@pytest.mark.parametrize("part", TAKEN)
def test_logits_move_without(part, run, network, params, prompts, logits):
  moved = np.abs(run(network, params, TAKEN[part](prompts)) - logits).max()
  assert moved > 0.05, moved


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_logits_move_without_the_bias_of(
  name, run, network, params, prompts, logits
):
  without = jax.tree.map(lambda x: x, params)  # new dicts, same leaves
  attention = without["language_model"]["layers"]["self_attn"]
  attention[name]["bias"] = 0 * attention[name]["bias"]
  moved = np.abs(run(network, without, prompts) - logits).max()
  assert moved > 0.02, moved


def test_a_tied_model_equals_transformers(make_variant, assert_equal_logits):
  variant = make_variant(tie_word_embeddings=True)
  assert "lm_head" not in variant.params
  assert_equal_logits(variant)
