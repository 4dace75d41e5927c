"""Qwen2.5-VL against transformers 5.23, end to end, and what each part does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxvlm.data import vision_layout
from jaxvlm.models import Network, pretrained, qwen2_5_vl


def logits_of(network, params, prompts):
  features = network.encode(params, prompts.vision)
  embeds = network.embed(
    params, prompts.prompt_ids, prompts.vision_index, features
  )
  branch_ids = jnp.where(prompts.prompt_mask, 0, -1)
  hidden = network.forward(params, embeds, prompts.position_ids, branch_ids)
  return jnp.einsum("qtd,dv->qtv", hidden, network.head(params))


@pytest.fixture(scope="module")
def run():
  return jax.jit(logits_of, static_argnums=0)


@pytest.fixture(scope="module")
def logits(run, network, params, prompts):
  return np.asarray(run(network, params, prompts))


@pytest.fixture(scope="module")
def mask(prompts):
  return np.asarray(prompts.prompt_mask)


def real(logits, prompts):
  return np.asarray(logits)[np.asarray(prompts.prompt_mask)]


# -- equality with transformers ----------------------------------------------


def test_merged_visual_tokens_equal_transformers(
  network, params, prompts, hf, hf_inputs
):
  with torch.no_grad():
    expected = hf.model.visual(
      hf_inputs["pixel_values"], hf_inputs["image_grid_thw"]
    ).pooler_output.numpy()
  features = np.asarray(jax.jit(network.encode)(params, prompts.vision).tokens)
  real_patches = np.asarray(prompts.vision.full_segments) >= 0
  got = features[real_patches[:, ::4]]
  np.testing.assert_allclose(got, expected, atol=5e-5, rtol=0)


def test_positions_equal_transformers(prompts, hf, hf_inputs):
  expected, _ = hf.model.get_rope_index(
    hf_inputs["input_ids"],
    mm_token_type_ids=hf_inputs["mm_token_type_ids"],
    image_grid_thw=hf_inputs["image_grid_thw"],
    attention_mask=hf_inputs["attention_mask"],
  )
  length = expected.shape[-1]
  np.testing.assert_array_equal(
    np.asarray(prompts.position_ids)[:, :, :length], expected.numpy()
  )


def test_logits_equal_transformers(logits, mask, hf, hf_inputs):
  with torch.no_grad():
    expected = hf(**hf_inputs).logits.numpy()
  length = expected.shape[1]
  seen = mask[:, :length]
  np.testing.assert_allclose(
    logits[:, :length][seen], expected[seen], atol=2e-4, rtol=0
  )


def test_every_gradient_equals_torch(
  network, params, prompts, config, hf, hf_inputs
):
  labels = hf_inputs["input_ids"]
  seen = hf_inputs["attention_mask"][:, 1:].bool()

  hf.zero_grad()
  output = hf(**hf_inputs).logits[:, :-1].log_softmax(-1)
  chosen = output.gather(-1, labels[:, 1:, None])[..., 0]
  chosen[seen].sum().backward()
  expected = {
    pretrained._to_ours(name): weight.grad.numpy()
    for name, weight in hf.named_parameters()
  }

  @jax.jit
  @jax.grad
  def gradient(params, prompts):
    logits = logits_of(network, params, prompts)[:, :-1]
    logprobs = jax.nn.log_softmax(logits)
    targets = prompts.prompt_ids[:, 1:, None]
    chosen = jnp.take_along_axis(logprobs, targets, axis=-1)[..., 0]
    return jnp.sum(jnp.where(prompts.prompt_mask[:, 1:], chosen, 0.0))

  got = gradient(params, prompts)
  compared = set()
  for weight in pretrained.weights(network):
    leaf = got
    for key in weight.path:
      leaf = leaf[key]
    for name, tensor in weight.to_hf(np.asarray(leaf)):
      error = np.linalg.norm(tensor - expected[name])
      assert error <= 1e-3 * np.linalg.norm(expected[name]), name
      assert np.linalg.norm(expected[name]) > 0, name
      compared.add(name)
  assert compared == set(expected)


def test_greedy_tokens_equal_generate(
  network, params, questions, prompts, hf, make_hf_inputs
):
  new = 12
  inputs = make_hf_inputs(questions, "left")
  with torch.no_grad():
    expected = hf.generate(
      **inputs,
      max_new_tokens=new,
      min_new_tokens=new,
      do_sample=False,
      pad_token_id=0,
    )[:, inputs["input_ids"].shape[1] :].numpy()

  @jax.jit
  def generate(params, prompts):
    features = network.encode(params, prompts.vision)
    embeds = network.embed(
      params, prompts.prompt_ids, prompts.vision_index, features
    )
    hidden, prompt_cache = network.prefill(
      params, embeds, prompts.position_ids, prompts.prompt_mask
    )
    weights, head = network.unstack(params), network.head(params)
    rows, group = len(questions), 2
    # min_new_tokens bans EOS (2) in transformers.
    banned = jnp.arange(head.shape[1]) == 2

    def choose(hidden):
      logits = jnp.einsum("qgd,dv->qgv", hidden, head)
      return jnp.argmax(jnp.where(banned[None, None], -1e9, logits), -1)

    def step(state, column):
      ids, position, cache = state
      hidden, cache = network.decode(
        weights, ids, position, prompt_cache, prompts.prompt_mask, cache, column
      )
      return (choose(hidden), position + 1, cache), ids

    last = jnp.sum(prompts.prompt_mask, axis=1) - 1
    position = 1 + jnp.take_along_axis(
      prompts.position_ids, last[None, :, None], axis=2
    )
    state = (
      choose(jnp.repeat(hidden[:, None], group, axis=1)),
      jnp.repeat(position, group, axis=2),
      network.init_cache(rows, group, new),
    )
    _, ids = jax.lax.scan(step, state, jnp.arange(new))
    return jnp.moveaxis(ids, 0, -1)

  got = np.asarray(generate(params, prompts))
  np.testing.assert_array_equal(got[:, 0], expected)
  np.testing.assert_array_equal(got[:, 1], expected)


def test_text_alone_equals_transformers(network, params, questions, hf):
  ids = questions[2].prompt_ids[None]
  with torch.no_grad():
    expected = hf(input_ids=torch.tensor(ids).long()).logits.numpy()
  embeds = network.embed(params, ids, np.full_like(ids, -1), None)
  hidden = network.forward(
    params, embeds, questions[2].position_ids[:, None], np.zeros_like(ids)
  )
  got = jnp.einsum("qtd,dv->qtv", hidden, network.head(params))
  np.testing.assert_allclose(got, expected, atol=2e-4, rtol=0)


def test_bfloat16_stays_close_to_float32(run, network, params, prompts, logits):
  low = dataclasses.replace(network, dtype="bfloat16")
  got = real(run(low, params, prompts), prompts).astype(np.float32)
  expected = real(logits, prompts)
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert 1e-4 < error < 6e-2


# -- static shapes -----------------------------------------------------------


def test_one_trace_serves_all_pictures_of_a_bucket(
  network, params, layout, make_question
):
  traces = []

  @jax.jit
  def count(params, prompts):
    traces.append(None)
    return logits_of(network, params, prompts)

  for seed, grids in enumerate(([(1, 4, 4)], [(1, 4, 6), (1, 2, 8)], [])):
    ids = [[5], *["image", [6]] * len(grids)]
    prompts = vision_layout.collate(
      [make_question(ids, grids, layout, seed)],
      lanes=1,
      layout=layout,
      prompt_length=24,
      patches=64,
    )
    count(params, prompts)
  assert len(traces) == 1


def test_padding_changes_nothing(
  run, network, params, questions, prompts, layout, logits
):
  wider = vision_layout.collate(
    questions, lanes=2, layout=layout, prompt_length=96, patches=512
  )
  np.testing.assert_allclose(
    real(run(network, params, wider), wider),
    real(logits, prompts),
    atol=5e-5,
    rtol=0,
  )


def test_lanes_change_nothing(
  run, network, params, questions, prompts, layout, logits
):
  one = vision_layout.collate(questions, lanes=1, layout=layout)
  np.testing.assert_allclose(
    real(run(network, params, one), one),
    real(logits, prompts),
    atol=5e-5,
    rtol=0,
  )


# -- each part is missed when it is taken away -------------------------------


def change_vision(prompts, **changes):
  vision = dataclasses.replace(prompts.vision, **changes)
  return dataclasses.replace(prompts, vision=vision)


TAKEN = {
  "windows": lambda p: change_vision(p, window_segments=p.vision.full_segments),
  "full blocks": lambda p: change_vision(
    p, full_segments=p.vision.window_segments
  ),
  "patch rows": lambda p: change_vision(p, rows=0 * p.vision.rows),
  "patch columns": lambda p: change_vision(p, cols=0 * p.vision.cols),
  "row before column": lambda p: change_vision(
    p, rows=p.vision.cols, cols=p.vision.rows
  ),
  "borders of pictures": lambda p: change_vision(
    p, full_segments=jnp.minimum(p.vision.full_segments, 0)
  ),
  "height positions": lambda p: dataclasses.replace(
    p, position_ids=p.position_ids.at[1].set(p.position_ids[0])
  ),
  "width positions": lambda p: dataclasses.replace(
    p, position_ids=p.position_ids.at[2].set(p.position_ids[0])
  ),
  "time positions": lambda p: dataclasses.replace(
    p, position_ids=p.position_ids.at[0].set(p.position_ids[1])
  ),
  "the second picture": lambda p: change_vision(
    p,
    pixel_values=jnp.where(
      (p.vision.full_segments == 1)[:, :, None], 0, p.vision.pixel_values
    ),
  ),
  "visual tokens": lambda p: dataclasses.replace(
    p, vision_index=jnp.full_like(p.vision_index, -1)
  ),
}


@pytest.mark.parametrize("part", TAKEN)
def test_logits_move_without(part, run, network, params, prompts, logits):
  got = run(network, params, TAKEN[part](prompts))
  moved = np.abs(real(got, prompts) - real(logits, prompts)).max()
  assert moved > 0.05, moved


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_logits_move_without_the_bias_of(
  name, run, network, params, prompts, logits
):
  without = jax.tree.map(lambda x: x, params)  # new dicts, same leaves
  attention = without["language_model"]["layers"]["self_attn"]
  attention[name]["bias"] = 0 * attention[name]["bias"]
  moved = np.abs(
    real(run(network, without, prompts), prompts) - real(logits, prompts)
  ).max()
  assert moved > 0.02, moved


def test_a_merger_with_the_tanh_gelu_fails_the_gate(
  monkeypatch, network, params, prompts
):
  expected = network.encode(params, prompts.vision).tokens
  gelu = jax.nn.gelu
  monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x))
  got = network.encode(params, prompts.vision).tokens
  assert jnp.abs(got - expected).max() > 5e-5


# -- config ------------------------------------------------------------------

PUBLISHED_3B = {
  "model_type": "qwen2_5_vl",
  "hidden_size": 2048,
  "intermediate_size": 11008,
  "max_position_embeddings": 128000,
  "num_attention_heads": 16,
  "num_hidden_layers": 36,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
  "hidden_act": "silu",
  "vision_config": {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
  },
}


def test_a_flat_published_config_is_read():
  config = qwen2_5_vl.Config.from_hf(PUBLISHED_3B)
  assert config.tie_word_embeddings
  assert config.text_config.head_dim == 128
  assert config.text_config.mrope_section == (16, 24, 24)
  assert config.text_config.rope_theta == 1e6
  assert config.vision_config.rope_theta == 1e4
  assert config.image_token_id == 151655


def test_the_published_size_has_the_published_number_of_parameters():
  network = Network(
    config=qwen2_5_vl.Config.from_hf(PUBLISHED_3B),
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="full",
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(network.shapes()))
  assert count == 3_754_622_976


def test_a_written_config_reads_back_equal(config):
  read = qwen2_5_vl.Config.from_hf(config.to_dict())
  assert qwen2_5_vl.Config.from_hf(read.to_hf()) == read


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "llava"}, "llava"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"rope_scaling": {"mrope_section": [1, 2, 3]}}, "mrope_section"),
    ({"vision_config": {}}, "depth"),
  ],
)
def test_a_config_that_is_not_built_here_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    qwen2_5_vl.Config.from_hf({**PUBLISHED_3B, **changes})
