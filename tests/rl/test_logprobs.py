"""rl/logprobs.py against the whole [tokens, V] softmax."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm.rl.logprobs import banned_logits, token_logits, token_logprobs

ROWS, WIDTH, DIM, VOCAB = 8, 13, 16, 23
TEMPERATURE = 0.7
BANNED = jnp.arange(VOCAB) >= 20


@pytest.fixture(scope="module")
def batch():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (ROWS, WIDTH, DIM))
  head = jax.random.normal(keys[1], (DIM, VOCAB))
  return hidden, head, jax.random.randint(keys[2], (ROWS, WIDTH), 0, 20)


def naive(hidden, head, targets, temperature=TEMPERATURE, banned=BANNED):
  logits = hidden @ head / temperature
  logits = jnp.where(banned[None, None], -jnp.inf, logits)
  logprobs = jax.nn.log_softmax(logits)
  terms = jnp.where(banned[None, None], 0.0, jnp.exp(logprobs) * logprobs)
  chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)
  return chosen[..., 0], -terms.sum(axis=-1)


def chunked(
  hidden,
  head,
  targets,
  *,
  chunk,
  temperature=TEMPERATURE,
  banned=BANNED,
  entropy_gradient=False,
  counts=None,
):
  """Column n predicts targets[n]; all of them count unless told otherwise."""
  columns = jnp.arange(targets.shape[1])[None]
  return token_logprobs(
    hidden,
    head,
    jnp.broadcast_to(columns, targets.shape),
    targets,
    counts=jnp.full(len(targets), targets.shape[1])
    if counts is None
    else counts,
    temperature=temperature,
    banned=banned,
    chunk=chunk,
    entropy_gradient=entropy_gradient,
  )


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_values_equal_the_naive_form_for_any_chunk(batch, chunk):
  for got, expected in zip(
    chunked(*batch, chunk=chunk), naive(*batch), strict=True
  ):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_gradients_equal_the_naive_form(batch, chunk):
  hidden, head, targets = batch
  weights = jax.random.normal(jax.random.key(4), targets.shape)

  def total(function):
    return lambda hidden, head: jnp.sum(
      weights * function(hidden, head, targets)[0]
    )

  got = jax.grad(total(functools.partial(chunked, chunk=chunk)), (0, 1))
  expected = jax.grad(total(naive), (0, 1))
  for a, b in zip(got(hidden, head), expected(hidden, head), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_the_entropy_has_a_gradient_where_it_is_asked_for(batch, learned):
  hidden, head, targets = batch

  def chunks(hidden, head):
    return chunked(hidden, head, targets, chunk=4, entropy_gradient=learned)[
      1
    ].sum()

  def whole(hidden, head):
    logits = banned_logits(hidden @ head / TEMPERATURE, BANNED)
    shares = jax.nn.log_softmax(logits)
    return -(jnp.exp(shares) * shares).sum()

  np.testing.assert_allclose(
    chunks(hidden, head), whole(hidden, head), rtol=1e-5
  )
  found = jax.grad(chunks, (0, 1))(hidden, head)
  expected = jax.grad(whole, (0, 1))(hidden, head)
  for a, b in zip(found, expected, strict=True):
    assert jnp.abs(b).max() > 0.1
    np.testing.assert_allclose(a, learned * b, atol=5e-5)


@settings(max_examples=15, deadline=None)
@given(
  st.lists(
    st.lists(st.integers(0, WIDTH - 1), max_size=WIDTH),
    min_size=ROWS,
    max_size=ROWS,
  ),
  st.sampled_from([1, 4, 64]),
)
def test_any_columns_may_predict_and_any_number_of_them(batch, rows, chunk):
  """One column may predict several targets; padding has no gradient."""
  hidden, head, targets = batch
  counts = np.array([len(row) for row in rows])
  columns = np.zeros((ROWS, WIDTH), np.int32)
  for own, row in zip(columns, rows, strict=True):
    own[: len(row)] = row
  mask = np.arange(WIDTH) < counts[:, None]

  def chunks(hidden, head):
    return token_logprobs(
      *(hidden, head, columns, targets),
      counts=counts,
      temperature=TEMPERATURE,
      banned=BANNED,
      chunk=chunk,
      entropy_gradient=False,
    )[0]

  def whole(hidden, head):
    states = jnp.take_along_axis(hidden, columns[..., None], axis=1)
    return naive(states, head, targets)[0]

  def total(function):
    def loss(hidden, head):
      return jnp.sum(jnp.where(mask, function(hidden, head), 0.0))

    return jax.value_and_grad(loss, (0, 1))(hidden, head)

  found, expected = (jax.tree.leaves(total(f)) for f in (chunks, whole))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_temperature_and_ban_each_move_the_values(batch):
  logprobs, _ = chunked(*batch, chunk=4)
  colder = chunked(*batch, temperature=1.0, chunk=4)[0]
  freer = chunked(*batch, banned=BANNED & False, chunk=4)[0]
  assert jnp.abs(logprobs - colder).max() > 0.1
  assert (freer <= logprobs + 1e-6).all()
  assert jnp.abs(logprobs - freer).max() > 0.1


def test_a_banned_id_has_probability_zero(batch):
  hidden, head, _ = batch
  logits = token_logits(hidden, head, temperature=1.0, banned=BANNED)
  shares = jax.nn.softmax(logits)
  assert (shares[..., 20:] == 0.0).all()
  np.testing.assert_allclose(shares.sum(axis=-1), 1.0, rtol=1e-5)


def test_entropy_of_a_flat_distribution_counts_what_is_not_banned():
  hidden, head = jnp.zeros((2, 3, DIM)), jnp.ones((DIM, VOCAB))
  targets = jnp.zeros((2, 3), jnp.int32)
  logprobs, entropy = chunked(hidden, head, targets, chunk=2)
  np.testing.assert_allclose(logprobs, -np.log(20), rtol=1e-6)
  np.testing.assert_allclose(entropy, np.log(20), rtol=1e-6)


def test_a_banned_target_of_padding_spoils_no_gradient(batch):
  hidden, head, targets = batch
  mask = jnp.arange(WIDTH)[None] < jnp.arange(ROWS)[:, None]

  def total(targets):
    def loss(hidden, head):
      logprobs, _ = chunked(hidden, head, targets, chunk=4)
      return jnp.sum(jnp.where(mask, logprobs, 0.0))

    return jax.value_and_grad(loss, (0, 1))(hidden, head)

  clean, spoilt = total(targets), total(jnp.where(mask, targets, VOCAB - 1))
  jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


def test_entropy_carries_no_gradient(batch):
  hidden, head, targets = batch
  gradient = jax.grad(lambda h: chunked(h, head, targets, chunk=4)[1].sum())
  assert (gradient(hidden) == 0.0).all()


def sizes(jaxpr):
  """Elements of every array that a jaxpr makes, with those of its parts."""
  for equation in jaxpr.eqns:
    yield from (var.aval.size for var in equation.outvars)
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from sizes(inner)


def test_logits_are_never_whole():
  """Nothing as large as [tokens, V] stands in the forward or backward pass."""
  hidden, head = jnp.ones((2, 64, 4)), jnp.ones((4, 512))
  targets, banned = jnp.zeros((2, 64), jnp.int32), jnp.zeros(512, bool)

  def loss(hidden, head, chunk):
    logprobs, _ = chunked(hidden, head, targets, banned=banned, chunk=chunk)
    return logprobs.sum()

  def largest(chunk):
    gradient = jax.grad(functools.partial(loss, chunk=chunk), (0, 1))
    return max(sizes(jax.make_jaxpr(gradient)(hidden, head).jaxpr))

  assert largest(64) == 2 * 64 * 512
  assert largest(8) == 2 * 8 * 512


def test_rows_stay_on_their_shards(batch):
  mesh = Mesh(np.array(jax.devices()), ("data",))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  counts = jnp.arange(ROWS) + WIDTH - ROWS

  @functools.partial(jax.jit, in_shardings=(rows, whole, rows, rows))
  def function(hidden, head, targets, counts):
    return chunked(hidden, head, targets, chunk=4, counts=counts)

  batch = (*batch, counts)
  text = function.lower(*batch).compile().as_text()
  between = re.findall(r"= (\S+ all-[a-z]+)\(", text)
  # What they agree on is how many chunks there are.
  assert between == ["s32[] all-reduce"]
  own = jnp.arange(WIDTH)[None] < counts[:, None]
  for got, expected in zip(function(*batch), naive(*batch[:3]), strict=True):
    np.testing.assert_allclose(got[own], expected[own], atol=2e-5)


def test_bfloat16_states_give_float32_logprobs(batch):
  hidden, head, targets = batch
  logprobs, entropy = chunked(
    hidden.astype(jnp.bfloat16), head, targets, chunk=4
  )
  assert logprobs.dtype == entropy.dtype == jnp.float32
  np.testing.assert_allclose(logprobs, naive(*batch)[0], atol=0.3)


def test_banned_logits_keep_their_dtype():
  logits = banned_logits(jnp.zeros((2, VOCAB), jnp.bfloat16), BANNED)
  assert logits.dtype == jnp.bfloat16
  assert jnp.isfinite(logits).all()
