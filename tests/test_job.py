"""job.py: a stage's data entries become the mixture that they say."""

import collections
import contextlib
import json
import types

import numpy as np
import pytest
from rich.console import Console

from configs import common
from jaxvlm import job
from jaxvlm.data.loader import Loader, Source
from jaxvlm.data.rows import row_id
from jaxvlm.data.sources.files import source
from jaxvlm.display import Display
from jaxvlm.types import Question


class Processor:
  """Measures problems in letters and asks nothing else of a row."""

  def __init__(self):
    self.asked, self.measured = [], []

  def measure(self, example):
    self.measured.append(example.problem)
    return len(example.problem), 0

  def response_length(self, example):
    return 0

  def question(self, example, question_id):
    self.asked.append(example.problem)
    nothing = dict.fromkeys(
      ("prompt_ids", "position_ids", "pixel_values", "image_grid_thw")
    )
    return Question(question_id=question_id, example=example, **nothing)


@pytest.fixture
def make_opener():
  with contextlib.ExitStack() as stack:

    def make():
      display = Display(Console(record=True, width=200))
      return job._Opener(Processor(), 20, stack.enter_context(display))

    yield make


@pytest.fixture
def opener(make_opener):
  return make_opener()


def write(file, rows):
  file.write_text("\n".join(json.dumps(row) for row in rows))
  return str(file)


def entry(path, **fields):
  return common.data("files", path=path, **fields).to_dict()


def test_weights_filters_limits_annotations_and_rewards_work_together(
  opener, tmp_path
):
  a = write(
    tmp_path / "a.jsonl",
    [
      {"problem": f"a{i}" + "long" * 9 * (i == 5), "answer": "1", "level": i}
      for i in range(10)
    ],
  )
  b = write(
    tmp_path / "b.jsonl",
    [{"problem": f"b{i}", "answer": "2"} for i in range(6)],
  )
  pass_rates = write(
    tmp_path / "pass_rates.jsonl",
    [
      {"row_id": row_id(row), "pass_rate": i / 4}
      for i, row in enumerate(source(path=b)[:5])
    ],
  )
  order = "-level"
  sources = {
    "a": opener(
      "data.a",
      entry(a, weight=3.0, filter="level > 1", limit=5),
      None,
      order,
    ),
    "b": opener(
      "data.b",
      entry(
        b,
        annotations=pass_rates,
        filter="pass_rate > 0 and pass_rate < 1",
        rewards=(("exact", 1.0),),
      ),
      None,
      "pass_rate",
    ),
  }
  assert opener.dropped == {
    "data.a": {
      "outside the filter": 2,
      "beyond limit 5": 3,
      "over max_prompt_length 20": 1,
    },
    "data.b": {"outside the filter": 2, "without a value for the filter": 1},
  }
  told = opener.display.console.export_text()
  assert "filter data.a      10/10" in told
  assert "read data.b        3/3" in told
  assert (
    "data.b: dropped 2 outside the filter, 1 without a value for the filter; "
    "3 stay."
  ) in told

  def draw(total):
    stream = Loader(
      sources,
      Processor(),
      batch_size=8,
      seed=0,
      process_index=0,
      process_count=1,
      shuffle=True,
      total=total,
    )
    return [q.example for _ in range(3) for q in next(stream)]

  drawn = draw(None)
  counts = collections.Counter(example.problem for example in drawn)
  assert {n for n in counts if n[0] == "a"} == {"a2", "a3", "a4", "a6"}
  assert {n for n in counts if n[0] == "b"} == {"b1", "b2", "b3"}
  assert sum(counts[n] for n in counts if n[0] == "a") == 18
  for example in drawn:
    own = example.problem[0] == "b"
    assert example.rewards == ((("exact", 1.0),) if own else ())
    assert ("pass_rate" in example.columns) == own
  ordered = draw(24)
  assert collections.Counter(e.problem for e in ordered) == counts
  keys = [
    -e.columns["level"] if "level" in e.columns else e.columns["pass_rate"]
    for e in ordered
  ]
  assert keys == sorted(keys)


def test_an_entry_without_a_field_is_told_where_to_get_it(opener):
  with pytest.raises(ValueError, match=r"d: has no annotations, filter, limit"):
    opener("d", {"source": "files", "weight": 1.0, "rewards": ()}, None, "")
  with pytest.raises(ValueError, match=r"d: source 'files': .*'pth'"):
    opener("d", common.data("files", path="a", pth="a").to_dict(), None, "")


