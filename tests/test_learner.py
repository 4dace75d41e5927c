"""The update against rows packed the naive way, by hand, and on meshes."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from jaxvlm import compiling, sharding
from jaxvlm import learner as learner_module
from jaxvlm.packing import Packed
from tests.learners import ADAMW, OBJECTIVE, RATE
from tests.naive import (
  Batch,
  Naive,
  assert_trees_close,
  experiences,
  flat,
  gradients,
  grpo_loss,
)

MUON = dataclasses.replace(ADAMW, name="muon")


def assert_same_bits(found, expected):
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def naive(network, layout, banned):
  return Naive(network, layout, banned)


@pytest.fixture(scope="module")
def learner(make_learner, mesh):
  return make_learner(mesh)


@pytest.fixture(scope="module")
def batch(rollout):
  """Old logprobs so far from the policy's that every clip is at work."""
  random = np.random.default_rng(2)
  noise = random.normal(size=(2, *rollout.sampler_logprobs.shape))
  old, ref = rollout.sampler_logprobs - noise * [[[[0.7]]], [[[0.5]]]]
  return Batch(
    advantages=random.normal(size=(8, 3)).astype(np.float32),
    old=old.astype(np.float32),
    ref=ref.astype(np.float32),
  )


@pytest.fixture(scope="module")
def make_packed(questions, rollout, layout):
  """The rollout in rows; in one row of a data shard unless asked otherwise."""

  def make(mesh, tokens=1024):
    return Packed(
      questions,
      rollout.completion_ids,
      rollout.completion_mask,
      tokens=tokens,
      mesh=mesh,
      layout=layout,
    )

  return make


@pytest.fixture(scope="module")
def make_experience(rollout, make_packed):
  """The microbatches of an update."""

  def make(mesh, batch, tokens=1024, change=lambda tree: tree):
    groups = np.stack([np.ones(8, bool), np.arange(8) < 3], axis=1)

    def changed(tree):
      return sharding.place(mesh, change(jax.tree.map(np.asarray, tree)))

    packed = make_packed(mesh, tokens)
    return experiences(packed, rollout, batch, groups, changed)

  return make


@pytest.fixture(scope="module")
def run(params, place_params, make_experience):
  """One update from `params`: (state, metrics), on the host."""

  def update(learner, mesh, batch, start=params, **changes):
    state = learner.init(place_params(start, mesh))
    state, metrics = learner.update(
      state, make_experience(mesh, batch, **changes), RATE
    )
    return jax.device_get(state), jax.device_get(metrics)

  return update


@pytest.fixture(scope="module")
def base(run, learner, mesh, batch):
  return run(learner, mesh, batch)


@pytest.fixture(scope="module")
def logprobs(learner, params, place_params, make_packed, mesh):
  return learner.logprobs([place_params(params, mesh)], make_packed(mesh))[0]


# -- packed rows are naive rows ------------------------------------------------


def test_packed_logprobs_equal_naive_rows(
  logprobs, naive, params, questions, rollout
):
  expected, _ = naive(params, questions, rollout, OBJECTIVE.temperature)
  assert rollout.completion_mask.sum(-1).min() < 3  # unlike lengths
  assert rollout.completion_mask.sum(-1).max() == 8
  np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_packed_loss_and_every_gradient_equal_naive_rows(
  base, naive, params, questions, rollout, batch
):
  state, metrics = base
  loss = grpo_loss(rollout, batch)
  logprobs, expected = naive(
    params, questions, rollout, OBJECTIVE.temperature, loss
  )
  total, count = metrics["loss"]
  np.testing.assert_allclose(total / count, loss(logprobs), rtol=1e-5)
  assert count == rollout.completion_mask.sum()
  assert all(np.abs(g).max() > 0 for g in expected.values())
  assert_trees_close(gradients(state, metrics), expected, 1e-5)
  for clip in ("clip_low", "clip_high", "clip_dual"):
    assert metrics[clip][0][0] > 0


def clip(**changes):
  bounds = dict(OBJECTIVE.surrogate) | changes
  return tuple(sorted(bounds.items()))


