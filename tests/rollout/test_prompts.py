"""Prompts in packed rows, and the few sizes that these have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm import filling
from jaxvlm.data.vision_layout import token_places
from jaxvlm.encoder import Encoder
from jaxvlm.filling import UNKNOWN, Known
from jaxvlm.rollout import prompts
from jaxvlm.rollout.prompts import Bucket

families = pytest.mark.parametrize(
  "family", ["qwen2_5_vl", "qwen3_vl"], indirect=True
)
ROW = 64


@pytest.fixture(autouse=True, scope="module")
def short_rows():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(prompts._ROW, "cpu", ROW)
    yield


@pytest.fixture(scope="module")
def encoded(network, mesh, layout, params, questions):
  return Encoder(network=network, mesh=mesh, layout=layout)(params, questions)


@pytest.fixture(scope="module")
def bucket(questions):
  return prompts.find((), max(len(q.prompt_ids) for q in questions))


@families
@pytest.mark.parametrize("shards", [1, 2])
def test_a_questions_columns_are_its_prompt(encoded, layout, bucket, shards):
  real = np.arange(8) != 5
  packed = prompts.pack(
    encoded, real, shards=shards, bucket=bucket, layout=layout
  )
  found = packed.prompts
  each = 8 // shards
  for q, question in enumerate(encoded):
    columns = found.columns[q]
    if not real[q]:
      assert (columns == -1).all()
      continue
    length = len(question.prompt_ids)
    assert (columns[length:] == -1).all()
    own = columns[:length]
    np.testing.assert_array_equal(np.diff(own), 1)
    u, first = divmod(own[0], bucket.row)
    at = np.s_[q // each, u, first : first + length]
    np.testing.assert_array_equal(found.ids[at], question.prompt_ids)
    assert len(np.unique(found.tree_ids[at])) == 1
    np.testing.assert_array_equal(
      found.position_ids[:, *at], question.position_ids
    )
    np.testing.assert_array_equal(
      found.following[q], question.position_ids[:, -1] + 1
    )
    shown = question.prompt_ids == layout.image_token_id
    index = found.vision_index[at]
    np.testing.assert_array_equal(index >= 0, shown)
    places = token_places(question.image_grid_thw, layout)
    seen = [found.vision.tokens[None]]
    if found.vision.levels is not None:
      seen.append(found.vision.levels)
    np.testing.assert_array_equal(
      np.concatenate(seen)[:, q // each, u, index[shown]],
      question.features[:, places],
    )
  real_columns = (found.tree_ids >= 0).sum()
  assert real_columns == sum(
    len(q.prompt_ids) for q, there in zip(encoded, real, strict=True) if there
  )
  empty, size = packed.padding
  assert size == shards * packed.reads * bucket.row
  assert size - empty == real_columns
  assert (found.tree_ids[:, packed.reads :] == -1).all()


def test_prompts_share_rows(encoded, layout, bucket):
  packed = prompts.pack(
    encoded, np.ones(8, bool), shards=1, bucket=bucket, layout=layout
  )
  assert packed.reads < 8
  assert (packed.prompts.tree_ids == 1).any()


def test_text_alone_has_no_lane(questions, layout, bucket):
  text = [questions[2], questions[6]]
  real = np.ones(2, bool)
  packed = prompts.pack(text, real, shards=1, bucket=bucket, layout=layout)
  assert packed.prompts.vision is None


def test_the_smallest_bucket_that_holds_the_longest_is_taken():
  buckets = (Bucket(16, 64), Bucket(48, 80))
  assert prompts.find(buckets, 16) == buckets[0]
  assert prompts.find(buckets, 17) == buckets[1]
  assert prompts.find(buckets, 49) == Bucket(64, 64)  # one of its own
  assert prompts.find((), 100) == Bucket(128, 128)


def known(*batches):
  """Prompts of these lengths, and no pictures."""
  sizes = [np.stack([own, np.zeros_like(own)], 1) for own in batches]
  return Known(int(max(map(np.max, batches))), 0, sizes)


def test_buckets_are_those_that_pad_batches_least():
  """A prompt takes the places of its batch's longest."""
  batches = [np.array([5, longest]) for longest in (17, 18, 17, 40, 39, 90)]
  found = prompts.choose(known(*batches))
  assert [bucket.prompt for bucket in found] == [18, 40, 90]
  assert prompts.choose(UNKNOWN) == ()
  assert [b.prompt for b in prompts.choose(known(np.array([33, 34])))] == [34]


def test_the_longest_prompt_has_a_bucket_though_no_batch_tried_has_it():
  few = known(np.array([17, 18]))._replace(tokens=301)
  assert [b.prompt for b in prompts.choose(few)] == [18, 301]


@settings(max_examples=40, deadline=None)
@given(
  st.lists(
    st.lists(st.integers(1, 400), min_size=1, max_size=9).map(np.array),
    min_size=1,
    max_size=9,
  )
)
def test_a_bucket_holds_every_prompt_and_rows_hold_a_bucket(batches):
  found = prompts.choose(known(*batches))
  assert len(found) <= 3
  assert found == tuple(sorted(set(found)))
  assert found[-1].prompt >= max(map(np.max, batches))
  assert all(bucket.row >= max(bucket.prompt, ROW) for bucket in found)


@pytest.mark.parametrize("low", [14, 20, 60, 96, 150])
@pytest.mark.parametrize("count", [96, 256])
def test_a_batch_of_prompts_of_like_length_fills_its_rows(
  low, count, monkeypatch
):
  """At most 15 % of the columns that are read are padding."""
  monkeypatch.setitem(prompts._ROW, "cpu", 256)
  random = np.random.default_rng(low)
  tried, others = random.integers(low, low * 6 // 5, (2, 4, count))
  bucket = prompts.choose(known(*tried))[-1]
  rows = sum(len(filling.first_fit(other, bucket.row)) for other in others)
  assert others.sum() >= 0.85 * rows * bucket.row
