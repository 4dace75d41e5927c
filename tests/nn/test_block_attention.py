"""Attention by blocks against torch over one dense mask, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.nn import block_attention
from jaxvlm.nn.block_attention import attend, of_segments, of_trees

K, R, H = 2, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setitem(block_attention.BLOCK, "cpu", 8)


def tree_row(trees, width):
  """Tree and branch [2 width] of each tree's prompt and completions, padded."""
  found = []
  for i, (prompt, completions) in enumerate(trees):
    lengths = [prompt, *completions]
    branches = np.repeat(np.arange(len(lengths)), lengths)
    found.append(np.stack([np.full(branches.size, i), branches]))
  ids = np.concatenate(found, axis=1)
  padding = ((0, 0), (0, width - ids.shape[1]))
  return np.pad(ids, padding, constant_values=-1).astype(np.int32)


def visible(*trees, width):
  """Of one row."""
  tree_ids, branch_ids = tree_row(trees, width)
  return of_trees(jnp.asarray(tree_ids[None]), jnp.asarray(branch_ids[None]))


def tree_mask(tree_ids, branch_ids):
  (tree, same), (own, other) = (
    (x[:, :, None], x[:, None, :]) for x in (tree_ids, branch_ids)
  )
  columns = np.arange(branch_ids.shape[1])
  later = columns > columns[:, None]
  seen = (other == 0) | (other == own)
  return (tree >= 0) & (tree == same) & seen & ~later


def segment_mask(segments):
  own, other = segments[:, :, None], segments[:, None, :]
  return (own >= 0) & (own == other)


def draw(seed, width, rows):
  random = np.random.default_rng(seed)
  shapes = [(rows, width, heads, H) for heads in (K * R, K, K, K * R)]
  return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def torch_attend(arrays, mask):
  """Output and gradients; 0 where a query sees nothing."""
  query, keys, values, weight = (
    torch.tensor(x).transpose(1, 2) for x in arrays
  )
  inputs = [x.requires_grad_() for x in (query, keys, values)]
  seen = torch.tensor(mask)[:, None]
  some = seen.any(-1, keepdim=True)
  out = torch.nn.functional.scaled_dot_product_attention(
    *inputs, attn_mask=seen | ~some, enable_gqa=True
  )
  out = torch.where(some, out, 0.0)
  gradients = torch.autograd.grad((out * weight).sum(), inputs)
  return [x.detach().transpose(1, 2).numpy() for x in (out, *gradients)]


@jax.jit
def block_attend(arrays, visibility):
  *inputs, weight = arrays
  out = attend(*inputs, visibility)
  loss = lambda *inputs: (attend(*inputs, visibility) * weight).sum()
  return [out, *jax.grad(loss, argnums=(0, 1, 2))(*inputs)]


def assert_equal_to_torch(arrays, visibility, mask):
  expected = torch_attend(arrays, mask)
  for ours, theirs in zip(
    block_attend(arrays, visibility), expected, strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


trees = st.tuples(
  st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=4)
)


@settings(max_examples=25, deadline=None)
@given(
  st.lists(st.lists(trees, min_size=1, max_size=3), min_size=3, max_size=3),
  st.integers(0, 2**32 - 1),
)
def test_packed_trees_of_every_shape_equal_torch(rows, seed):
  width = 330
  ids = np.stack([tree_row(row, width) for row in rows], axis=1)
  assert_equal_to_torch(
    draw(seed, width, len(rows)),
    of_trees(*jnp.asarray(ids)),
    tree_mask(*ids),
  )


@settings(max_examples=25, deadline=None)
@given(
  st.lists(
    st.lists(st.integers(1, 25), min_size=1, max_size=5),
    min_size=2,
    max_size=2,
  ),
  st.integers(0, 2**32 - 1),
)
def test_segments_of_every_length_equal_torch(rows, seed):
  width = 125
  segments = np.full((len(rows), width), -1, np.int32)
  for row, lengths in zip(segments, rows, strict=True):
    row[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
  assert_equal_to_torch(
    draw(seed, width, len(rows)),
    of_segments(jnp.asarray(segments)),
    segment_mask(segments),
  )


def test_segments_in_any_order_equal_torch():
  segments = np.random.default_rng(0).integers(-1, 4, (2, 50)).astype(np.int32)
  assert_equal_to_torch(
    draw(0, 50, 2), of_segments(jnp.asarray(segments)), segment_mask(segments)
  )


def test_blocks_that_a_tree_empties_are_not_read():
  # Blocks of 8: a prompt of two, then four completions of two each.
  visibility = visible((16, [16] * 4), width=80)
  assert visibility.keys[0, :, :5].tolist() == [
    [0, -1, -1, -1, -1],
    [0, 1, -1, -1, -1],
    *(
      [0, 1, first, second, -1]
      for g in range(4)
      for first, second in ((2 + 2 * g, -1), (2 + 2 * g, 3 + 2 * g))
    ),
  ]
  assert visibility.num_keys.tolist() == [1, 2, *[3, 4] * 4]
  assert visibility.num_queries.tolist() == [10, 9, *[2, 1] * 4]


def test_trees_of_a_row_read_their_own_blocks_alone():
  visibility = visible((8, [8]), (8, [8, 8]), width=48)
  assert visibility.keys[0].tolist() == [
    [0, *[-1] * 5],
    [0, 1, *[-1] * 4],
    [2, *[-1] * 5],
    [2, 3, *[-1] * 4],
    [2, 4, *[-1] * 4],
    [-1] * 6,
  ]


def test_windows_read_their_own_block_alone():
  visibility = of_segments(jnp.repeat(jnp.arange(6), 8)[None])
  assert visibility.num_keys.tolist() == [1] * 6
  assert visibility.keys[0, :, 0].tolist() == list(range(6))


def test_padding_is_never_read():
  visibility = visible((20, []), width=160)
  assert visibility.num_keys.tolist() == [1, 2, 3] + [0] * 17


def test_a_hidden_key_changes_nothing_however_large():
  query, keys, values, _ = draw(0, 40, 1)
  visibility = visible((20, [5, 5]), width=40)
  expected = attend(query, keys, values, visibility)[:, 25:30]
  keys[:, 20:25], values[:, 20:25] = 1e6, -1e6
  got = attend(query, keys, values, visibility)[:, 25:30]
  np.testing.assert_array_equal(got, expected)


def test_a_query_that_sees_nothing_gets_zero_and_no_gradient():
  arrays = draw(0, 16, 1)
  visibility = visible((0, []), width=16)
  for found in block_attend(arrays, visibility):
    np.testing.assert_array_equal(found, 0)


def test_scores_of_bfloat16_are_float32():
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(0, 40, 2)]
  visibility = of_segments(jnp.zeros((2, 40), jnp.int32))
  exact = block_attend([x.astype(jnp.float32) for x in arrays], visibility)
  for got, expected in zip(
    block_attend(arrays, visibility), exact, strict=True
  ):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=3e-2)


def test_no_square_array_exists():
  """Memory grows with the row, not with its square, backward too."""

  def temporary(width):
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(0, width, 1)]
    row = jax.ShapeDtypeStruct((1, width), jnp.int32)
    visibility = jax.eval_shape(of_trees, row, row)
    compiled = block_attend.lower(arrays, visibility).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary(512), temporary(2048)
  assert long < 6 * short