@pytest.mark.parametrize(
  "change",
  [
    {"kl_coef": 0.0},
    {"kl_estimator": "k2"},
    {"surrogate": clip(clip_dual=None)},
    {"surrogate": clip(clip_high=9.0)},
    {"aggregation": "sequence"},
    {"importance": "token_truncate"},
  ],
)
def test_each_term_of_the_loss_moves_the_gradient(
  base, naive, params, questions, rollout, batch, change
):
  loss = grpo_loss(rollout, batch, **change)
  _, without = naive(params, questions, rollout, OBJECTIVE.temperature, loss)
  name = "language_model/norm/weight"
  gap = np.abs(gradients(*base)[name] - without[name]).max()
  assert gap > 1e-3 * np.abs(without[name]).max()


def test_temperature_divides_the_logits(
  logprobs, naive, params, questions, rollout
):
  plain, _ = naive(params, questions, rollout, 1.0)
  assert np.abs(logprobs - plain).max() > 0.1


def test_the_samplers_logprobs_are_the_learners(logprobs, rollout):
  np.testing.assert_allclose(
    rollout.sampler_logprobs, logprobs, rtol=0, atol=1e-4
  )


# -- what must not matter ------------------------------------------------------


def pad(tree):
  """Wider rows and lanes than the ladder gives."""

  def wider(x, axis, fill=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, 8)
    return np.pad(x, widths, constant_values=fill)

  vision = dataclasses.replace(
    tree.vision,
    pixel_values=wider(tree.vision.pixel_values, 1),
    rows=wider(tree.vision.rows, 1),
    cols=wider(tree.vision.cols, 1),
    full_segments=wider(tree.vision.full_segments, 1, -1),
    window_segments=wider(tree.vision.window_segments, 1, -1),
  )
  return dataclasses.replace(
    tree,
    ids=wider(tree.ids, 1),
    position_ids=wider(tree.position_ids, 2),
    tree_ids=wider(tree.tree_ids, 1, -1),
    branch_ids=wider(tree.branch_ids, 1, -1),
    vision_index=wider(tree.vision_index, 1, -1),
    vision=vision,
    predictors=wider(tree.predictors, 1),
    targets=wider(tree.targets, 1),
  )


def assert_same_update(found, expected, params):
  """Gradients, metrics and parameters to rounding.

  The first step of a gradient g is g / |g|, so parameters are compared where
  g is not itself of the size of its rounding.
  """
  grads = gradients(*expected)
  assert_trees_close(gradients(*found), grads, 2e-5)
  assert found[1].keys() == expected[1].keys()
  for name, pair in expected[1].items():
    np.testing.assert_allclose(
      found[1][name], pair, rtol=1e-5, atol=1e-3, err_msg=name
    )
  start, moved = flat(params), flat(found[0].params)
  for path, x in flat(expected[0].params).items():
    sure = np.abs(grads[path]) > 1e-3 * np.abs(grads[path]).max()
    assert np.abs(x - start[path])[sure].min() > 0.5 * RATE, path
    np.testing.assert_allclose(
      moved[path][sure], x[sure], rtol=0, atol=0.02 * RATE, err_msg=path
    )


@pytest.mark.parametrize(("tokens", "count"), [(32, 6), (96, 3)])
def test_microbatches_padding_and_chunks_do_not_matter(
  run,
  make_learner,
  make_packed,
  mesh,
  batch,
  base,
  params,
  tokens,
  count,
  monkeypatch,
):
  shapes = collections.defaultdict(list)
  monkeypatch.setattr(compiling, "_shapes", shapes)
  assert len(make_packed(mesh, tokens)) == count
  objective = dataclasses.replace(OBJECTIVE, logprob_chunk=7)
  learner = make_learner(mesh, objective=objective)
  found = run(learner, mesh, batch, tokens=tokens, change=pad)
  assert_same_update(found, base, params)
  assert len(shapes["gradient"]) == 1  # the first microbatch's is the others'


def test_logprobs_come_back_in_the_questions_order(
  learner, params, place_params, make_packed, mesh, logprobs
):
  placed = place_params(params, mesh)
  packed = make_packed(mesh, tokens=96)
  assert (packed.plan.groups[..., 1] >= 0).any()
  for found in learner.logprobs([placed, placed], packed):
    np.testing.assert_allclose(found, logprobs, rtol=0, atol=1e-5)


