"""The sampler on the real network for layouts, on a Markov chain for rules."""

import contextlib
import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm import compiling
from jaxvlm.filling import Known, sizes_of
from jaxvlm.models import Network
from jaxvlm.nn.decoder import Embeds
from jaxvlm.plan import estimate
from jaxvlm.rollout import schedule
from jaxvlm.rollout import slots as slots_module
from jaxvlm.rollout.sampler import Draws, Sampler
from jaxvlm.types import Example, Question

# -- the network: nothing but seed, step, question and column decides ----------


@pytest.fixture(scope="module")
def sample(make_sampler, place_params, params, draws):
  def run(mesh, questions, key=0, limits=None, slots=0, **changes):
    sampler = make_sampler(mesh, slots=slots)
    weights = sampler.weights(place_params(params, mesh))
    return sampler.sample(
      weights,
      questions,
      key=jax.random.key(key),
      draws=dataclasses.replace(draws, **changes),
      limits=limits,
    )

  return run


def assert_same_completions(found, expected):
  for name in ("completion_ids", "completion_mask", "truncated"):
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
  np.testing.assert_allclose(
    found.sampler_logprobs, expected.sampler_logprobs, rtol=0, atol=1e-4
  )


def rows(rollout, which):
  return jax.tree.map(lambda x: x[np.asarray(which)], rollout)


def test_completions_are_of_many_kinds(rollout, banned):
  lengths = rollout.completion_mask.sum(-1)
  ids = rollout.completion_ids[rollout.completion_mask]
  assert lengths.min() < 4 and lengths.max() == 8
  assert rollout.truncated.any() and not rollout.truncated.all()
  assert len(np.unique(ids)) > 15
  assert not banned[ids].any()
  assert len(np.unique(rollout.completion_ids.reshape(24, -1), axis=0)) == 24


def test_the_order_of_questions_does_not_matter(
  sample, mesh, questions, rollout
):
  order = np.array([3, 0, 7, 5, 2, 6, 1, 4])
  found = sample(mesh, [questions[i] for i in order])
  assert_same_completions(found, rows(rollout, order))


def test_another_step_draws_otherwise(sample, mesh, questions, rollout):
  found = sample(mesh, questions, key=1)
  same = (found.completion_ids == rollout.completion_ids).all(-1)
  assert same.mean() < 0.2


def test_company_and_a_shorter_limit_do_not_matter(
  sample, mesh, questions, rollout
):
  """Fewer questions, narrower prompts, no pictures: the same beginnings."""
  for which in ([3, 2], [6, 2]):
    found = sample(mesh, [questions[i] for i in which], max_completion_length=5)
    expected = rows(rollout, which)
    ended = expected.completion_mask.sum(-1) <= 5
    ended &= ~expected.truncated
    np.testing.assert_array_equal(found.truncated, ~ended)
    short = jax.tree.map(lambda x: x[..., :5] if x.ndim == 3 else x, expected)
    assert_same_completions(found, dataclasses.replace(short, truncated=~ended))


def test_a_completion_ends_at_a_limit_of_its_own(
  sample, mesh, questions, rollout
):
  limits = np.arange(24).reshape(8, 3) % 5 + 1
  found = sample(mesh, questions, limits=limits.astype(np.int32))
  assert_same_completions(found, limited(rollout, limits))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_the_mesh_does_not_matter(sample, make_mesh, questions, rollout, sizes):
  assert_same_completions(sample(make_mesh(*sizes), questions), rollout)


