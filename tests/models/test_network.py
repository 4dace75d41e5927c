"""The tree forward, decoding, and what a network says of its weights."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm import sharding
from jaxvlm.models import choose_attention, find_family, load_params
from jaxvlm.nn import fused_attention
from jaxvlm.types import Features
from tests import dense

# What only one of the families can show.
qwen2_5_vl = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)

GROUP = 3
LENGTHS = [[4, 1, 6], [2, 5, 3], [1, 2, 2], [6, 6, 1]]  # of completions


@pytest.fixture(scope="module")
def completions():
  random = np.random.default_rng(0)
  return [[random.integers(1, 150, n) for n in row] for row in LENGTHS]


def naive_rows(questions, completions, prompts):
  """[Q G P + C] rows, each a prompt and one completion, right-padded."""
  longest = max(max(row) for row in LENGTHS)
  width = prompts.prompt_ids.shape[1] + longest
  shape = (len(questions), GROUP, width)
  ids, positions = np.zeros(shape, int), np.zeros((3, *shape), int)
  seen, index = np.full(shape, -1), np.full(shape, -1)
  for q, question in enumerate(questions):
    for g, completion in enumerate(completions[q]):
      p, n = len(question.prompt_ids), len(completion)
      ids[q, g, : p + n] = [*question.prompt_ids, *completion]
      positions[:, q, g, :p] = question.position_ids
      start = question.position_ids[0, -1] + 1
      positions[:, q, g, p : p + n] = start + np.arange(n)
      seen[q, g, : p + n] = 0
      index[q, g, :p] = prompts.vision_index[q, :p]
  return ids, positions, seen, index


def tree_rows(questions, completions, prompts):
  """The same as packed rows, and where each naive column went."""
  lengths = [
    len(question.prompt_ids) + sum(len(c) for c in row)
    for question, row in zip(questions, completions, strict=True)
  ]
  shape = (len(questions), max(lengths) + 3)
  ids, positions = np.zeros(shape, int), np.zeros((3, *shape), int)
  branches, index = np.full(shape, -1), np.full(shape, -1)
  columns = {}
  for q, question in enumerate(questions):
    p = column = len(question.prompt_ids)
    ids[q, :p], positions[:, q, :p] = question.prompt_ids, question.position_ids
    branches[q, :p], index[q, :p] = 0, prompts.vision_index[q, :p]
    for g, completion in enumerate(completions[q]):
      n = len(completion)
      here = slice(column, column + n)
      ids[q, here], branches[q, here] = completion, g + 1
      positions[:, q, here] = question.position_ids[0, -1] + 1 + np.arange(n)
      columns[q, g] = [*range(p), *range(column, column + n)]
      column += n
  return ids, positions, branches, index, columns


@pytest.fixture(scope="module")
def both(network, questions, completions, prompts):
  """The same scalar of the two forms, as functions of the parameters."""
  ids, positions, seen, index = naive_rows(questions, completions, prompts)
  flat = (-1, ids.shape[-1])
  t_ids, t_positions, branches, t_index, columns = tree_rows(
    questions, completions, prompts
  )
  random = np.random.default_rng(1)
  # Random weights of the hidden states; a prompt counts once per completion.
  weight = random.normal(size=(*ids.shape, 64)).astype(np.float32)
  weight[seen < 0] = 0
  t_weight = np.zeros((*t_ids.shape, 64), np.float32)
  for (q, g), where in columns.items():
    np.add.at(t_weight[q], where, weight[q, g, : len(where)])

  def hidden(network, params, vision, ids, positions, branches, index):
    features = network.encode(params, vision)
    embeds = network.embed(params, ids, index, features)
    trees = np.minimum(branches, 0)
    return network.forward(params, embeds, positions, trees, branches)

  def naive(params, vision):
    x = hidden(
      network,
      params,
      vision,
      ids.reshape(flat),
      positions.reshape(3, *flat),
      seen.reshape(flat),
      index.reshape(flat),
    )
    return jnp.sum(x * weight.reshape(x.shape)), x.reshape(*ids.shape, -1)

  def tree(params, vision):
    x = hidden(
      dataclasses.replace(network, remat="full"),
      params,
      vision,
      t_ids,
      t_positions,
      branches,
      t_index,
    )
    return jnp.sum(x * t_weight), x

  return naive, tree, columns


def test_tree_rows_with_remat_equal_naive_rows_in_values_and_gradients(
  both, params, prompts
):
  naive, tree, columns = both

  def run(f):
    gradient = jax.jit(jax.value_and_grad(f, has_aux=True))
    return gradient(params, prompts.vision)

  (_, expected), expected_gradient = run(naive)
  (_, got), gradient = run(tree)
  for (q, g), where in columns.items():
    np.testing.assert_allclose(
      got[q, np.array(where)], expected[q, g, : len(where)], atol=1e-5, rtol=0
    )

  def close(got, expected):
    # The head takes no part: 0 <= 0.
    got, expected = np.asarray(got), np.asarray(expected)
    error = np.linalg.norm(got - expected)
    assert error <= 1e-5 * np.linalg.norm(expected), error

  jax.tree.map(close, gradient, expected_gradient)


def test_fused_attention_is_that_of_tower_and_decoder(
  network, params, prompts, monkeypatch
):
  """The TPU's kernels, interpreted."""
  called = set()

  def attend(query, *args, **kwargs):
    called.add(query.shape)
    return interpreted(query, *args, **kwargs)

  interpreted = functools.partial(
    fused_attention.attend, backend="tpu", interpret=True
  )
  monkeypatch.setattr(fused_attention, "attend", attend)
  monkeypatch.setattr(fused_attention, "BACKENDS", ("cpu",))
  ids, index = prompts.prompt_ids, prompts.vision_index
  row = np.where(prompts.prompt_mask, 0, -1)

  @functools.partial(jax.jit, static_argnums=0)
  def run(network, params):
    features = network.encode(params, prompts.vision)
    embeds = network.embed(params, ids, index, features)
    return network.forward(params, embeds, prompts.position_ids, row, row)

  expected = run(network, params)
  assert not called
  got = run(dataclasses.replace(network, attention="fused"), params)
  assert {shape[1] for shape in called} == {
    ids.shape[1],
    prompts.vision.rows.shape[1],
  }
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@qwen2_5_vl
def test_a_completion_never_sees_its_sibling(
  network, params, questions, completions, prompts
):
  ids, positions, branches, _, _ = tree_rows(questions, completions, prompts)
  run = jax.jit(network.forward)
  none = np.full_like(ids, -1)
  trees = np.minimum(branches, 0)
  before = run(
    params, network.embed(params, ids, none, None), positions, trees, branches
  )
  changed = ids.copy()
  changed[branches == 1] += 1
  after = run(
    *(params, network.embed(params, changed, none, None)),
    *(positions, trees, branches),
  )
  moved = np.asarray(jnp.abs(after - before).max(-1))
  assert (moved[branches == 1] > 1e-3).all()
  assert moved[(branches != 1) & (branches >= 0)].max() == 0