def options(name, **bounds):
  return tuple(sorted({"name": name, **bounds}.items()))


# Each surrogate, aggregation, estimator of KL and kind of importance weight.
MODES = {
  "clip": {"aggregation": "sequence", "importance": "sequence_mask"},
  "gspo": {
    "surrogate": options("gspo", clip_low=0.1, clip_high=0.2),
    "aggregation": "sequence_sum",
    "kl_estimator": "k2",
  },
  "gspo_token": {
    "surrogate": options("gspo_token", clip_low=0.1, clip_high=0.2),
    "aggregation": "sequence",
    "kl_estimator": "k1",
  },
  "cispo": {
    "surrogate": options("cispo", weight_low=0.5, weight_high=1.5),
    "aggregation": "fixed",
    "importance": "token_truncate",
  },
  "sapo": {
    "surrogate": options("sapo", tau_positive=1.0, tau_negative=1.05),
    "importance": "sequence_truncate",
  },
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_naive_loss_on_padded_microbatches_of_a_mesh(
  run, make_learner, make_mesh, naive, params, questions, rollout, batch, mode
):
  objective = dataclasses.replace(OBJECTIVE, **MODES[mode])
  mesh = make_mesh(2, 2, 2)
  found = run(
    make_learner(mesh, objective=objective),
    mesh,
    batch,
    tokens=32,
    change=pad,
  )
  loss = grpo_loss(rollout, batch, **MODES[mode])
  logprobs, expected = naive(
    params, questions, rollout, OBJECTIVE.temperature, loss
  )
  total, count = found[1]["loss"]
  np.testing.assert_allclose(total / count, loss(logprobs), rtol=2e-5)
  assert_trees_close(gradients(*found), expected, 2e-5)


def test_the_entropy_bonus_raises_the_entropy(run, make_learner, mesh, batch):
  calm = dataclasses.replace(
    batch, advantages=0 * batch.advantages, old=None, ref=None
  )
  objective = dataclasses.replace(OBJECTIVE, entropy_coef=2.0)
  learner = make_learner(mesh, objective=objective)
  state, metrics = run(learner, mesh, calm)
  entropy, tokens = (x[0] for x in metrics["entropy"])
  np.testing.assert_allclose(metrics["loss"][0], -2 * entropy, rtol=1e-5)
  again = run(learner, mesh, calm, start=state.params)[1]["entropy"]
  assert again[0][0] / tokens > entropy / tokens + 0.01


def test_figures_are_kept_apart_by_group(base, batch, rollout, logprobs):
  """The second group of these tests is the first three questions."""
  own = np.where(rollout.completion_mask, batch.old - logprobs, 0)
  sums, counts = base[1]["approx_kl"]
  np.testing.assert_allclose(sums, [own.sum(), own[:3].sum()], rtol=1e-4)
  lengths = rollout.completion_mask.sum((1, 2))
  np.testing.assert_array_equal(counts, [lengths.sum(), lengths[:3].sum()])


def test_the_gradients_norm_is_said_of_each_part(base, network):
  grads = gradients(*base)
  squares = dict.fromkeys(("vision_tower", "merger", "decoder"), 0.0)
  for path, grad in grads.items():
    part = network.part_of(tuple(path.split("/")))
    squares[part] += np.square(grad, dtype=np.float64).sum()
  for part, square in squares.items():
    norm, count = base[1][f"grad_norm/{part}"]
    np.testing.assert_allclose(norm, np.sqrt(square), rtol=1e-4)
    assert count == 1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1)])
def test_the_mesh_does_not_matter(
  run, make_learner, make_mesh, batch, base, params, sizes
):
  mesh = make_mesh(*sizes)
  found = run(make_learner(mesh), mesh, batch)
  assert_same_update(found, base, params)


