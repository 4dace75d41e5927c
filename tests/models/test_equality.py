"""Both families against transformers 5.23, end to end, and what shared parts do."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxvlm.models import pretrained
from jaxvlm.nn import rope, vision

# The pictures of four prompts; those without are text. Sizes in patches.
CASES = {
  "one picture": ([(4, 6)], [], [], []),
  "one in the last row": ([], [], [], [(6, 4)]),
  "several sizes in a prompt": ([], [(2, 2), (8, 6), (4, 10)], [], [(6, 6)]),
  "others in every row": ([(2, 4)], [(4, 4)], [(12, 8)], [(6, 10), (4, 2)]),
  "strips": ([(2, 40)], [(40, 2)], [(2, 2)], [(2, 2), (2, 30)]),
}


@pytest.fixture(params=CASES)
def case(request, make_question, layout):
  questions = []
  for i, sizes in enumerate(CASES[request.param]):
    ids = [[5 + i], *["image", [20 + i, 9]] * len(sizes), [30] * (i % 3)]
    grids = [(1, *size) for size in sizes]
    questions.append(make_question(ids, grids, layout, seed=i))
  return questions


def pictures(tokens, prompts):
  """[M D] in the order in which the prompts show them; `tokens` are [S M D]."""
  index = np.asarray(prompts.vision_index).reshape(len(tokens), -1)
  lane, column = np.nonzero(index >= 0)
  return np.asarray(tokens.astype(jnp.float32))[lane, index[lane, column]]


def all_pictures(features, prompts):
  """The visual tokens, then each level's."""
  levels = () if features.levels is None else tuple(features.levels)
  return [pictures(tokens, prompts) for tokens in (features.tokens, *levels)]


@torch.no_grad()
def hf_pictures(hf, inputs):
  pixels = inputs["pixel_values"].to(hf.dtype)
  output = hf.model.visual(pixels, inputs["image_grid_thw"])
  tokens = [output.pooler_output, *(getattr(output, "deepstack_features", ()))]
  return [x.float().numpy() for x in tokens]


@torch.no_grad()
def hf_logits(hf, inputs):
  seen = inputs["attention_mask"].bool()
  return hf(**inputs).logits.float()[seen].numpy()


def assert_close(got, expected, atol):
  np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


# -- equality ----------------------------------------------------------------


def test_visual_tokens_and_levels_equal_transformers(
  family, features, prompts, hf, hf_inputs
):
  got = all_pictures(features, prompts)
  assert len(got) == {"qwen2_5_vl": 1, "qwen3_vl": 4}[family]
  for ours, expected in zip(got, hf_pictures(hf, hf_inputs), strict=True):
    assert_close(ours, expected, 5e-5)


def test_logits_equal_transformers(logits, hf, hf_inputs):
  assert_close(logits, hf_logits(hf, hf_inputs), 2e-4)


def test_pictures_of_every_number_and_size_equal_transformers(
  case, run, network, params, prompts, layout, collate, hf, make_hf_inputs
):
  length, patches = prompts.prompt_ids.shape[1], prompts.vision.rows.shape[1]
  batch = collate(case, layout, prompt_length=length, patches=patches)
  inputs = make_hf_inputs(case, "right")
  expected, _ = hf.model.get_rope_index(
    inputs["input_ids"],
    mm_token_type_ids=inputs["mm_token_type_ids"],
    image_grid_thw=inputs["image_grid_thw"],
    attention_mask=inputs["attention_mask"],
  )
  positions = np.asarray(batch.position_ids)[:, :, : expected.shape[-1]]
  np.testing.assert_array_equal(positions, expected.numpy())

  features = run.see(network, params, batch.vision)
  got = all_pictures(features, batch)
  for ours, want in zip(got, hf_pictures(hf, inputs), strict=True):
    assert_close(ours, want, 5e-5)
  logits = run.reading(network, params, batch, features)
  assert_close(logits, hf_logits(hf, inputs), 2e-4)


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


def test_text_alone_equals_transformers(
  run, network, params, questions, collate, layout, hf
):
  batch = collate([questions[2]] * 2, layout)
  assert batch.vision is None
  ids = questions[2].prompt_ids
  with torch.no_grad():
    expected = hf(input_ids=torch.tensor(ids[None]).long()).logits[0].numpy()
  got = run.reading(network, params, batch, None)
  assert_close(got, np.tile(expected, (2, 1)), 2e-4)


def test_every_gradient_equals_torch(
  network, params, prompts, logits_of, hf, hf_inputs
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
    trees = jnp.where(prompts.prompt_mask, 0, -1)
    x, prompt_cache = network.read(params, embeds, prompts.position_ids, trees)
    last = jnp.sum(prompts.prompt_mask, axis=1) - 1
    hidden = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
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
        *(weights, ids, network.turns(position)),
        *(prompt_cache, prompts.prompt_mask, cache),
        jnp.broadcast_to(jnp.arange(new) <= column, (rows, new)),
        column,
      )
      return (choose(hidden), position + 1, cache), ids

    position = 1 + jnp.take_along_axis(
      prompts.position_ids, last[None, :, None], axis=2
    )
    state = (
      choose(jnp.repeat(hidden[:, None], group, axis=1)),
      position,
      network.init_cache(rows, group, new),
    )
    _, ids = jax.lax.scan(step, state, jnp.arange(new))
    return jnp.moveaxis(ids, 0, -1)

  got = np.asarray(generate(params, prompts))
  np.testing.assert_array_equal(got[:, 0], expected)
  np.testing.assert_array_equal(got[:, 1], expected)