def choose(monkeypatch, refill):
  monkeypatch.setattr(schedule, "refills", lambda *_: refill)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
  ("slots", "columns", "refill"),
  [(3, 8, True), (12, 1, True), (12, 2, False), (1000, 2, True)],
)
def test_neither_slots_nor_refill_nor_growth_matter(
  sample,
  make_mesh,
  questions,
  rollout,
  sizes,
  slots,
  columns,
  refill,
  monkeypatch,
):
  """With 3 or 12 slots questions wait; in the end few rows are left."""
  choose(monkeypatch, refill)
  monkeypatch.setitem(schedule._FEWEST, "cpu", 1)
  monkeypatch.setitem(schedule._NARROWEST, "cpu", columns)
  found = sample(make_mesh(*sizes), questions, slots=slots)
  assert_same_completions(found, rollout)


def limited(rollout, limits):
  """The beginnings of its completions, of so many tokens."""
  kept = rollout.completion_mask & (np.arange(8) < limits[..., None])
  whole = kept.sum(-1) == rollout.completion_mask.sum(-1)
  return dataclasses.replace(
    rollout,
    completion_mask=kept,
    completion_ids=np.where(kept, rollout.completion_ids, 0),
    truncated=~whole | rollout.truncated,
    sampler_logprobs=np.where(kept, rollout.sampler_logprobs, 0),
  )


@settings(max_examples=12, deadline=None)
@given(
  st.integers(0, 2**32 - 1),
  st.sampled_from([3, 12]),
  st.permutations(range(8)),
  st.sampled_from([5, 8]),
  st.booleans(),
  st.sampled_from([1, 2, 3, 8]),
  st.booleans(),
)
def test_limits_hold_through_refill_regrouping_and_growth(
  sample,
  mesh,
  questions,
  rollout,
  seed,
  slots,
  order,
  count,
  whole,
  columns,
  refill,
):
  """Any lengths and questions, also whole ones that end at once."""
  order = order[:count]
  random = np.random.default_rng(seed)
  limits = random.integers(1, 9, (count, 3)).astype(np.int32)
  if whole:
    limits[[1, 3]] = 1
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(schedule._FEWEST, "cpu", 1)
    patch.setitem(schedule._NARROWEST, "cpu", columns)
    choose(patch, refill)
    found = sample(
      mesh, [questions[q] for q in order], limits=limits, slots=slots
    )
  assert_same_completions(found, limited(rows(rollout, order), limits))


def test_the_shapes_of_every_program_are_counted(
  sample, mesh, questions, monkeypatch
):
  counted = set()

  @contextlib.contextmanager
  def program(name, **sizes):
    counted.add(name)
    yield

  monkeypatch.setattr(compiling, "program", program)
  monkeypatch.setitem(schedule._FEWEST, "cpu", 1)
  monkeypatch.setitem(schedule._NARROWEST, "cpu", 4)
  choose(monkeypatch, refill=True)
  sample(mesh, questions, slots=3)
  jitted = {"prefill", "admit", "caches, 4 columns", "grow, 4 columns"}
  jitted |= {"decode, 4 columns", "decode, 8 columns", "regroup, 8 columns"}
  assert counted == jitted | {"encode"}


def test_padding_is_counted(make_sampler, mesh, params, questions, draws):
  sampler = make_sampler(mesh)
  weights = sampler.weights(params)
  assert sampler.padding == {}
  for count in (1, 2):
    sampler.sample(weights, questions, key=jax.random.key(0), draws=draws)
    own = sum(len(q.prompt_ids) for q in questions)
    for name in ("padding/prompts", "padding/cache"):
      empty, size = sampler.padding[name]
      assert size - empty == count * own
    assert "padding/lanes" in sampler.padding


def test_batches_of_a_bucket_share_their_programs(
  network, mesh, banned, layout, questions, params, draws
):
  """Other lengths, pictures and totals; the data's longest decides."""
  sampler = Sampler(
    network=network,
    mesh=mesh,
    eos_ids=(11,),
    pad_id=0,
    banned=banned,
    layout=layout,
    known=Known.of(sizes_of(questions)),
  )
  weights = sampler.weights(params)
  sizes = [
    slots_module.prefill._cache_size()
    for which in ([3, 0], [2, 6], [5, 1], [2, 4], [7, 5])
    if sampler.sample(
      *(weights, [questions[i] for i in which]),
      key=jax.random.key(0),
      draws=draws,
    )
  ]
  assert len(set(sizes[1:])) == 1


