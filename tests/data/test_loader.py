"""The stream is the same for any number of hosts and goes on where it was."""

import collections
import itertools
import json
import time

import numpy as np
import pytest

from jaxvlm.data import loader
from jaxvlm.data.rows import row_id
from jaxvlm.types import Example


def make_rows(count, tag="", **changes):
  return [
    Example(problem=f"{tag}{i}", answer="1", name=f"{tag}[{i}]", **changes)
    for i in range(count)
  ]


def make_loader(processor, sources, **changes):
  settings = {
    "batch_size": 4,
    "seed": 0,
    "process_index": 0,
    "process_count": 1,
    "shuffle": True,
    "total": None,
  }
  return loader.Loader(sources, processor, **(settings | changes))


def whole(rows, weight=1.0, kept=None, keys=None):
  kept = np.arange(len(rows)) if kept is None else kept
  ids = [row_id(rows[i]) for i in kept]
  sizes = np.ones((len(kept), 2), int)
  return loader.Source(weight, rows, kept, ids, sizes, keys)


def take(batches, count):
  return [
    [(q.question_id, q.example.problem) for q in next(batches)]
    for _ in range(count)
  ]


def flat(batches):
  return [pair for batch in batches for pair in batch]


@pytest.fixture(scope="module")
def mixture():
  a, b = make_rows(10, "a"), make_rows(7, "b")
  return {"a": whole(a, 3.0), "b": whole(b, kept=np.array([1, 4, 6]))}


def test_each_epoch_shows_every_row_once_in_a_new_order(processor):
  stream = make_loader(processor, {"a": whole(make_rows(8))})
  seen = flat(take(stream, 6))
  epochs = [[p for _, p in seen[i : i + 8]] for i in (0, 8, 16)]
  assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  assert [i for i, _ in seen] == list(range(24))


def test_the_order_is_a_function_of_the_seed(processor, mixture):
  first = take(make_loader(processor, mixture), 5)
  assert take(make_loader(processor, mixture), 5) == first
  assert take(make_loader(processor, mixture, seed=1), 5) != first


def test_the_order_is_not_of_the_names_nor_of_other_sources(processor):
  a, b = whole(make_rows(9, "a"), 2.0), whole(make_rows(5, "b"))
  both = take(make_loader(processor, {"a": a, "b": b}), 6)
  assert take(make_loader(processor, {"z": a, "y": b}), 6) == both
  assert take(make_loader(processor, {"b": b, "a": a}), 6) == both
  alone = [p for _, p in flat(take(make_loader(processor, {"q": a}), 3))]
  assert [p for _, p in flat(both) if p.startswith("a")][:9] == alone[:9]
  fewer = a._replace(kept=a.kept[1:], row_ids=a.row_ids[1:])
  changed = take(make_loader(processor, {"q": fewer}), 3)
  assert [p for _, p in flat(changed)][:8] != [p for p in alone if p != "a0"][
    :8
  ]


def test_an_ordered_stream_sorts_the_draws_it_would_have_made(
  processor, mixture
):
  keyed = {
    name: source._replace(keys=-(source.kept % 3).astype(float))
    for name, source in mixture.items()
  }
  unordered = flat(take(make_loader(processor, keyed), 6))
  stream = make_loader(processor, keyed, total=24)
  ordered = flat(take(stream, 6))
  assert [i for i, _ in ordered] == list(range(24))
  by_key = sorted(unordered, key=lambda pair: -(int(pair[1][1:]) % 3))
  assert [p for _, p in ordered] == [p for _, p in by_key]
  assert [p for _, p in ordered] != [p for _, p in unordered]
  again = [p for _, p in flat(take(stream, 1))]
  assert again == [p for _, p in ordered[:4]]


def test_without_shuffle_rows_come_in_order(processor):
  rows = {"a": whole(make_rows(3))}
  seen = flat(take(make_loader(processor, rows, shuffle=False), 2))
  assert [p for _, p in seen] == ["0", "1", "2", "0", "1", "2", "0", "1"]


def test_sources_are_mixed_by_weight_and_only_kept_rows_are_shown(
  processor, mixture
):
  seen = [p for _, p in flat(take(make_loader(processor, mixture), 10))]
  assert sum(p.startswith("a") for p in seen) == 30
  assert {p for p in seen if p.startswith("b")} == {"b1", "b4", "b6"}


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_together_see_the_batches_of_one(processor, mixture, count):
  want = take(make_loader(processor, mixture), 5)
  hosts = [
    take(
      make_loader(processor, mixture, process_index=i, process_count=count), 5
    )
    for i in range(count)
  ]
  got = [flat(parts) for parts in zip(*hosts, strict=True)]
  assert got == want