# Blocks of the tower and layers of the decoder; DeepStack's mergers.
def read(network, prompts, params):
  """Tower, embedding and decoder, one after the other."""
  features = network.encode(params, prompts.vision)
  ids = prompts.prompt_ids
  embeds = network.embed(params, ids, prompts.vision_index, features)
  return network.forward(params, embeds, prompts.position_ids, ids, ids)


@pytest.mark.parametrize(
  ("family", "remat", "times"),
  [
    ("qwen2_5_vl", "none", 0),
    ("qwen2_5_vl", "full", 2),
    ("qwen3_vl", "full", 3),
  ],
  indirect=["family"],
)
def test_full_remat_wraps_the_layers_of_tower_and_decoder(
  network, params, prompts, remat, times
):
  network = dataclasses.replace(network, remat=remat)

  run = functools.partial(read, network, prompts)
  assert str(jax.make_jaxpr(run)(params)).count("prevent_cse=") == times


def test_remat_of_dots_does_not_attend_again(network, params, prompts):
  """Attention's forward pass alone seeks maxima."""

  def maxima(remat):
    remade = dataclasses.replace(network, remat=remat)

    def loss(params):
      return jnp.sum(read(remade, prompts, params))

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    return text.count("applies stablehlo.maximum")

  assert 0 < maxima("none") == maxima("dots") < maxima("full")


