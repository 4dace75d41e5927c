"""Laws are judged as by hand, and one mesh is truly counted."""

import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxvlm.plan import hlo, programs
from tools import bench_scaling_mesh
from tools.bench_scaling_mesh import AXES, LAWS, SIZES, Case, cases, judge

WEIGHTS = 1_000_000
SIZES_OF = {"weights": WEIGHTS, "gathered": 1_500_000, "decoder": 600_000}
MODES = ("strong", "weak")


def lawful(axis, mode):
  """Points of which all laws are true."""
  points = []
  for case in cases(axis, mode, SIZES[-1]):
    point = {}
    for law in LAWS:
      if axis in law.axes:
        unit = SIZES_OF.get(law.unit, 7e6)
        point[law.program, law.figure] = unit * law.amount(case)
    points.append(point)
  return points


def found(axis, mode, points):
  own = cases(axis, mode, SIZES[-1])
  return {
    (one.law.program, one.law.figure): one
    for one in judge(mode, axis, own, points, SIZES_OF)
  }


def test_strong_scaling_shares_the_questions_and_weak_adds_to_them():
  def questions(mode):
    return [case.questions for case in cases("data", mode, 8)]

  assert questions("strong") == [32, 32, 32, 32]
  assert questions("weak") == [4, 8, 16, 32]
  assert [case.shards for case in cases("tensor", "weak", 4)] == [1, 1, 1]


def test_what_laws_expect_is_as_by_hand():
  case = Case(axis="data", devices=4, questions=8)
  due = {
    (axis, law.program, law.figure): law.amount(case)
    for law in LAWS
    for axis in law.axes
  }
  assert due["data", "update", "flops"] == 2  # questions of a device
  # Two microbatches; of each three quarters of the weights go around twice.
  assert due["data", "update", "all-reduce"] == 2 * 2 * 0.75
  assert due["fsdp", "update", "all-gather"] == 2 * 0.75
  assert due["fsdp", "gather", "all-gather"] == 0.75
  assert due["fsdp", "decode", "all-gather"] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", AXES)
def test_what_is_as_expected_holds_and_more_does_not(axis, mode):
  points = lawful(axis, mode)
  held = found(axis, mode, points)
  assert held and all(one.holds for one in held.values())
  for key in held:
    more = points[-1] | {key: 1.5 * points[-1][key] + 2000}
    changed = found(axis, mode, [*points[:-1], more])
    assert [k for k, one in changed.items() if not one.holds] == [key]


def test_the_table_marks_what_does_not_hold():
  points = lawful("data", "weak")
  points[-1]["decode", "all-gather"] = 1e6
  console = Console(width=150)
  with console.capture() as captured:
    found_ = found("data", "weak", points).values()
    console.print(bench_scaling_mesh.make_table(list(found_)))
  assert captured.get().count("not so") == 1


def test_lines_are_figures_and_laws():
  case, point = cases("data", "weak", 2)[1], lawful("data", "weak")[1]
  findings = list(found("data", "weak", lawful("data", "weak")).values())
  series = {("weak", "data"): [(case, point)]}
  lines = list(bench_scaling_mesh.lines(series, findings))
  json.dumps(lines)
  works = {(x["work"], x["metric"]): x for x in lines if "metric" in x}
  update = works["update data=2 weak", "all-reduce"]
  assert update["median"] == 4 * WEIGHTS and update["exact"]
  assert sum("law" in line for line in lines) == len(findings)


def test_a_loop_of_a_cpu_counts_as_often_as_it_turns():
  def turn(x, weight):
    return jnp.tanh(x @ weight), None

  scan = jax.jit(lambda x, weights: jax.lax.scan(turn, x, weights)[0])
  text = scan.lower(jnp.ones((8, 8)), jnp.ones((5, 8, 8))).compile().as_text()
  assert hlo.Module(text, dynamic_turns=99.0).cost().flops == 5 * 2 * 8**3


def test_an_update_on_a_mesh_is_counted(monkeypatch):
  # Compiling a rollout too takes three times as long.
  monkeypatch.setattr(programs, "_rollout", lambda *_: None)
  point = bench_scaling_mesh.measure(Case(axis="fsdp", devices=2, questions=4))
  due = 2 * bench_scaling_mesh.weight_bytes()["gathered"] / 2
  assert point["update", "all-gather"] == pytest.approx(due, rel=0.1)
  assert point["update", "flops"] > point["decode", "flops"] == 0


def test_an_axis_that_is_none_is_refused(capsys):
  with pytest.raises(SystemExit):
    bench_scaling_mesh.main(["--axes=model"])
  assert "no axis 'model'" in capsys.readouterr().err