@pytest.mark.parametrize("total", [None, 40])
@pytest.mark.parametrize("done", [0, 1, 3, 7])
def test_a_restored_stream_goes_on_where_it_was(
  processor, mixture, done, total
):
  mixture = {
    name: source._replace(keys=np.sin(source.kept))
    for name, source in mixture.items()
  }
  stream = make_loader(processor, mixture, total=total)
  take(stream, done)
  time.sleep(0.05)  # the threads run ahead of what was handed out
  state = json.loads(json.dumps(stream.get_state()))
  want = take(stream, 6)
  restored = make_loader(processor, mixture, total=total)
  restored.set_state(state)
  assert take(restored, 6) == want
  restored.set_state(state)  # also back
  assert take(restored, 6) == want


def test_a_question_is_had_again_by_its_id_on_any_host(processor, mixture):
  here, there = (
    make_loader(processor, mixture, process_count=2, process_index=i)
    for i in range(2)
  )
  for question in itertools.chain(*(next(here) for _ in range(5))):
    again = there.question(question.question_id)
    assert again.question_id == question.question_id
    assert again.example == question.example
    np.testing.assert_array_equal(again.prompt_ids, question.prompt_ids)
    np.testing.assert_array_equal(again.pixel_values, question.pixel_values)


def test_a_row_that_cannot_be_prepared_ends_the_stream_named(processor):
  rows = make_rows(1, "bad", images=(b"no",))
  stream = make_loader(processor, {"a": whole(rows)})
  with pytest.raises(ValueError, match=r"bad\[0\]: 0 <image> markers"):
    next(stream)


def test_mixtures_that_cannot_be_are_refused(processor, mixture):
  with pytest.raises(ValueError, match="at least one source"):
    make_loader(processor, {})
  with pytest.raises(ValueError, match="data a: no rows"):
    make_loader(processor, {"a": whole([])})
  with pytest.raises(ValueError, match="data a: weight 0"):
    make_loader(processor, {"a": whole(make_rows(2), 0)})
  with pytest.raises(ValueError, match=r"4 questions a step .* 3 hosts"):
    make_loader(processor, mixture, process_count=3)


def questions(source, processor, index=0, count=1):
  return loader.questions(
    source,
    loader.shown(source, 0),
    processor,
    process_index=index,
    process_count=count,
  )


def test_questions_keep_order_and_index(processor):
  got = questions(whole(make_rows(5), kept=np.array([3, 1])), processor)
  assert [(q.question_id, q.example.problem) for q in got] == [
    (3, "3"),
    (1, "1"),
  ]
  assert type(got[0].question_id) is int


def test_hosts_prepare_the_questions_of_one_without_another(processor):
  source = whole(make_rows(5), kept=np.array([4, 2, 1]))
  got = [questions(source, processor, i, 2) for i in range(2)]
  assert [[q.question_id for q in own] for own in got] == [[4, 1], [2]]
  (filling,) = questions(source, processor, 3, 4)
  assert filling.question_id == 4


def test_options_come_in_another_order_at_each_draw(processor):
  problem = "Which?\nA. cat\nB. dog\nC. cow\nD. hen"
  row = Example(problem=problem, answer="B", name="a")
  source = whole([row, row])._replace(shuffle_options=True)

  def draws(**changes):
    stream = make_loader(processor, {"a": source}, **changes)
    return [q.example for _ in range(8) for q in next(stream)]

  drawn = draws()
  for example in drawn:
    assert f"\n{example.answer}. dog" in example.problem
  assert {example.answer for example in drawn} == set("ABCD")
  assert draws() == drawn != draws(seed=1)
  stream = make_loader(processor, {"a": source})
  next(stream)
  state = stream.get_state()
  again = make_loader(processor, {"a": source})
  again.set_state(state)
  assert [q.example for q in next(again)] == drawn[4:8]
  ordered = source._replace(keys=np.array([1.0, 0.0]))
  stream = make_loader(processor, {"a": ordered}, total=32)
  assert collections.Counter(
    q.example.problem for _ in range(8) for q in next(stream)
  ) == collections.Counter(example.problem for example in drawn)
  held_out = loader.shown(source, 0)
  assert held_out == loader.shown(source, 0)
  assert [q.example for q in questions(source, processor)] == held_out
  kept = whole([row])
  assert next(make_loader(processor, {"a": kept}))[0].example.answer == "B"


def inspect(examples, processor, rows=None, **changes):
  settings = {
    "name": "stages.x.data.y",
    "max_prompt_length": 1000,
    "max_response_length": None,
    "watch": lambda items, description, total: items,
  }
  rows = np.arange(len(examples)) if rows is None else rows
  return loader.inspect(examples, rows, processor, **(settings | changes))