def test_weights_are_cast_and_gathered_over_fsdp_alone(
  network, make_mesh, params, place_params, banned, layout
):
  mesh = make_mesh(1, 4, 2)
  placed = place_params(params, mesh)
  sampler = Sampler(
    network=dataclasses.replace(network, dtype="bfloat16"),
    mesh=mesh,
    eos_ids=(11,),
    pad_id=0,
    banned=banned,
    layout=layout,
  )
  weights = sampler.weights(placed)
  before = placed["language_model"]["layers"]["mlp"]["gate_proj"]["kernel"]
  layers = weights.decode["language_model"]["layers"]
  after = layers[1]["mlp"]["gate_proj"]["kernel"]
  assert before.sharding.shard_shape(before.shape) == (2, 8, 24)
  assert after.sharding.shard_shape(after.shape) == (32, 24)
  assert after.dtype == jnp.bfloat16
  np.testing.assert_array_equal(after, before[1].astype(jnp.bfloat16))


def test_prefill_reads_the_policys_own_weights(make_sampler, mesh, params):
  assert make_sampler(mesh).weights(params).prefill is params


# -- a chain: the next token's logits are a row of a table ---------------------

VOCAB, EOS, BANNED, PAD = 12, (9, 10), 11, 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain(Network):
  """Hidden states are the last token, one-hot; the head is the table."""

  def embed(self, params, ids, vision_index, features):
    tokens = jax.nn.one_hot(ids, VOCAB)
    return Embeds(tokens=tokens, levels=None, vision_index=vision_index)

  def read(self, params, embeds, position_ids, tree_ids):
    return embeds.tokens, []

  def init_cache(self, Q, G, C):
    return []

  def cut(self, params, i):
    return params if i is None else {}

  def cut_axes(self, i):
    return self.cut({"table": ("embed", "vocab")}, i)

  def join(self, around, layers):
    return around

  def turns(self, position_ids):
    return position_ids

  def decode(
    self, params, ids, position_ids, prompt_cache, mask, cache, written, column
  ):
    jax.debug.callback(
      lambda *fed: FED.append(jax.device_get(fed)),
      *(ids, position_ids, column, written),
    )
    return jax.nn.one_hot(ids, VOCAB), cache

  def head(self, params):
    return params["table"]


FED = []  # (ids, position_ids, column, written) of every decode step


@pytest.fixture
def chain(network, mesh, layout):
  """chain(table, starts, **draws): a rollout from prompts of two tokens."""

  def run(table, starts, slots=0, limits=None, **changes):
    FED.clear()
    sampler = Sampler(
      network=Chain(
        **{
          field.name: getattr(network, field.name)
          for field in dataclasses.fields(network)
        }
      ),
      mesh=mesh,
      eos_ids=EOS,
      pad_id=PAD,
      banned=np.arange(VOCAB) == BANNED,
      layout=layout,
      slots=slots,
    )
    draws = {
      "num_completions": 2,
      "max_completion_length": 6,
      "temperature": 0.0,
      "top_k": 0,
      "top_p": 1.0,
    }
    rollout = sampler.sample(
      sampler.weights({"table": jnp.asarray(table, jnp.float32)}),
      [question(i, start) for i, start in enumerate(starts)],
      key=jax.random.key(0),
      draws=Draws(**draws | changes),
      limits=limits,
    )
    jax.effects_barrier()
    return rollout

  return run


def question(i, start):
  return Question(
    question_id=i,
    example=Example(problem="", answer=""),
    prompt_ids=np.array([1, start], np.int32),
    position_ids=np.array([[40, 41]] * 3, np.int32) + 10 * i,
    pixel_values=np.zeros((0, 1176), np.float32),
    image_grid_thw=np.zeros((0, 3), np.int32),
  )