def test_the_optimizers_moments_lie_as_their_parameters(
  make_learner, make_mesh, params, place_params
):
  mesh = make_mesh(2, 2, 2)
  learner = make_learner(mesh)
  placed = place_params(params, mesh)
  state = learner.init(placed)
  weights = traverse_util.flatten_dict(placed, sep="/")
  assert any(not x.is_fully_replicated for x in weights.values())
  for moments in ("mu", "nu"):
    for path, x in optax.tree_utils.tree_get(
      state.opt_state["moments"], moments
    ).items():
      assert x.sharding == weights[path].sharding
  jax.tree.map(
    lambda a, b: (
      (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
      or pytest.fail(f"{a} is not {b}")
    ),
    learner.abstract(placed),
    state,
  )


# -- optimizers ----------------------------------------------------------------


def clipped(grads, limit=ADAMW.clip_norm):
  norm = np.sqrt(
    sum(np.square(g, dtype=np.float64).sum() for g in grads.values())
  )
  assert norm > limit
  return {path: g * (limit / norm) for path, g in grads.items()}


def test_adamw_makes_the_steps_that_are_made_by_hand(
  learner, mesh, batch, base, run, params, place_params, make_experience
):
  other = dataclasses.replace(batch, advantages=-batch.advantages)
  first = clipped(gradients(*base))
  state = learner.init(place_params(params, mesh))
  state, _ = learner.update(state, make_experience(mesh, batch), RATE)
  state, metrics = learner.update(state, make_experience(mesh, other), RATE / 2)
  second = clipped(gradients(state, metrics))
  after = flat(base[0].params)
  for path, x in flat(params).items():
    # The first step: both moments are those of one gradient.
    step = first[path] / (np.abs(first[path]) + 1e-8) + 0.01 * x
    np.testing.assert_allclose(after[path], x - RATE * step, atol=1e-6)
    nu = 0.9 * 0.1 * first[path] ** 2 + 0.1 * second[path] ** 2
    nu = np.sqrt(nu / (1 - 0.9**2))
    step = second[path] / (nu + 1e-8) + 0.01 * after[path]
    np.testing.assert_allclose(
      flat(state.params)[path], after[path] - RATE / 2 * step, atol=1e-6
    )


@pytest.fixture(scope="module")
def muon(run, make_learner, mesh, batch):
  """A rollout's only update, without reference, the merger frozen."""
  learner = make_learner(mesh, optimizer=MUON, frozen=("merger",))
  only = dataclasses.replace(batch, old=None, ref=None)
  return run(learner, mesh, only)


@pytest.fixture(scope="module")
def own(run, learner, mesh, batch, logprobs):
  """As `muon`'s, but with the policy's own logprobs as old and reference."""
  policy = dataclasses.replace(batch, old=logprobs, ref=logprobs)
  return run(learner, mesh, policy)


# One layer's matrix: path, index of the layer, rows.
MATRICES = {
  "q_proj": ("language_model/layers/self_attn/q_proj/kernel", (1,), 32),
  "o_proj": ("language_model/layers/self_attn/o_proj/kernel", (0,), 32),
  "gate_proj": ("language_model/layers/mlp/gate_proj/kernel", (1,), 32),
  "down_proj": ("language_model/layers/mlp/down_proj/kernel", (0,), 48),
  "tower's k": ("visual/blocks/attn/qkv/kernel", (1, slice(None), 1), 32),
  "patches": ("visual/patch_embed/proj/kernel", (), 1176),
}


@pytest.mark.parametrize("name", MATRICES)
def test_muon_takes_each_matrix_of_each_layer_on_its_own(
  muon, own, params, name
):
  path, at, rows = MATRICES[name]
  grads = gradients(*own)
  trained = {p: g for p, g in grads.items() if "merger" not in p}
  grad, start = clipped(trained)[path], flat(params)[path]
  grad, start = grad[at].reshape(rows, -1), start[at].reshape(rows, -1)
  alone = optax.contrib.muon(RATE, weight_decay=MUON.weight_decay)
  step, _ = alone.update({"w": grad}, alone.init({"w": start}), {"w": start})
  found = flat(muon[0].params)[path][at].reshape(rows, -1)
  np.testing.assert_allclose(
    found - start, step["w"], rtol=0, atol=1e-3 * np.abs(step["w"]).max()
  )


@pytest.mark.parametrize(
  "path",
  [
    "language_model/embed_tokens/embedding",
    "language_model/layers/self_attn/q_proj/bias",
    "language_model/layers/input_layernorm/weight",
    "visual/blocks/attn/qkv/bias",
  ],
)
def test_muon_leaves_embeddings_biases_and_norms_to_adamw(
  muon, own, params, path
):
  grads = gradients(*own)
  grad = clipped({p: g for p, g in grads.items() if "merger" not in p})[path]
  start = flat(params)[path]
  step = grad / (np.abs(grad) + 1e-8) + 0.01 * start
  # A bias of keys moves no softmax: its gradient is rounding, and so its step.
  sure = np.abs(grad) > 1e-3 * np.abs(grad).max()
  assert sure.mean() > 0.6
  np.testing.assert_allclose(
    flat(muon[0].params)[path][sure], (start - RATE * step)[sure], atol=2e-6
  )


@pytest.mark.parametrize("compensated", [False, True])
def test_a_thousand_small_sums_are_exact_where_the_lower_bits_are_kept(
  compensated,
):
  """Each is a millionth of the weight; bfloat16 holds 1/256 of it."""
  start = jnp.array([1.0, -3.0, 0.01, 0.0], jnp.bfloat16)
  step = -1e-6 * start.astype(jnp.float32)

  @jax.jit
  def move(high, low):
    if not compensated:
      return (high + step).astype(high.dtype), low
    return learner_module._split(learner_module._join(high, low) + step)

  master, weights = start.astype(jnp.float32), (start, jnp.zeros(4, jnp.int16))
  for _ in range(1000):
    master, weights = master + step, move(*weights)
  if compensated:
    np.testing.assert_array_equal(learner_module._join(*weights), master)
    np.testing.assert_allclose(
      master, 0.999 * start.astype(jnp.float32), rtol=5e-5
    )
  else:
    np.testing.assert_array_equal(weights[0], start)


@pytest.fixture(scope="module")
def half(params):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def test_a_thousand_small_updates_arrive_where_the_lower_bits_are_kept(
  make_learner, mesh, half, place_params
):
  """Of 1e-6 each: the sums are those of float32 weights."""

  def moved(start, compensated):
    optimizer = dataclasses.replace(ADAMW, compensated=compensated)
    learner = make_learner(mesh, optimizer=optimizer)
    state = learner.init(place_params(start, mesh))
    ones = jax.tree.map(
      jnp.ones_like, learner_module.zeros(learner.program, state.params)
    )

    def move(_, state):
      return learner_module.apply(
        learner.program, state, ones, jnp.float32(1), jnp.float32(1e-6)
      )[0]

    state = jax.jit(functools.partial(jax.lax.fori_loop, 0, 1000, move))(state)
    return flat(state.params), state.opt_state["lower"]

  exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  master, _ = moved(exact, compensated=False)
  kept, lower = moved(half, compensated=True)
  rounded, _ = moved(half, compensated=False)
  before = flat(half)
  for path, arrived in master.items():
    # Not bit for bit: another program may fuse p + rate * step otherwise.
    joined = learner_module._join(kept[path], lower[path])
    np.testing.assert_allclose(joined, arrived, rtol=1e-6, atol=1e-9)
    start = before[path].astype(np.float32)
    assert (arrived < start - 8e-4).all(), path
    large = np.abs(start) > 1e-3
    np.testing.assert_array_equal(rounded[path][large], before[path][large])


def test_gradients_are_summed_in_float32_whatever_the_weights_are(
  make_learner, mesh, half, place_params, make_experience, batch
):
  """What is added to 1 + 2**-12 is what is added to 0."""
  learner = make_learner(mesh)
  params = place_params(half, mesh)
  micro = next(iter(make_experience(mesh, batch)))

  def add(start):
    total = jax.tree.map(
      lambda x: x + start, learner_module.zeros(learner.program, params)
    )
    return learner_module.add_gradient(
      learner.program, total, params, learner._banned, micro
    )[0]

  alone, beside = flat(add(0.0)), flat(add(1 + 2**-12))
  assert max(np.abs(x).max() for x in alone.values()) > 1e-3
  for path, found in beside.items():
    assert found.dtype == np.float32
    # Of the sum float32 keeps 24 bits.
    bound = 2**-22 * (1 + np.abs(alone[path]))
    assert (np.abs(found - (1 + 2**-12) - alone[path]) <= bound).all(), path


def test_a_float_is_its_nearest_bfloat16_and_the_bits_that_this_lacks():
  random = np.random.default_rng(0)
  bits = random.integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
  bits = np.concatenate([bits, np.uint32([0, 1 << 31, 0x3F808000, 0x3F817FFF])])
  values = bits.view(np.float32)
  values = values[np.isfinite(values) & (np.abs(values) < 1e38)]
  high, low = learner_module._split(jnp.asarray(values))
  np.testing.assert_array_equal(
    np.asarray(learner_module._join(high, low)).view(np.uint32),
    values.view(np.uint32),
  )
  nearest = np.float32(jnp.asarray(values).astype(jnp.bfloat16))
  normal = np.abs(values) > 1e-30
  gap = np.abs(np.float32(high) - values)[normal]
  assert (gap <= np.abs(nearest - values)[normal]).all()


@pytest.mark.parametrize("compensated", [False, True])
def test_an_update_keeps_the_dtypes_of_its_state(
  make_learner, mesh, half, place_params, make_experience, batch, compensated
):
  """Moments are float32 whatever the weights are."""
  optimizer = dataclasses.replace(ADAMW, compensated=compensated)
  learner = make_learner(mesh, optimizer=optimizer)
  state = learner.init(place_params(half, mesh))
  before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  state, _ = learner.update(state, make_experience(mesh, batch), RATE)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
  moments = optax.tree_utils.tree_get(state.opt_state["moments"], "nu")
  assert {x.dtype for x in moments.values()} == {jnp.dtype("float32")}
  assert (state.opt_state["lower"] is not None) == compensated


def test_an_unknown_optimizer_is_named():
  with pytest.raises(ValueError, match="got 'sgd'; there are adamw, muon"):
    dataclasses.replace(ADAMW, name="sgd").make({})


# -- a rollout's only update ---------------------------------------------------


def test_without_old_logprobs_the_update_starts_from_its_own(muon, own):
  for name in ("loss", "sampler_gap", "approx_kl", "entropy"):
    np.testing.assert_allclose(
      muon[1][name], own[1][name], rtol=1e-5, atol=1e-4
    )
  for metrics in (muon[1], own[1]):
    np.testing.assert_allclose(metrics["approx_kl"][0], 0, atol=1e-3)
  total, count = (x[0] for x in muon[1]["sampler_gap"])
  assert 0 < total / count < 1e-4


def test_the_reference_is_what_the_kl_is_measured_from(base, muon, own):
  assert "kl" not in muon[1]
  assert own[1]["kl"][0] == pytest.approx([0, 0], abs=1e-6)
  assert (base[1]["kl"][0] / base[1]["kl"][1] > 0.05).all()


# -- SFT and frozen parts ------------------------------------------------------


@pytest.fixture(scope="module")
def sft(run, make_learner, mesh, batch):
  """Its advantages are to mean nothing."""
  learner = make_learner(
    mesh,
    objective=dataclasses.replace(OBJECTIVE, kind="sft"),
    frozen=("vision_tower",),
  )
  junk = dataclasses.replace(batch, old=None, ref=None)
  return run(learner, mesh, junk)


def test_the_sft_gradient_is_that_of_cross_entropy(
  sft, naive, params, questions, rollout
):
  mask = jnp.asarray(rollout.completion_mask)

  def cross_entropy(logprobs):
    return -jnp.where(mask, logprobs, 0.0).sum() / mask.sum()

  logprobs, expected = naive(
    params, questions, rollout, OBJECTIVE.temperature, cross_entropy
  )
  total, count = sft[1]["loss"]
  np.testing.assert_allclose(total / count, cross_entropy(logprobs), rtol=1e-5)
  found = gradients(*sft)
  expected = {path: g for path, g in expected.items() if path in found}
  assert_trees_close(found, expected, 1e-5)


@pytest.mark.parametrize(
  ("which", "frozen"), [("sft", "vision_tower"), ("muon", "merger")]
)
def test_a_frozen_part_keeps_its_bits_and_the_others_move(
  request, network, params, which, frozen
):
  state, _ = request.getfixturevalue(which)
  start, found = flat(params), flat(state.params)
  moments = optax.tree_utils.tree_get_all_with_path(
    state.opt_state["moments"], "nu"
  )
  named = {path for _, value in moments for path in value}
  assert found.keys() == start.keys()
  for path, x in start.items():
    if network.part_of(tuple(path.split("/"))) == frozen:
      assert_same_bits(found[path], x)
      assert path not in named
    else:
      assert np.abs(found[path] - x).max() > 0.1 * RATE, path


def test_a_frozen_decoder_keeps_its_bits_and_sees_to_the_tower(
  make_learner, mesh, params, place_params, make_experience, batch, network
):
  learner = make_learner(mesh, frozen=("decoder", "merger"))
  state = learner.init(place_params(params, mesh))
  moments = optax.tree_utils.tree_get(state.opt_state["moments"], "mu")
  parts = {network.part_of(tuple(path.split("/"))) for path in moments}
  assert parts == {"vision_tower"}


@pytest.mark.parametrize(
  "frozen", [("tower",), ("vision_tower", "merger", "decoder")]
)
def test_an_unknown_part_or_all_of_them_is_refused(make_learner, mesh, frozen):
  with pytest.raises(ValueError, match=r"freeze: got .*name some of .*not all"):
    make_learner(mesh, frozen=frozen)


# -- the other family ----------------------------------------------------------

qwen3_vl = pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)


