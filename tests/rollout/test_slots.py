"""The sampler's programs as XLA compiles them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm.plan.hlo import Module
from jaxvlm.rollout import slots
from jaxvlm.rollout.slots import Draws, Program, Slots

B, W, C, P = 6, 5, 24, 32


def shape(*sizes, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def make_program(network, *, top_k=0, top_p=1.0):
  draws = Draws(
    num_completions=W,
    max_completion_length=C,
    temperature=1.0,
    top_k=top_k,
    top_p=top_p,
  )
  return Program(
    network=network, draws=draws, eos_ids=(11,), pad_id=0, shards=1
  )


def make_slots(caches):
  """Slots as shapes."""
  return Slots(
    question=shape(B),
    begun=shape(B),
    following=shape(B, 3),
    prompt_mask=shape(B, P, dtype=bool),
    prompts=jax.tree.map(
      lambda x: shape(*x.shape[:2], P, x.shape[-1], dtype=x.dtype), caches
    ),
    keys=shape(B, W, dtype=jax.random.key(0).dtype),
    limits=shape(B, W),
    ended=shape(B, W, dtype=bool),
    truncated=shape(B, W, dtype=bool),
    lengths=shape(B, W),
    last=shape(B, W),
    ids=shape(B, W, C),
    logprobs=shape(B, W, C, dtype=jnp.float32),
  )


@pytest.fixture(scope="module")
def lowered(network):
  """decode lowered, for shapes in which nothing else is as large."""
  caches = jax.eval_shape(lambda: network.init_cache(B, W, C))
  arguments = (
    *(B, C, jax.eval_shape(network.unstack, network.shapes())),
    shape(network.config.vocab_size, dtype=bool),
    make_slots(caches),
    caches,
    *[shape()] * 3,
  )

  def lower(*, donated=True, top_k=0, top_p=1.0):
    program = make_program(network, top_k=top_k, top_p=top_p)
    function = slots.decode
    if not donated:
      function = jax.jit(slots.decode.__wrapped__, static_argnums=(0, 1, 2))
    return function.lower(program, *arguments)

  return lower


def made_by(module, like):
  """Operations whose result has as many numbers, wherever in the program."""
  return [
    line.opcode
    for lines in module.computations.values()
    for line in lines
    for found in line.shapes
    if math.prod(found.dims) == math.prod(like)
  ]


def test_decoding_writes_its_caches_in_place_and_never_copies_one(
  lowered, network
):
  config = network.config.text_config
  heads, size = config.num_key_value_heads, config.head_dim
  number = 2 * config.num_hidden_layers
  found = lowered().compile()
  module = Module(found.as_text())
  for cache in ((B, heads, W, C, size), (B, heads, P, size)):
    made = made_by(module, cache)
    assert made.count("parameter") >= number
    # Nor is one turned around, for a product to read it otherwise.
    assert not {"copy", "transpose"} & set(made)
  (aliases,) = re.findall(
    r"input_output_alias=\{(.*)\}, entry", found.as_text()
  )
  # ids, logprobs, lengths, ended, truncated, last and clock beside them.
  assert aliases.count("may-alias") >= number + 6
  kept = Module(lowered(donated=False).compile().as_text())
  assert "copy" in made_by(kept, (B, heads, W, C, size))


def test_the_vocabulary_is_sorted_where_filters_ask_for_it_alone(lowered):
  plain, nucleus, few = (
    lowered(**filters).as_text()
    for filters in ({}, {"top_p": 0.9}, {"top_k": 3})
  )
  assert "stablehlo.sort" not in plain and "chlo.top_k" not in plain
  assert "stablehlo.sort" in nucleus and "chlo.top_k" in few


def test_growing_keeps_what_is_written_and_holds_one_layer_twice(
  network, monkeypatch
):
  random = np.random.default_rng(0)
  caches = jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype),
    jax.eval_shape(lambda: network.init_cache(B, W, C)),
  )
  like = jax.tree.leaves(caches)[0].shape
  old, held = jax.tree.map(np.array, caches), []

  def grow_layer(*args):
    held.append(len([x for x in jax.live_arrays() if x.shape == like]))
    return original(*args)

  original = slots.grow_layer
  monkeypatch.setattr(slots, "grow_layer", grow_layer)
  found = slots.grow(caches, 2 * C)
  number = network.config.text_config.num_hidden_layers
  assert held == [2 * left for left in range(number, 0, -1)]
  for before, after in zip(
    jax.tree.leaves(old), jax.tree.leaves(found), strict=True
  ):
    np.testing.assert_array_equal(after[..., :C, :], before)
    assert not after[..., C:, :].any()


def test_regrouping_never_holds_more_than_one_layer_twice(network, monkeypatch):
  caches = jax.eval_shape(lambda: network.init_cache(B, W, C))
  random = np.random.default_rng(0)

  def draw(like):
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
      return jax.random.split(jax.random.key(0), like.shape)
    return jnp.asarray(random.integers(0, 9, like.shape), like.dtype)

  state, caches = jax.tree.map(draw, (make_slots(caches), caches))
  old = [jax.tree.map(np.array, x) for x in (state.prompts, caches)]
  held = []

  def regroup_layer(*args):
    arrays = [x for x in jax.live_arrays() if x.shape == like]
    held.append(len(arrays))
    return original(*args)

  original, like = slots.regroup_layer, caches[0].keys.shape
  monkeypatch.setattr(slots, "regroup_layer", regroup_layer)
  blocks, rows = [4, 1], [[W * 4 + 3, W * 4], [W + 2, -1]]
  new, got = slots.regroup(
    make_program(network), state, caches, jnp.array(blocks), jnp.array(rows)
  )
  number = network.config.text_config.num_hidden_layers
  assert held == [2 * left for left in range(number, 0, -1)]
  taken = jax.tree.map(lambda x: x[blocks], old[0])
  jax.tree.map(np.testing.assert_array_equal, new.prompts, taken)
  for one, before in zip(
    jax.tree.leaves(got), jax.tree.leaves(old[1]), strict=True
  ):
    for b, w, row in ((0, 0, (4, 3)), (0, 1, (4, 0)), (1, 0, (1, 2))):
      np.testing.assert_array_equal(one[b, :, w], before[row[0], :, row[1]])
  assert new.ended[1, 1]
  assert new.begun.tolist() == state.begun[jnp.array(blocks)].tolist()