def test_long_prompts_are_dropped_and_counted(processor):
  rows = make_rows(6)
  rows[2] = Example(problem="long " * 50, answer="1")
  rows[5] = Example(
    problem="<image>",
    answer="1",
    images=(np.zeros((560, 560, 3), np.uint8),),
  )
  seen = []

  def watch(items, description, total):
    for item in items:
      yield item
      seen.append((description, total))

  found = inspect(
    rows,
    processor,
    max_prompt_length=100,
    watch=watch,
  )
  assert found.kept.tolist() == [0, 1, 3, 4]
  assert found.dropped == {"over max_prompt_length 100": 2}
  assert found.row_ids == [row_id(rows[i]) for i in found.kept]
  expected = [processor.measure(rows[i]) for i in found.kept]
  assert found.sizes.tolist() == [list(sizes) for sizes in expected]
  assert seen == [("read stages.x.data.y", 6)] * 6


@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_hosts_read_a_share_each_and_know_all(processor, among_hosts, hosts):
  rows = make_rows(7)
  rows[3] = Example(problem="long " * 50, answer="1")
  alone = inspect(rows, processor, max_prompt_length=100)
  read = []

  def one_host(index):
    own = []
    read.append(own)

    def watch(items, description, total):
      own.extend(items)
      assert len(own) == total
      return own

    return inspect(rows, processor, max_prompt_length=100, watch=watch)

  for found in among_hosts(hosts, one_host):
    assert found.kept.tolist() == alone.kept.tolist() == [0, 1, 2, 4, 5, 6]
    assert found.row_ids == alone.row_ids
    assert found.sizes.tolist() == alone.sizes.tolist()
    assert found.dropped == alone.dropped
  assert max(map(len, read)) == -(-7 // hosts)
  assert sorted(row for own in read for row in own) == sorted(
    (*processor.measure(row), 0, int(row_id(row), 16)) for row in rows
  )


def test_the_limit_itself_is_kept(processor):
  length = processor.length(make_rows(1)[0])
  kept = inspect(make_rows(1), processor, max_prompt_length=length).kept
  assert kept.tolist() == [0]


def test_rows_that_were_not_chosen_are_not_looked_at(processor):
  rows = [*make_rows(3), Example(problem="", answer="")]
  found = inspect(rows, processor, rows=np.array([2, 0]))
  assert found.kept.tolist() == [2, 0]
  assert found.row_ids == [row_id(rows[2]), row_id(rows[0])]


def test_long_responses_are_dropped_where_they_are_learned(processor):
  rows = make_rows(3, response="abc") + make_rows(2, response="abc " * 20)
  found = inspect(rows, processor, max_response_length=4)
  assert found.kept.tolist() == [0, 1, 2]
  assert found.dropped == {"over max_response_length 4": 2}
  assert inspect(rows, processor).dropped == {}


def test_all_dropped_names_the_limit(processor):
  with pytest.raises(
    ValueError, match=r"y: all 3 rows .* max_prompt_length = 5 .* has \d\d tok"
  ):
    inspect(make_rows(3), processor, max_prompt_length=5)
  with pytest.raises(ValueError, match="max_response_length = 1"):
    inspect(
      make_rows(3, response="abc"),
      processor,
      max_prompt_length=1000,
      max_response_length=1,
    )


def test_bad_rows_are_errors_before_any_compute(processor):
  with pytest.raises(ValueError, match=r"data\.y: the data set is empty"):
    inspect([], processor)
  for wrong, message in (
    (Example(problem="a", answer="", name="f[1]"), r"f\[1\]: no answer"),
    (Example(problem="a", answer=""), r"stages\.x\.data\.y\[1\]: no answer"),
    (Example(problem="<image>", answer="1", name="f"), "f: 1 <image> markers"),
    (
      Example(problem="<image>", answer="1", name="f", images=("gone.png",)),
      "f: picture 1: cannot read the picture: no such file",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      inspect([make_rows(1)[0], wrong], processor)
  with pytest.raises(ValueError, match=r"\[0\]: no response"):
    inspect(make_rows(1), processor, max_response_length=9)


def test_thousands_of_rows_are_checked_in_seconds(processor):
  picture = np.zeros((56, 56, 3), np.uint8)
  row = Example(
    problem="<image>what is in the top left?", answer="1", images=(picture,)
  )
  start = time.perf_counter()
  assert len(inspect([row] * 3000, processor).kept) == 3000
  assert time.perf_counter() - start < 5  # 0.4 s on a quiet core


@pytest.mark.parametrize("total", [None, 40, 24])
def test_rows_are_counted_as_they_are_asked(processor, total):
  a, b = make_rows(10, "a"), make_rows(7, "b")
  sources = {
    "a": whole(a, 3.0, keys=np.arange(10.0)),
    "b": whole(b, kept=np.array([1, 4, 6]), keys=np.zeros(3)),
  }
  stream = make_loader(processor, sources, total=total)
  asked = [problem for _, problem in flat(take(stream, 10))]
  counts = stream.count(40)
  assert {name: each.tolist() for name, each in counts.items()} == {
    "a": [asked.count(f"a{i}") for i in range(10)],
    "b": [asked.count(f"b{i}") for i in (1, 4, 6)],
  }