@pytest.fixture(scope="module")
def naive_grpo(naive, params, questions, rollout, batch):
  """Logprobs and every gradient of the loss, by naive rows."""
  loss = grpo_loss(rollout, batch)
  return naive(params, questions, rollout, OBJECTIVE.temperature, loss)


@qwen3_vl
def test_qwen3_samples_what_naive_rows_score(naive_grpo, rollout):
  assert rollout.completion_mask.sum(-1).min() < 3  # unlike lengths
  np.testing.assert_allclose(
    rollout.sampler_logprobs, naive_grpo[0], rtol=0, atol=1e-4
  )


@qwen3_vl
@pytest.mark.parametrize(
  "frozen", [("merger",), ("vision_tower", "decoder")], ids="-".join
)
def test_qwen3_parts_learn_as_naive_rows_do_or_keep_their_bits(
  run, make_learner, mesh, batch, params, network, naive_grpo, frozen
):
  state, metrics = run(make_learner(mesh, frozen=frozen), mesh, batch)
  part = {
    path: network.part_of(tuple(path.split("/"))) for path in flat(params)
  }
  assert set(part.values()) == {"vision_tower", "merger", "decoder"}
  assert part["visual/deepstack_merger_list/norm/weight"] == "merger"

  expected = {p: g for p, g in naive_grpo[1].items() if part[p] not in frozen}
  assert all(np.abs(g).max() > 0 for g in expected.values())
  assert_trees_close(gradients(state, metrics), expected, 1e-5)

  found = flat(state.params)
  for path, x in flat(params).items():
    if part[path] in frozen:
      assert_same_bits(found[path], x)
    else:
      assert np.abs(found[path] - x).max() > 0.1 * RATE, path


# -- a gradient that is not finite ---------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(
  learner, mesh, batch, base, params, place_params, make_experience, value
):
  advantages = batch.advantages.copy()
  advantages[4, 1] = value
  bad = make_experience(mesh, dataclasses.replace(batch, advantages=advantages))
  state = learner.init(place_params(params, mesh))
  before = jax.device_get(state)
  state, metrics = learner.update(state, bad, RATE)
  assert_same_bits(jax.device_get(state), before)
  assert metrics["update_skipped"] == (1, 1)
  assert not np.isfinite(metrics["grad_norm"][0])
  # The next batch is learned from as if nothing had been.
  state, metrics = learner.update(state, make_experience(mesh, batch), RATE)
  assert_same_bits(jax.device_get(state), base[0])
  assert metrics["update_skipped"] == (0, 1)
