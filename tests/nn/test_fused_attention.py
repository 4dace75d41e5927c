"""Fused kernels, interpreted on the CPU, against the same sums in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm import sharding
from jaxvlm.nn import attention_gpu, block_attention, fused_attention
from jaxvlm.nn.block_attention import of_segments, of_trees
from tests.nn.test_block_attention import H, K, R, draw, tree_row, trees

PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
# One shape for most tests, compiled once: no multiple of a block, two trees.
ROWS, WIDTH = 2, 221


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
  """Blocks of 8 columns, and two of a GPU's tiles in each."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(block_attention.BLOCK, "cpu", 8)
    patch.setattr(attention_gpu, "TILE", 16)
    yield


@pytest.fixture(params=list(PLATFORMS))
def backend(request):
  return request.param


@functools.partial(jax.jit, static_argnums=2)
def run(arrays, visibility, backend):
  """Output and gradients; of the plain form for None."""
  attend = block_attention.attend
  if backend:
    attend = functools.partial(
      fused_attention.attend, backend=backend, interpret=True
    )
  *inputs, weight = arrays
  out = attend(*inputs, visibility)
  loss = lambda *inputs: (attend(*inputs, visibility) * weight).sum()
  return [out, *jax.grad(loss, argnums=(0, 1, 2))(*inputs)]


def assert_equal_to_plain(arrays, visibility):
  expected = run(arrays, visibility, None)
  for backend in PLATFORMS:
    for got, plain in zip(
      run(arrays, visibility, backend), expected, strict=True
    ):
      assert got.dtype == plain.dtype
      np.testing.assert_allclose(got, plain, rtol=0, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
  st.lists(st.lists(trees, max_size=2), min_size=ROWS, max_size=ROWS),
  st.integers(0, 2**32 - 1),
)
def test_packed_trees_of_every_shape_equal_the_plain_form(rows, seed):
  ids = np.full((2, ROWS, WIDTH), -1, np.int32)
  for i, row in enumerate(rows):
    if row:
      ids[:, i] = tree_row(row, WIDTH)
  assert_equal_to_plain(draw(seed, WIDTH, ROWS), of_trees(*jnp.asarray(ids)))


@settings(max_examples=8, deadline=None)
@given(
  st.lists(
    st.lists(st.integers(1, 40), max_size=5), min_size=ROWS, max_size=ROWS
  ),
  st.integers(0, 2**32 - 1),
)
def test_segments_of_every_length_equal_the_plain_form(rows, seed):
  segments = np.full((ROWS, WIDTH), -1, np.int32)
  for row, lengths in zip(segments, rows, strict=True):
    row[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
  assert_equal_to_plain(
    draw(seed, WIDTH, ROWS), of_segments(jnp.asarray(segments))
  )


def test_segments_in_any_order_equal_the_plain_form():
  segments = np.random.default_rng(0).integers(-1, 4, (ROWS, WIDTH))
  assert_equal_to_plain(
    draw(0, WIDTH, ROWS), of_segments(jnp.asarray(segments, jnp.int32))
  )


def test_a_row_shorter_than_a_block_equals_the_plain_form():
  segments = jnp.zeros((1, 5), jnp.int32)
  assert_equal_to_plain(draw(0, 5, 1), of_segments(segments))


def test_a_row_that_sees_nothing_gets_zero_and_no_gradient(backend):
  segments = jnp.stack([jnp.full(WIDTH, -1), jnp.zeros(WIDTH, jnp.int32)])
  for found in run(draw(0, WIDTH, ROWS), of_segments(segments), backend):
    np.testing.assert_array_equal(found[0], 0)
    assert np.abs(found[1]).min(-1).max() > 0


def test_a_hidden_key_changes_nothing_however_large(backend):
  arrays = draw(0, WIDTH, ROWS)
  ids = np.stack([tree_row([(20, [5, 5])], WIDTH)] * ROWS, axis=1)
  visibility = of_trees(*jnp.asarray(ids))
  expected = run(arrays, visibility, backend)[0][:, 25:30]
  arrays[1][:, 20:25], arrays[2][:, 20:25] = 1e6, -1e6
  got = run(arrays, visibility, backend)[0][:, 25:30]
  np.testing.assert_array_equal(got, expected)


def test_low_scores_are_not_lost(backend):
  """exp(-400) is 0 in float32: a softmax starts from its own highest score."""
  arrays = draw(0, WIDTH, ROWS)
  arrays[0][:], arrays[1][:] = 12.0, -12.0
  segments = jnp.zeros((ROWS, WIDTH), jnp.int32)
  got = run(arrays, of_segments(segments), backend)[0]
  mean = np.repeat(arrays[2].mean(1, keepdims=True), R, axis=2)
  np.testing.assert_allclose(got, np.broadcast_to(mean, got.shape), atol=1e-5)


def test_scores_of_bfloat16_are_float32(backend):
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(0, 40, 1)]
  visibility = of_segments(jnp.zeros((1, 40), jnp.int32))
  exact = run([x.astype(jnp.float32) for x in arrays], visibility, None)
  for got, expected in zip(
    run(arrays, visibility, backend), exact, strict=True
  ):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=3e-2)


@pytest.mark.parametrize(
  ("sizes", "part"),
  [
    ((2, 1, 4), (1, WIDTH, K * R, H)),  # K does not divide
    ((2, 1, 2), (1, WIDTH, K * R // 2, H)),
  ],
)
def test_a_mesh_changes_nothing(make_mesh, backend, sizes, part):
  arrays = draw(0, WIDTH, ROWS)
  ids = np.stack([tree_row([(60, [25, 90])], WIDTH)] * ROWS, axis=1)

  visibility = of_trees(*jnp.asarray(ids))

  def on_mesh(*inputs):
    with sharding.use(make_mesh(*sizes)):
      return fused_attention.attend(
        *inputs, visibility, backend=backend, interpret=True
      )

  @jax.jit
  def both(inputs, weight):
    # The backward pass is traced where the mesh is no longer in use.
    out, back = jax.vjp(on_mesh, *inputs)
    return [out, *back(weight)]

  got = both(arrays[:3], arrays[3])
  for found in got[:2]:
    assert found.sharding.shard_shape(found.shape) == part
  for one, all_ in zip(run(arrays, visibility, backend), got, strict=True):
    np.testing.assert_allclose(one, all_, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
  ("query_heads", "kv_heads", "size"), [(28, 4, 128), (16, 16, 80)]
)
def test_kernels_lower_without_their_device(
  monkeypatch, backend, query_heads, kv_heads, size, dtype
):
  block = block_attention.BLOCK[backend]
  monkeypatch.setitem(block_attention.BLOCK, "cpu", block)
  monkeypatch.setattr(attention_gpu, "TILE", 128)

  def loss(query, keys, values, ids):
    out = fused_attention.attend(
      query, keys, values, of_trees(ids, ids), backend=backend
    )
    return jnp.square(out.astype(jnp.float32)).sum()

  shape = lambda heads: jax.ShapeDtypeStruct((2, 600, heads, size), dtype)
  lowered = (
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    .trace(
      shape(query_heads),
      shape(kv_heads),
      shape(kv_heads),
      jax.ShapeDtypeStruct((2, 600), jnp.int32),
    )
    .lower(lowering_platforms=(PLATFORMS[backend],))
  )
  kernel = {"gpu": "xla.gpu.triton", "tpu": "tpu_custom_call"}[backend]
  assert lowered.as_text().count(f"{kernel}(") == 3