def table_of(path):
  """Logits that make each token of `path` follow the one before it."""
  table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB))
  for before, after in itertools.pairwise(path):
    table[before, after] = 9.0
  table[:, BANNED] = 20.0
  return table


@pytest.mark.parametrize("eos", EOS)
def test_a_completion_ends_with_any_eos_and_its_mask_covers_it(chain, eos):
  rollout = chain(table_of([2, 3, 4, 6, eos, 7]), [2, 4, 6])
  expected = [[3, 4, 6, eos, 0, 0], [6, eos, 0, 0, 0, 0], [eos, 0, 0, 0, 0, 0]]
  for g in range(2):
    np.testing.assert_array_equal(rollout.completion_ids[:, g], expected)
  lengths = np.array([4, 2, 1])
  np.testing.assert_array_equal(
    rollout.completion_mask,
    np.broadcast_to(np.arange(6) < lengths[:, None, None], (3, 2, 6)),
  )
  assert not rollout.truncated.any()
  assert (rollout.sampler_logprobs[~rollout.completion_mask] == 0).all()
  assert (rollout.sampler_logprobs[rollout.completion_mask] < 0).all()


def test_decoding_stops_with_the_last_completion(chain):
  chain(table_of([2, 3, 4, 5, 9]), [2, 4])
  assert len(FED) == 3  # the fourth token is drawn and ends the batch
  chain(table_of([2, 3, 4, 5, 2]), [2, 4])
  assert len(FED) == 5  # 6 tokens, the first of which is the prefill's


def test_ended_rows_stop_costing(chain, monkeypatch):
  """Rows of four questions are fed while they are many, then those left."""
  monkeypatch.setitem(schedule._FEWEST, "cpu", 1)
  limits = np.array([[2, 2, 2, 2], [2, 2, 3, 2], [2, 2, 2, 4], [6, 2, 2, 5]])
  rollout = chain(
    table_of([2, 3, 4, 5, 2]),
    [2, 3, 4, 2],
    num_completions=4,
    limits=limits.astype(np.int32),
  )
  np.testing.assert_array_equal(rollout.completion_mask.sum(-1), limits)
  assert [ids.shape for ids, *_ in FED] == [(4, 4), *[(4, 1)] * 3, (1, 1)]


def test_caches_grow_as_their_columns_are_written(chain, monkeypatch):
  monkeypatch.setitem(schedule._NARROWEST, "cpu", 2)
  rollout = chain(table_of([2, 3, 4, 5, 2]), [2, 3], max_completion_length=10)
  assert rollout.completion_mask.all()
  # The last of ten tokens is drawn, and never fed.
  columns = [2] * 2 + [4] * 2 + [10] * 5
  assert [written.shape for *_, written in FED] == [(2, c) for c in columns]
  for step, (*_, column, written) in enumerate(FED):
    assert column == step
    np.testing.assert_array_equal(
      written, np.arange(columns[step]) <= np.full((2, 1), step)
    )


def test_a_ring_of_all_columns_is_never_full(chain, monkeypatch):
  """Questions one after the other: 3 + 2 + 5 fed tokens through six columns."""
  monkeypatch.setitem(schedule._NARROWEST, "cpu", 2)
  limits = np.array([[4, 4], [3, 3], [6, 6]], np.int32)
  rollout = chain(table_of([2, 3, 4, 5, 2]), [2, 3, 4], slots=2, limits=limits)
  np.testing.assert_array_equal(rollout.completion_mask.sum(-1), limits)
  columns = [2] * 2 + [4] * 2 + [6] * 6
  assert [written.shape for *_, written in FED] == [(1, c) for c in columns]
  seen = [written.sum() for *_, written in FED]
  assert seen == [1, 2, 3, 1, 2, 1, 2, 3, 4, 5]