def test_a_stage_moved_or_renamed_draws_the_same_rows_in_the_same_order(
  opener, tmp_path
):
  path = write(
    tmp_path / "a.jsonl",
    [{"problem": f"p{i}", "answer": "1"} for i in range(9)],
  )
  rows = opener("d", entry(path), None, "")

  def stage(name):
    return types.SimpleNamespace(
      name=name, rollout_questions=4, shuffle=True, order="", steps=3
    )

  def draw(index, names):
    made = types.SimpleNamespace(
      schedule=[stage(name) for name in names],
      sources={name: {f"of_{name}": rows} for name in names},
      processor=Processor(),
      config={"seed": 5},
    )
    stream = job.Job.make_loader(made, index)
    return [q.example.problem for _ in range(4) for q in next(stream)]

  first = draw(0, ["seeing", "thinking"])
  assert draw(1, ["thinking", "seeing"]) == first
  assert draw(0, ["looking"]) == first
  assert first[:9] != sorted(first[:9])


@pytest.mark.parametrize(
  ("field", "value", "expected"),
  [
    *(
      (field, least - 1, f"{least} or more")
      for field, least in job._LEAST.items()
    ),
    *((field, 0.0, "more than 0") for field in job._POSITIVE),
    ("evaluation.temperature", float("nan"), "a finite number"),
    ("limits.skipped_updates", float("inf"), "a finite number"),
  ],
)
def test_a_number_that_cannot_be_is_refused_by_its_field(
  field, value, expected
):
  config = common.base()
  job.check_numbers(config.to_dict())
  section, name = field.split(".")
  assert name in config[section]
  numbers = config.to_dict()
  numbers[section][name] = value
  with pytest.raises(
    ValueError, match=rf"^{field}: got {value}; expected {expected}\.$"
  ):
    job.check_numbers(numbers)


def test_a_host_prepares_its_own_held_out_questions_and_knows_all_sizes(
  make_opener, tmp_path, among_hosts, make_mesh
):
  rows = [
    {"problem": "q" * n, "answer": str(n), "task": f"t{n}"}
    for n in (1, 2, 3, 4)
  ]
  data = entry(write(tmp_path / "held_out.jsonl", rows))
  evaluation = {
    "capabilities": ("see",),
    "sets": {"see": {"reward": "exact", "data": data}},
    "batch_questions": 3,
  }
  openers = [make_opener() for _ in range(2)]

  def with_rows(host):
    opener = openers[host]
    made = job.Job(
      config={"seed": 0, "evaluation": evaluation},
      processor=opener.processor,
      schedule=(),
      mesh=make_mesh(1, 1, 1),
      **dict.fromkeys(("workdir", "checkpoint", "network", "banned")),
      **dict.fromkeys(("sources", "held_out", "dropped")),
    )
    return job._with_rows(made, opener)

  found = among_hosts(2, with_rows)
  for one, opener, own in zip(
    found, openers, (["q", "qqq"], ["qq", "qqqq"]), strict=True
  ):
    (see,) = one.held_out
    assert sorted(opener.processor.measured) == own
    assert opener.processor.asked == own
    assert [q.example.problem for q in see.questions] == own
    assert [e.task for e in see.examples] == ["t1", "t2", "t3", "t4"]
    assert one.known.tokens == 4
    (tried,) = one.known.batches
    assert tried[:, 0].tolist() == [1, 2, 3]


def test_batches_are_tried_as_the_stages_will_draw_them(make_mesh):
  """Each data shard's share of a step, in the sources' proportions."""

  def rows(weight, size):
    return Source(weight, (), np.zeros(0, int), (), np.array([size]))

  named = {"shown": rows(3.0, (10, 4)), "text": rows(1.0, (20, 0))}
  made = types.SimpleNamespace(
    mesh=make_mesh(2, 1, 1),
    schedule=[
      types.SimpleNamespace(name="learn", kind="sft"),
      types.SimpleNamespace(name="ask", kind="grpo", rollout_questions=16),
    ],
    sources={"ask": named},
    held_out=(),
    config={"evaluation": {"batch_questions": 4}},
  )
  found = list(job.Job._tried(made))
  assert found
  for batch in found:
    assert batch.tolist() == 6 * [[10, 4]] + 2 * [[20, 0]]
