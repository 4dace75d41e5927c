"""The simulated schedules against counts made by hand."""

import numpy as np
import pytest

from tools import bench_schedule
from tools.bench_schedule import Cost

COST = Cost(column=1.0, row=1.0, shape=0.5)


def test_waiting_costs_every_row_until_the_longest():
  lengths = np.array([[1, 2], [1, 4]])
  assert bench_schedule.shrinking(lengths, COST, 0) == (4 * (1 + 4), 1)


def test_fewer_rows_cost_less_after_the_switch():
  # Halves of 4 rows: (2 blocks, 1 slot), then (1, 1).
  lengths = np.array([[1, 2], [1, 4]])
  columns = (1 + 4) + (1 + 2) + 2 * (1 + 1)
  assert bench_schedule.shrinking(lengths, COST, 2) == (columns + 2 * 0.5, 3)


@pytest.mark.parametrize("refill", [False, True])
def test_questions_that_wait_begin_when_there_is_room(refill):
  lengths = np.array([[4], [1], [3], [2]])
  total, _ = bench_schedule.slotted(lengths, COST, 2, refill=refill)
  # Waves take 4 and 3 columns. Refilled, 1 and 3 stand beside the 4, and the
  # 2 goes on alone.
  waves, refilled = 7 * (1 + 2), 4 * (1 + 2) + 0.5 + 2 * (1 + 1)
  assert total == (refilled if refill else waves)


def test_none_is_better_than_ideal_and_shrinking_is_better_than_waiting():
  lengths = [bench_schedule.draw_lengths(8, 8, 64, seed) for seed in range(5)]
  assert all(x.max() == 64 and x.min() >= 1 for x in lengths)
  found = bench_schedule.compare(lengths, COST, slots=16)
  assert list(found) == [*bench_schedule.SHRINK, "waves", "refill", "ideal"]
  cost = {name: total for name, (total, _) in found.items()}
  assert cost["ideal"] == min(cost.values())
  assert cost["halves"] < cost["quarters"] < cost["eighths"] < cost["wait"]
  assert cost["refill"] < cost["waves"]


def test_the_table_is_printed(capsys):
  bench_schedule.main(["--batches", "2", "--slots", "16"])
  printed = capsys.readouterr().out
  for name in (*bench_schedule.SHRINK, "waves", "refill", "ideal"):
    assert name in printed