class Unshuffled:
  def permutation(self, x):
    return x


@pytest.mark.parametrize(
  ("slots", "refill"),
  [(0, True), (6, True), (2, True), (6, False), (8, False), (10, False)],
)
@pytest.mark.parametrize("seed", range(2))
def test_a_plan_foresees_the_shapes_that_decode(
  chain, monkeypatch, slots, refill, seed
):
  """Also where the last wave has fewer questions."""
  choose(monkeypatch, refill)
  monkeypatch.setitem(schedule._FEWEST, "cpu", 1)
  monkeypatch.setitem(schedule._NARROWEST, "cpu", 2)
  limits = np.random.default_rng(seed).integers(2, 11, (6, 2))
  limits[-1] = 10
  chain(
    table_of([2, 3, 4, 5, 2]),
    [2, 3, 4, 2, 3, 4],
    slots=slots,
    max_completion_length=10,
    limits=limits.astype(np.int32),
  )
  stage = SimpleNamespace(
    rollout_questions=6, num_completions=2, max_completion_length=10
  )
  run = SimpleNamespace(stage=stage, shards=1, slots=slots, lengths=None)
  # As they are drawn, not shuffled; the first token is the prefill's.
  monkeypatch.setattr(
    estimate.batch, "completion_lengths", lambda *_: limits.ravel() - 1
  )
  monkeypatch.setattr(np.random, "default_rng", lambda _: Unshuffled())
  expected = [
    (blocks, width, columns)
    for blocks, width, columns, tokens in estimate.decoded(run, refills=refill)
    for _ in range(tokens)
  ]
  assert [
    (*ids.shape, written.shape[1]) for ids, *_, written in FED
  ] == expected


@pytest.mark.parametrize(
  ("length", "expected"),
  [
    (2048, [256, 512, 1024, 2048]),
    (1000, [256, 512, 1000]),
    (767, [256, 767]),
    (384, [256, 384]),
    (383, [383]),
    (1, [1]),
  ],
)
def test_caches_double_until_they_hold_the_longest(length, expected):
  assert list(schedule.cache_columns(length, narrowest=256)) == expected


def test_a_question_that_waits_takes_the_place_of_one_that_ended(chain):
  """Two blocks for four questions, the first of which ends first."""
  limits = np.array([[2, 2], [6, 6], [3, 3], [2, 2]], np.int32)
  rollout = chain(
    table_of([2, 3, 4, 5, 2]), [2, 3, 4, 2], slots=4, limits=limits
  )
  np.testing.assert_array_equal(rollout.completion_mask.sum(-1), limits)
  path = [3, 4, 5, 2] * 2
  for q, row in enumerate(rollout.completion_ids):
    start = q % 3
    expected = np.array(path[start : start + 6])
    expected[limits[q, 0] :] = PAD
    np.testing.assert_array_equal(row, [expected] * 2)
  # Question 1's five steps hide the one of 0, the two of 2 and the one of 3.
  assert len(FED) == 5
  assert all(ids.shape == (2, 2) for ids, *_ in FED)


def test_questions_that_wait_begin_with_few_columns_when_all_have_ended(
  chain, monkeypatch
):
  choose(monkeypatch, refill=False)
  monkeypatch.setitem(schedule._NARROWEST, "cpu", 2)
  limits = np.array([[2, 2], [4, 4], [3, 3]], np.int32)
  rollout = chain(table_of([2, 3, 4, 5, 2]), [2, 3, 4], slots=4, limits=limits)
  np.testing.assert_array_equal(rollout.completion_mask.sum(-1), limits)
  shapes = [(ids.shape, written.shape[1]) for ids, *_, written in FED]
  # The last question is alone in its wave of two blocks.
  assert shapes == [((2, 2), c) for c in (2, 2, 4, 2, 2)]
  assert [int(column) for _, _, column, _ in FED] == [0, 1, 2, 0, 1]