def test_decoding_equals_the_forward_pass(
  network, params, questions, completions, prompts
):
  ids, positions, branches, index, columns = tree_rows(
    questions, completions, prompts
  )
  length = max(max(row) for row in LENGTHS)
  fed = np.zeros((len(questions), GROUP, length), int)
  for q, row in enumerate(completions):
    for g, completion in enumerate(row):
      fed[q, g, : len(completion)] = completion
  starts = np.array([q.position_ids[0, -1] + 1 for q in questions])

  @jax.jit
  def run(params):
    features = network.encode(params, prompts.vision)
    embeds = network.embed(params, ids, index, features)
    trees = np.minimum(branches, 0)
    expected = network.forward(params, embeds, positions, trees, branches)
    embeds = network.embed(
      params, prompts.prompt_ids, prompts.vision_index, features
    )
    trees = jnp.where(prompts.prompt_mask, 0, -1)
    x, prompt_cache = network.read(params, embeds, prompts.position_ids, trees)
    weights = network.unstack(params)

    def step(cache, column):
      position = jnp.broadcast_to(
        (starts + column)[None, :, None], (3, len(questions), 1)
      )
      hidden, cache = network.decode(
        weights,
        jnp.asarray(fed)[:, :, column],
        network.turns(position),
        prompt_cache,
        prompts.prompt_mask,
        cache,
        jnp.broadcast_to(
          jnp.arange(length) <= column, (len(questions), length)
        ),
        column,
      )
      return cache, hidden

    cache = network.init_cache(len(questions), GROUP, length)
    _, hidden = jax.lax.scan(step, cache, jnp.arange(length))
    return expected, x, jnp.moveaxis(hidden, 0, 2)

  expected, read, got = (np.asarray(x) for x in run(params))
  for (q, g), where in columns.items():
    p, n = len(questions[q].prompt_ids), len(completions[q][g])
    np.testing.assert_allclose(read[q, :p], expected[q, :p], atol=2e-5)
    np.testing.assert_allclose(got[q, g, :n], expected[q, where[p:]], atol=2e-5)


@qwen2_5_vl
def test_a_lane_is_read_by_its_own_questions_alone(network, params):
  tokens = jnp.arange(2 * 3 * 64, dtype=jnp.float32).reshape(2, 3, 64)
  features = Features(tokens=tokens, levels=None)
  ids = np.zeros((4, 2), int)
  index = np.array([[0, -1], [1, 2], [0, 1], [-1, 2]])
  got = network.embed(params, ids, index, features).tokens
  text = params["language_model"]["embed_tokens"]["embedding"][0]
  rows = tokens.reshape(6, 64)
  expected = [[rows[0], text], [rows[1], rows[2]]]
  expected += [[rows[3], rows[4]], [text, rows[5]]]
  np.testing.assert_array_equal(got, np.array(expected))


def test_no_gather_crosses_lanes(family, network, directory):
  mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1, slices=-1)
  params = load_params(network, directory, mesh)
  tokens = np.zeros((8, 4, 64), np.float32)
  levels = np.zeros((3, 8, 4, 64), np.float32)
  ids = sharding.place(mesh, np.zeros((16, 12), int))
  features = Features(
    tokens=tokens, levels=levels if family == "qwen3_vl" else None
  )
  features = sharding.place(mesh, features)

  def loss(features, params, ids):
    with sharding.use(mesh):
      embeds = network.embed(params, ids, ids, features)
      zeros = 0 * ids
      x = network.forward(params, embeds, jnp.stack([ids] * 3), zeros, zeros)
      return jnp.sum(x**2, (1, 2))

  backward = lambda *args: jax.vjp(loss, *args)[1](jnp.ones(16))[0]
  text = jax.jit(backward).lower(features, params, ids).compile().as_text()
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in text


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_nothing(
  network, params, directory, layout, logits_of, make_question, sizes
):
  data, fsdp, tensor = sizes
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, slices=-1)
  lanes = sharding.data_shards(mesh)
  grids = [[(1, 4, 4)], [(1, 2, 6)], [], [(1, 2, 2), (1, 2, 4)]]
  questions = [
    make_question([[5 + i], *["image", [9]] * len(g)], g, layout, i)
    for i, g in enumerate(grids[i % 4] for i in range(lanes))
  ]
  prompts = dense.collate(questions, lanes=lanes, layout=layout)

  def on_mesh(params, prompts):
    with sharding.use(mesh):
      return logits_of(network, params, prompts)

  placed = load_params(network, directory, mesh)
  got = jax.jit(on_mesh)(placed, sharding.place(mesh, prompts))
  run = jax.jit(logits_of, static_argnums=0)
  expected = run(network, params, prompts)
  real = prompts.prompt_mask
  np.testing.assert_allclose(
    np.asarray(got)[real], np.asarray(expected)[real], atol=1e-4, rtol=0
  )


