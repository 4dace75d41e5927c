"""Rows of reasoning-gym's own tasks, the same wherever they are made."""

import os
import subprocess
import sys

import pytest

from jaxvlm.data.rows import row_id
from jaxvlm.data.sources.reasoning_gym import UNSTABLE, source

pytest.importorskip("reasoning_gym")

SETTINGS = {
  "tasks": ("leg_counting", "countdown"),
  "size": 7,
  "seed": 3,
  "configs": {"leg_counting": {"max_animals": 4}},
}


def make(**changes):
  return source(**SETTINGS | changes)


def test_tasks_take_turns():
  rows = make()
  assert len(rows) == 7
  tasks = [row.task for row in rows]
  assert tasks == ["leg_counting", "countdown"] * 3 + ["leg_counting"]
  assert len({row_id(row) for row in rows}) == 7
  assert rows[-1] == rows[6]
  assert [row.name for row in rows[1:3]] == [
    "reasoning_gym/countdown[0]",
    "reasoning_gym/leg_counting[1]",
  ]
  assert all(row.answer for row in rows)
  with pytest.raises(IndexError):
    rows[7]


def test_a_tasks_config_is_the_configs():
  def most(**changes):
    rows = make(tasks="leg_counting", size=20, **changes)
    animals = [row.problem.rpartition("if you have ")[2] for row in rows]
    return max(text.count(",") + 1 for text in animals)

  assert most() == 4
  assert most(configs={}) > 4


def test_another_seed_gives_other_rows():
  problems = [{row.problem for row in make(seed=seed)} for seed in (3, 4)]
  assert not problems[0] & problems[1]


def test_rows_are_the_same_in_another_process():
  script = (
    "from jaxvlm.data.rows import row_id\n"
    "from jaxvlm.data.sources.reasoning_gym import source\n"
    f"print(*[row_id(row) for row in source(**{SETTINGS!r})])"
  )
  out = subprocess.run(
    [sys.executable, "-c", script],
    env=os.environ | {"PYTHONHASHSEED": "7"},
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert out.split() == [row_id(row) for row in make()]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tasks": ("leg_count",)}, "no task 'leg_count'; there are ab, "),
    ({"configs": {"x": {}}}, "no task 'x'"),
    ({"tasks": (UNSTABLE[0],)}, "differ from process to process"),
    ({"tasks": ("graph_color",)}, "graph_color: its rows have no answer"),
    ({"tasks": ()}, r"got tasks \[\]"),
    ({"size": 0}, "size 0; expected at least"),
    (
      {"configs": {"leg_counting": {"animals": 3}}},
      "leg_counting: .*unexpected keyword argument 'animals'",
    ),
    (
      {"configs": {"leg_counting": {"min_animals": -1}}},
      "leg_counting: min_animals must be positive",
    ),
  ],
)
def test_what_it_does_not_take_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_without_the_package_the_remedy_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
  with pytest.raises(
    ValueError, match=r"pip install 'jaxvlm\[reasoning-gym\]'"
  ):
    make()
