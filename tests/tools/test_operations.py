"""Counts by hand, against the model's own masks, and against XLA's."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxvlm import learner as learner_module
from jaxvlm.data.vision_layout import Layout, pack_vision
from jaxvlm.learner import Learner
from jaxvlm.models import Network, find_family
from jaxvlm.nn.block_attention import attend, of_segments, of_trees
from jaxvlm.packing import Packed
from tests.conftest import TINY
from tests.learners import ADAMW, OBJECTIVE
from tests.test_counters import experiences, make_question
from tools import operations
from tools.operations import Batch

FAMILIES = sorted(TINY)


def make_batch(prompts, completions, grids=()):
  return Batch(
    prompts=np.array(prompts),
    completions=np.array(completions),
    grids=np.array(grids, int).reshape(-1, 3),
  )


@pytest.fixture(scope="module")
def large():
  """One layer each, so large that norms and softmax are little beside."""
  family = "qwen3_vl"
  raw = TINY[family]
  text = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "vocab_size": 2048,
    "head_dim": 128,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
  }
  tower = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "depth": 1,
    "out_hidden_size": 512,
  }
  config = find_family(family).Config.from_hf(
    {
      **raw,
      "text_config": {**raw["text_config"], **text},
      "vision_config": {**raw["vision_config"], **tower},
    }
  )
  return Network(
    config=config,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    attention="plain",
  )


@pytest.fixture(scope="module")
def large_layout(large):
  return Layout.from_config(large.config.to_hf())


def flops(function, *args):
  return function.lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_all_matrices_are_counted(network):
  found = operations.kernels(network)
  flat = traverse_util.flatten_dict(network.shapes())
  sizes = [x.size for path, x in flat.items() if path[-1] == "kernel"]
  head = 32 * 50  # tied: the table of embeddings
  assert sum(x.size for x in found) == sum(sizes) + head
  units = {x.unit for x in found}
  assert units == {"pixels", "patch", "visual", "token", "target"}
  n, k, h = 4, 2, network.config.text_config.head_dim
  own = 2 * (32 * (n + 2 * k) * h + n * h * 32 + 3 * 32 * 48)
  assert sum(x.size for x in found if x.unit == "token") == own


def test_a_head_of_its_own_is_counted_once(network):
  config = dataclasses.replace(network.config, tie_word_embeddings=False)
  untied = dataclasses.replace(network, config=config)
  (head,) = (x for x in operations.kernels(untied) if x.unit == "target")
  assert (head.inner, head.outer) == (32, 50)


def test_pairs_of_trees_are_those_that_the_model_shows(questions, mesh, layout):
  lengths = np.random.default_rng(0).integers(1, 9, (len(questions), 3))
  mask = np.arange(8) < lengths[..., None]
  packed = Packed(
    *(questions, mask.astype(np.int32), mask),
    tokens=64,
    mesh=mesh,
    layout=layout,
  )
  shown = 0
  for u in range(len(packed)):
    tree = packed.tree(u)
    tokens = of_trees(tree.tree_ids, tree.branch_ids).tokens
    whole = jax.tree.map(lambda x: x.reshape(len(x), -1), tokens)
    shown += int(whole.see(whole).sum())
  batch = make_batch([len(q.prompt_ids) for q in questions], lengths)
  assert operations.decoder_pairs(batch) == shown


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_pairs_of_patches_are_those_that_the_model_shows(
  network, questions, layout
):
  vision = pack_vision([questions], layout=layout)
  grids = np.concatenate([q.image_grid_thw for q in questions])

  def shown(segments):
    tokens = of_segments(jnp.asarray(segments)).tokens
    whole = jax.tree.map(lambda x: x.reshape(len(x), -1), tokens)
    return int(whole.see(whole).sum())

  full = shown(vision.full_segments)
  expected = 2 * full
  if vision.window_segments is not None:  # of two blocks, the second is full
    expected = full + shown(vision.window_segments)
    assert expected < 2 * full
  assert operations.tower_pairs(network, grids) == expected


def test_xla_counts_as_many_for_attention():
  shape = (1, 64, 2, 128)  # one block, of two heads
  visibility = of_segments(jnp.zeros(shape[:2], jnp.int32))
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
  pairs = 64 * 64 * 2 * 128

  def look(*inputs):
    return attend(*inputs, visibility)

  # Both ways are programs of their own: in one, XLA makes the scores once.
  found = flops(jax.jit(look), *inputs)
  assert found == pytest.approx(operations.PAIR * pairs, rel=0.06)
  out, pull = jax.eval_shape(lambda *x: jax.vjp(look, *x), *inputs)
  found = flops(jax.jit(lambda pull, gradient: pull(gradient)), pull, out)
  assert found == pytest.approx(operations.PAIR_BACKWARD * pairs, rel=0.06)


def test_xla_counts_as_many_for_the_tower(large, large_layout):
  question = make_question(large_layout, 8, 8, 1)
  vision = pack_vision([[question]], layout=large_layout)
  grids = question.image_grid_thw
  encode = functools.partial(large.encode, vision=vision)
  own = operations.of_tower(large, grids, at_once=64, trained=False)
  found = flops(jax.jit(encode), large.shapes())
  assert found == pytest.approx(own.flops, rel=0.02)
  assert found > own.flops

  def total(params):
    features = encode(params)
    return (features.tokens**2).sum() + (features.levels**2).sum()

  own = operations.of_tower(large, grids, at_once=64, trained=True)
  found = flops(jax.jit(jax.grad(total)), large.shapes())
  assert found == pytest.approx(own.flops, rel=0.03)


def test_xla_counts_as_many_for_logprobs_and_gradient(
  large, large_layout, mesh
):
  """But for pairs of a block that no one sees, and logits made again."""
  question = make_question(large_layout, 4, 4, 26)
  mask = np.ones((1, 2, 16), bool)
  packed = Packed(
    *([question], mask.astype(np.int32), mask),
    tokens=64,
    mesh=mesh,
    layout=large_layout,
  )
  assert packed.tree(0).ids.shape == (1, 64)
  banned = np.zeros(2048, bool)
  learner = Learner(
    network=large,
    mesh=mesh,
    banned=banned,
    frozen=(),
    optimizer=ADAMW,
    # XLA counts the body of the loop over targets once: all of them.
    objective=dataclasses.replace(OBJECTIVE, logprob_chunk=32),
  )
  program, shapes = learner.program, large.shapes()
  (micro,) = experiences(packed, mask)
  batch = make_batch([32], [[16, 16]], question.image_grid_thw)
  unseen = 4 * 128 * (64 * 64 - operations.decoder_pairs(batch))

  own = operations.of_groups(large, batch, at_once=64, trained=False)
  found = flops(learner_module.logprobs, program, shapes, banned, micro.tree)
  assert found == pytest.approx(own.flops + 4 * unseen, rel=0.02)

  own = operations.of_groups(large, batch, at_once=64, trained=True)
  zeros = jax.eval_shape(
    functools.partial(learner_module.zeros, program), shapes
  )
  found = flops(
    learner_module.add_gradient, program, zeros, shapes, banned, micro
  )
  logits = 2 * 512 * 2048 * 32
  assert found == pytest.approx(own.flops + 14 * unseen + logits, rel=0.03)


def by_unit(network):
  """Numbers of weights."""
  sizes = collections.Counter()
  for kernel in operations.kernels(network):
    sizes[kernel.unit] += kernel.size
  return sizes


def test_a_rollout_feeds_all_but_the_last_token(network):
  """Two prompts of 5 and 7 tokens; completions of 1, 4 and 2, 3."""
  sizes = by_unit(network)
  width = 2 * 4 * network.config.text_config.head_dim  # layers, heads
  found = operations.of_rollout(
    network, make_batch([5, 7], [[1, 4], [2, 3]]), at_once=1000
  )
  fed = 0 + 3 + 1 + 2
  token, target = 5 + 7 + fed, 2 + fed
  pairs = (15 + 28) + 3 * 5 + (1 + 2) * 7 + (6 + 1 + 3)
  assert found.attention == 4 * width * pairs
  assert found.flops == found.attention + 2 * (
    token * sizes["token"] + target * sizes["target"]
  )
  # Prefill, then three steps; a prompt's columns for the longest of its group.
  passes = 4 * (sizes["token"] + sizes["target"])
  columns = 3 * 5 + 2 * 7 + (6 + 1 + 3)
  column = 2 * 2 * 2 * network.config.text_config.head_dim  # layers, K and V
  assert found.bytes == 4 * (passes + columns * column)
  # Two of four go on in a step, on average.
  assert {x.rows for x in found.products} == {12, 2}


def test_a_rollout_of_single_tokens_is_its_prompts(network):
  batch = make_batch([5, 7], [[1, 1], [1, 1]])
  found = operations.of_rollout(network, batch, at_once=1000)
  assert {x.rows for x in found.products} == {12, 2}
  assert found.attention == 4 * 2 * 4 * 8 * (15 + 28)


def test_an_update_is_the_reference_and_three_times_the_policy(network):
  sizes = by_unit(network)
  batch = make_batch([5], [[2, 3]], [(1, 4, 4)])
  found = operations.of_update(network, batch, at_once=8)
  forward = 16 * sizes["patch"] + 4 * sizes["visual"]
  forward += 10 * sizes["token"] + 5 * sizes["target"]
  weights = sum(x.size for x in jax.tree.leaves(network.shapes()))
  assert found.flops - found.attention == (
    (2 + 6) * forward + (2 + 4) * 16 * sizes["pixels"]
  )
  pairs = 32 * operations.tower_pairs(network, batch.grids)
  pairs += 2 * 4 * 8 * operations.decoder_pairs(batch)
  assert found.attention == (4 + 14) * pairs
  pixels = 2 * 16 * 1176
  assert found.bytes == 4 * (3 * sum(sizes.values()) + pixels + 8 * weights)
  assert max(x.rows for x in found.products) == 8


def test_each_work_needs_what_it_does(network):
  arrays = {
    "G": np.array(2),
    "R": np.array(4),
    "prompts": np.zeros((2, 6)),
    "lengths": np.array([1, 4, 2, 3]),
    "grid": np.array([(1, 4, 4)] * 2),
    "v_grid": np.array([(1, 4, 8)]),
  }
  found = {
    work: operations.of_work(work, network, arrays, at_once=64)
    for work in ("W1", "W2", "W3", "W4", "W5")
  }
  grids = arrays["grid"]
  whole = make_batch([6, 6], [[4, 4]] * 2, grids)
  ended = make_batch([6, 6], [[1, 4], [2, 3]], grids)
  how = {"at_once": 64}
  rollout = operations.of_rollout(network, whole, **how)
  update = operations.of_update(network, whole, **how)
  assert found["W1"] == rollout
  assert found["W2"] == operations.of_rollout(network, ended, **how)
  assert found["W2"].flops < found["W1"].flops
  assert found["W3"] == update
  assert found["W4"] == rollout + update
  assert found["W5"] == operations.of_tower(
    network, arrays["v_grid"], trained=False, **how
  )
