"""Points are measured, laws are judged as by hand, and all of it is shown."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from tools import bench_compare, bench_scaling
from tools.bench import Lab
from tools.bench_scaling import AXES, LAWS, PROGRAMS, Sizes, fit_slope


def test_the_slope_is_that_of_the_upper_half():
  # Flat at first, then the square.
  assert fit_slope([1, 2, 4, 8], [5, 5, 5, 20]) == pytest.approx(2)
  assert fit_slope([1, 2, 4, 8, 16], [9, 9, 1, 2, 4]) == pytest.approx(1)
  assert fit_slope([1, 2], [1, 8]) == pytest.approx(3)


def test_a_row_has_the_tokens_of_the_update():
  sizes = Sizes(group=3, completion=5, prompt=7, images=2)
  network = bench_scaling.make_network(sizes.depth)
  lab = Lab(
    network=network,
    params=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), network.shapes()),
    reference=lambda: None,
    arrays={},
    group=3,
    length=5,
    microbatch_tokens=2048,
  )
  question = bench_scaling.make_question(lab, sizes)
  assert bench_scaling.row_tokens(sizes) == len(question.prompt_ids) + 3 * 5
  assert question.image_grid_thw.tolist() == [[1, 16, 16]] * 2


def test_operations_are_those_of_the_program_and_its_size():
  few, many = Sizes(completion=64), Sizes(completion=128)
  prompt, rollout, update = (
    [bench_scaling.needed(program, sizes) for sizes in (few, many)]
    for program in ("prompt", "rollout", "update")
  )
  assert prompt[0] == prompt[1] < rollout[0]
  assert rollout[0] < update[0]
  # Twice the tokens of completions, which see more; a picture and a prompt.
  assert 1.5 < rollout[1] / rollout[0] < 2.5


def test_every_axis_is_a_size_and_has_laws_of_what_is_measured():
  assert {field.name for field in dataclasses.fields(Sizes)} == set(AXES)
  assert set(LAWS) == set(AXES)
  for laws in LAWS.values():
    assert {law.program for law in laws} <= set(PROGRAMS)
    assert {law.figure for law in laws} <= set(bench_scaling.FIGURES)


def make_points(axis, *, power, changed=1.0):
  """Each figure grows with this power of what its law is about."""
  points = []
  for size in AXES[axis]:
    point = {}
    for law in LAWS[axis]:
      value = float(bench_scaling.extent(law, axis, size)) ** power
      if law.power is None:
        value = changed if size == AXES[axis][-1] else 1.0
      point[law.program, law.figure] = [value / 2, value, 9 * value]
    points.append(point)
  return points


@pytest.mark.parametrize("axis", AXES)
def test_growth_as_expected_holds_and_faster_does_not(axis):
  for power in (0.0, 1.0, 2.0, 3.0):
    points = make_points(axis, power=power)
    for found in bench_scaling.judge(axis, AXES[axis], points):
      if found.law.power is not None:
        assert found.measured == pytest.approx(power, abs=1e-9)
        assert found.holds == (power <= found.law.power)


@pytest.mark.parametrize(
  "changed, holds", [(1.0, True), (1.4, True), (1.6, False), (0.4, False)]
)
def test_what_changes_is_not_independent(changed, holds):
  points = make_points("depth", power=1.0, changed=changed)
  (found,) = [
    one
    for one in bench_scaling.judge("depth", AXES["depth"], points)
    if one.law.power is None
  ]
  assert found.measured == pytest.approx(changed - 1)
  assert found.holds == holds


def test_the_table_marks_what_does_not_hold():
  axes = {"images": AXES["images"]}
  points = {"images": make_points("images", power=3.0)}
  findings = bench_scaling.judge("images", axes["images"], points["images"])
  table = bench_scaling.make_table(axes, points, findings)
  console = Console(width=150)
  with console.capture() as captured:
    console.print(table)
  assert captured.get().count("power 3.00, no") == len(LAWS["images"])


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(
    bench_scaling,
    "BASE",
    Sizes(group=1, completion=64, prompt=2, images=1, depth=1),
  )
  monkeypatch.setattr(bench_scaling, "SIDE", 28)
  monkeypatch.setattr(bench_scaling, "SHORTEST", 0.0)
  monkeypatch.setitem(AXES, "group", (1, 8, 64))
  yield
  jax.config.update("jax_enable_compilation_cache", True)


def test_an_axis_is_measured_drawn_and_told(small, tmp_path, capsys):
  bench_scaling.main(
    ["--axes=group", "--most=2", "--reps=2", "--wait=0", f"--out={tmp_path}"]
  )
  said = capsys.readouterr()
  lines = [json.loads(line) for line in said.out.splitlines()]
  figures = {(x["work"], x["metric"]): x for x in lines if "metric" in x}
  measured = {
    *((program, "s") for program in PROGRAMS),
    *((p, f) for p in ("rollout", "update") for f in ("mb", "compile_s")),
  }
  assert set(figures) == {
    (f"{program} group={size}", figure)
    for program, figure in measured
    for size in (1, 8)
  }
  for (_, metric), line in figures.items():
    assert min(line["values"]) > 0
    assert line["n"] == (2 if metric == "s" else 1)
  few, many = (
    figures[f"update group={size}", "mb"]["median"] for size in (1, 8)
  )
  assert many > 2 * few
  laws = [line for line in lines if "law" in line]
  assert [x["law"] for x in laws] == [
    f"{law.program} {law.figure} by group" for law in LAWS["group"]
  ]
  assert "update" in said.err and "expected" in said.err
  assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
  # What was printed can be compared, bytes with themselves exactly.
  file = tmp_path / "lines"
  file.write_text(said.out)
  bench_compare.main([str(file), str(file)])
  told = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert told["dropped"] == told["rose"] == 0
  assert len(told["figures"]) == len(figures)


@pytest.mark.parametrize(
  "flag, why", [("--axes=size", "no axis 'size'"), ("--most=1", "two sizes")]
)
def test_flags_that_cannot_be_are_refused(flag, why, capsys):
  with pytest.raises(SystemExit):
    bench_scaling.main([flag])
  assert why in capsys.readouterr().err