def test_bfloat16_is_as_close_to_float32_as_transformers_is(
  run, network, params, prompts, features, logits, hf, hf_inputs
):
  """Half again its error at most: in the tower, its levels and the logits."""
  low = dataclasses.replace(network, dtype="bfloat16")
  seen = run.see(low, params, prompts.vision)
  assert seen.tokens.dtype == jnp.bfloat16
  got = all_pictures(seen, prompts)
  got.append(run.reading(low, params, prompts, seen))
  exact = [*all_pictures(features, prompts), logits]

  hf_low = copy.deepcopy(hf).to(torch.bfloat16)
  theirs = [*hf_pictures(hf_low, hf_inputs), hf_logits(hf_low, hf_inputs)]
  hf_exact = [*hf_pictures(hf, hf_inputs), hf_logits(hf, hf_inputs)]

  for a, b, c, d in zip(got, exact, theirs, hf_exact, strict=True):
    ours, allowed = np.linalg.norm(a - b), 1.5 * np.linalg.norm(c - d)
    assert 1e-4 * np.linalg.norm(b) < ours <= allowed
    assert ours <= 6e-2 * np.linalg.norm(b)


def test_a_bfloat16_towers_rotation_stays_in_float32(
  network, prompts, monkeypatch
):
  """As transformers' does; the decoder's is in the model's dtype."""
  dtypes, turns = [], rope.turns

  def noted(angles, dtype):
    dtypes.append(jnp.dtype(dtype))
    return turns(angles, dtype)

  monkeypatch.setattr(rope, "turns", noted)
  low = dataclasses.replace(network, dtype="bfloat16")
  jax.eval_shape(low.encode, low.shapes(), prompts.vision)
  assert dtypes == [jnp.float32]
  jax.eval_shape(low.turns, np.zeros((3, 2, 1), np.int32))
  assert dtypes[1:] == [jnp.bfloat16]


# -- static shapes -----------------------------------------------------------


def test_one_trace_serves_all_pictures_of_a_bucket(
  network, params, layout, logits_of, make_question, collate
):
  traces = []

  @jax.jit
  def count(params, prompts):
    traces.append(None)
    return logits_of(network, params, prompts)

  for seed, grids in enumerate(([(1, 4, 4)], [(1, 4, 6), (1, 2, 8)], [])):
    ids = [[5], *["image", [6]] * len(grids)]
    questions = [make_question(ids, grids, layout, seed)] * 2
    count(params, collate(questions, layout, prompt_length=24, patches=64))
  assert len(traces) == 1


def test_padding_changes_nothing(
  run, network, params, questions, collate, layout, logits
):
  wider = collate(questions, layout, prompt_length=96, patches=512)
  assert_close(run(network, params, wider), logits, 5e-5)


def test_lanes_change_nothing(
  run, network, params, questions, prompts, layout, logits, collate
):
  one = collate(questions, layout, lanes=1)
  assert_close(run(network, params, one), logits, 5e-5)


# -- each part is missed when it is taken away -------------------------------


def change_vision(prompts, **changes):
  vision = dataclasses.replace(prompts.vision, **changes)
  return dataclasses.replace(prompts, vision=vision)


def change_positions(prompts, axis, other):
  positions = prompts.position_ids
  positions = positions.at[axis].set(positions[other])
  return dataclasses.replace(prompts, position_ids=positions)


TAKEN = {
  "patch rows": lambda p: change_vision(p, rows=0 * p.vision.rows),
  "patch columns": lambda p: change_vision(p, cols=0 * p.vision.cols),
  "row before column": lambda p: change_vision(
    p, rows=p.vision.cols, cols=p.vision.rows
  ),
  "borders of pictures": lambda p: change_vision(
    p, full_segments=jnp.minimum(p.vision.full_segments, 0)
  ),
  "height positions": lambda p: change_positions(p, 1, 0),
  "width positions": lambda p: change_positions(p, 2, 0),
  "time positions": lambda p: change_positions(p, 0, 1),
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
  moved = np.abs(got - logits).max()
  assert moved > 0.05, moved


def test_a_merger_with_the_tanh_gelu_fails_the_gates(
  monkeypatch, network, changed, logits
):
  call = vision.PatchMerger.__call__

  def tanh(self, x):
    self.act = jax.nn.gelu
    return call(self, x)

  monkeypatch.setattr(vision.PatchMerger, "__call__", tanh)
  assert np.abs(changed(network) - logits).max() > 2e-4