def test_every_weight_names_its_axes_and_its_part(network):
  axes, shapes = network.axes(), network.shapes()
  is_axes = lambda leaf: isinstance(leaf, tuple)
  jax.tree.map(
    lambda axes, shape: sharding.spec(axes) and len(axes) == shape.ndim,
    axes,
    shapes,
    is_leaf=is_axes,
  )
  parts = {
    network.part_of(tuple(key.key for key in path))
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
  }
  assert parts == {"vision_tower", "merger", "decoder"}
  assert network.part_of(("visual", "merger", "norm", "weight")) == "merger"
  assert network.part_of(("lm_head", "kernel")) == "decoder"


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_deepstack_mergers_are_part_of_the_merger(network):
  mergers = network.shapes()["visual"]["deepstack_merger_list"]
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(mergers)]
  assert len(paths) == 6
  for path in paths:
    keys = tuple(key.key for key in path)
    full = ("visual", "deepstack_merger_list", *keys)
    assert network.part_of(full) == "merger"


@qwen2_5_vl
def test_random_weights_are_drawn_as_transformers_draws_them(network):
  params = network.init(0)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, network.shapes()
  )
  layers = params["language_model"]["layers"]
  kernel = layers["mlp"]["gate_proj"]["kernel"]
  assert abs(float(kernel.std()) - 0.02) < 1e-3
  assert not jnp.array_equal(kernel[0], kernel[1])
  assert (layers["self_attn"]["q_proj"]["bias"] == 0).all()
  assert (layers["input_layernorm"]["weight"] == 1).all()
  other = network.init(1)["lm_head"]["kernel"]
  assert not jnp.array_equal(params["lm_head"]["kernel"], other)


def test_equal_networks_share_a_trace(network):
  assert hash(dataclasses.replace(network)) == hash(network)
  assert dataclasses.replace(network) == network


def test_an_unknown_family_is_refused_by_name():
  with pytest.raises(ValueError, match=r"llava.*qwen2_5_vl"):
    find_family("llava")


def test_an_unknown_remat_is_refused(network):
  with pytest.raises(ValueError, match="remat"):
    dataclasses.replace(network, remat="some")


def test_offload_is_refused_where_devices_have_no_host_memory(
  network, monkeypatch
):
  memory = types.SimpleNamespace(kind="device")
  device = types.SimpleNamespace(addressable_memories=lambda: [memory])
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  with pytest.raises(ValueError, match=r"no memory 'pinned_host' \(it has dev"):
    dataclasses.replace(network, remat="offload")


@pytest.mark.parametrize(
  ("attention", "told"),
  [
    ("auto", r"attention: got 'auto', expected one of \('plain', 'fused'\)"),
    ("fused", "got 'fused', and the backend is cpu; there are kernels for gpu"),
  ],
)
def test_an_attention_that_is_not_here_is_refused(network, attention, told):
  with pytest.raises(ValueError, match=told):
    dataclasses.replace(network, attention=attention)


def test_auto_is_fused_where_there_are_kernels(monkeypatch):
  assert choose_attention("auto") == "plain"
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert choose_attention("auto") == choose_attention("fused") == "fused"
  assert choose_attention("plain") == "plain"
