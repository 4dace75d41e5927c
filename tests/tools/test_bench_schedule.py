"""The simulated schedules against counts made by hand."""

import numpy as np
import pytest

from tools import bench_schedule
from tools.bench_schedule import Cost

COST = Cost(step=1.0, row=1.0, shape=0.5)


def test_waiting_costs_every_row_until_the_longest():
  lengths = np.array([[1, 2], [1, 4]])
  total, shapes = bench_schedule.shrinking(lengths, COST, 0, [4])
  assert total == 4 * (1 + 4) and shapes == {(4, 4)}


def test_fewer_rows_cost_less_after_the_switch():
  # Halves of 4 rows: (2 blocks, 1 slot), then (1, 1).
  lengths = np.array([[1, 2], [1, 4]])
  total, shapes = bench_schedule.shrinking(lengths, COST, 2, [4])
  assert total == (1 + 4) + (1 + 2) + 2 * (1 + 1) + 2 * 0.5
  assert shapes == {(4, 4), (2, 4), (1, 4)}


def test_a_row_reads_the_columns_that_its_cache_has():
  lengths = np.array([[1, 2], [1, 4]])
  cost = Cost(step=0.0, row=0.0, shape=0.0, read=1.0)
  total, shapes = bench_schedule.shrinking(lengths, cost, 0, [1, 2, 4])
  assert total == 4 * (1 + 2 + 4 + 4)
  assert shapes == {(4, 1), (4, 2), (4, 4)}
  # Two steps later they are larger.
  total, _ = bench_schedule.shrinking(lengths, cost, 0, [1, 2, 4, 8], clock=2)
  assert total == 4 * (4 + 4 + 8 + 8)
  assert bench_schedule.ideal(lengths, cost) == 1 + (1 + 2) + 1 + 10


@pytest.mark.parametrize(
  ("schedule", "expected"),
  [
    # Of two rows each; a wave's longer one ends alone.
    ("waves", (1 + 2) + 3 * (1 + 1) + 2 * (1 + 2) + (1 + 1) + 2 * 0.5),
    # 1 and 3 stand beside the 4, and the 2 goes on alone.
    ("refill", 4 * (1 + 2) + 0.5 + 2 * (1 + 1)),
  ],
)
def test_questions_that_wait_begin_when_there_is_room(schedule, expected):
  lengths = np.array([[4], [1], [3], [2]])
  found = getattr(bench_schedule, schedule)(lengths, COST, 2, [4])
  assert found == (expected, {(2, 4), (1, 4)})


def drawn(longest):
  return [bench_schedule.draw_lengths(8, 8, longest, n) for n in range(5)]


def test_none_is_better_than_ideal_and_shrinking_is_better_than_waiting():
  assert all(x.max() == 64 and x.min() >= 1 for x in drawn(64))
  found = bench_schedule.compare(drawn(64), COST, 16, 64)
  assert list(found) == [
    *(*bench_schedule.SHRINK, "whole", "waves", "refill", "ideal"),
  ]
  cost = {name: total for name, (total, _) in found.items()}
  assert cost["ideal"] == min(cost.values())
  assert cost["halves"] < cost["quarters"] < cost["eighths"] < cost["wait"]
  assert cost["whole"] == cost["quarters"]  # where none grows


def test_where_steps_are_dear_refill_costs_less_than_waves():
  cost = Cost(step=10.0, row=0.05, shape=1.0)
  found = bench_schedule.compare(drawn(64), cost, 16, 64)
  assert found["refill"][0] < found["waves"][0]


def test_where_reading_is_dear_caches_that_grow_cost_less_and_so_do_waves():
  cost = Cost(step=0.4, row=0.05, shape=1.0, read=1e-2)
  found = bench_schedule.compare(drawn(512), cost, 16, 64)
  assert 2 * found["quarters"][0] < found["whole"][0]
  assert found["waves"][0] < found["refill"][0]
  assert found["whole"][1] < found["quarters"][1]


def test_the_table_is_printed(capsys):
  bench_schedule.main(["--batches", "2", "--slots", "16"])
  printed = capsys.readouterr().out
  for name in (*bench_schedule.SHRINK, "whole", "waves", "refill", "ideal"):
    assert name in printed