def test_questions_take_the_place_of_ended_ones_where_weights_are_most(
  network, draws
):
  """A question's caches: 7 columns of its prompt, and 3 x 8 of completions."""
  caches = [
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((*x.shape[:2], 7, x.shape[4]), x.dtype),
      cache,
    )
    for cache in jax.eval_shape(lambda: network.init_cache(2, 1, 7))
  ]
  assert (draws.num_completions, draws.max_completion_length) == (3, 8)
  numbers = sum(x.size for x in jax.tree.leaves(caches))
  bytes_ = 4 * numbers // 7 * (7 + 3 * 8)
  for weights, expected in ((bytes_, True), (bytes_ - 1, False)):
    like = jax.ShapeDtypeStruct((weights,), jnp.int8)
    assert schedule.refills(draws, {"w": like}, caches) == expected


def test_each_step_feeds_the_token_and_the_position_that_follow(chain):
  chain(table_of([2, 3, 4, 5, 2]), [2])
  for c, (ids, position_ids, column, _) in enumerate(FED):
    assert column == c
    np.testing.assert_array_equal(ids, [[[3, 4, 5, 2][c % 4]] * 2])
    np.testing.assert_array_equal(position_ids, np.full((3, 1, 1), 42 + c))


def test_without_eos_a_completion_is_truncated(chain):
  rollout = chain(table_of([2, 3, 4, 5, 2]), [2, 9])
  assert rollout.truncated[0].all()
  assert rollout.completion_mask[0].all()
  at_the_limit = chain(table_of([2, 3, 4, 9]), [2], max_completion_length=3)
  assert not at_the_limit.truncated.any()


def test_a_banned_id_is_never_sampled_however_likely(chain):
  table = table_of([2, 3, 4, 5, 2])
  drawn = chain(table, [2, 3], temperature=2.0, num_completions=64)
  assert not (drawn.completion_ids == BANNED).any()


def test_greedy_is_the_argmax_whatever_the_key(chain):
  table = table_of([2, 3])
  table[:, [*EOS, BANNED]] = -5.0
  table[:, BANNED] = 20.0
  rollout = chain(table, [2, 7], num_completions=3)
  allowed = np.delete(table, BANNED, axis=1)
  for q, start in enumerate([2, 7]):
    last = start
    for c in range(6):
      last = int(allowed[last].argmax())
      assert (rollout.completion_ids[q, :, c] == last).all()


def test_temperature_divides_the_logits(chain):
  table = np.random.default_rng(1).normal(size=(VOCAB, VOCAB)) * 1.5
  rollout = chain(
    table,
    [2],
    num_completions=6000,
    max_completion_length=1,
    temperature=0.5,
  )
  logits = np.where(np.arange(VOCAB) == BANNED, -np.inf, table[2] / 0.5)
  share = np.exp(logits) / np.exp(logits).sum()
  ids = rollout.completion_ids[0, :, 0]
  counts = np.bincount(ids, minlength=VOCAB)
  deviation = np.sqrt(6000 * share * (1 - share))
  assert (np.abs(counts - 6000 * share) <= 4 * deviation).all()
  np.testing.assert_allclose(
    rollout.sampler_logprobs[0, :, 0], np.log(share[ids]), atol=1e-5
  )


def test_top_k_and_top_p_bound_the_draws(chain):
  table = np.log(np.array([0.4, 0.3, 0.2, 0.1] + [1e-4] * 8))
  table = np.tile(table, (VOCAB, 1))
  for bounds, expected in (
    ({"top_k": 3}, {0, 1, 2}),
    ({"top_p": 0.65}, {0, 1}),
    ({"top_k": 3, "top_p": 0.99}, {0, 1, 2}),
  ):
    drawn = chain(table, [2], num_completions=200, temperature=1.0, **bounds)
    assert set(np.unique(drawn.completion_ids)) == expected
