"""Drops beyond the noise are found, noise and what cannot be judged is not."""

import json

import numpy as np
import pytest

from tools import bench_compare


def line(values, *, work="W1", better=True, **fields):
  return {
    "peer": "jaxvlm",
    "model": "tiny",
    "work": work,
    "metric": "tokens_per_s",
    "median": float(np.median(values)),
    "values": list(values),
    "higher_is_better": better,
    "device": "cpu",
    "threads": 2,
    "dtype": "float32",
  } | fields


@pytest.fixture
def run(tmp_path, capsys):
  """Writes both files; returns (exit status, JSON line, all that was said)."""

  def one(old, new, *flags):
    files = []
    for name, lines in (("old", old), ("new", new)):
      files.append(tmp_path / name)
      text = "\n".join(map(json.dumps, lines)) + "\n"
      files[-1].write_text(text)
    status = 0
    try:
      bench_compare.main([*map(str, files), *flags])
    except SystemExit as error:
      status = error.code
    said = capsys.readouterr()
    last = said.out.splitlines()[-1:]
    return status, json.loads(last[0]) if last else None, said.out + said.err

  return one


def noisy(seed, centre, n=5):
  return (centre * np.random.default_rng(seed).normal(1, 0.03, n)).tolist()


def test_a_drop_beyond_the_noise_is_found(run):
  status, found, said = run([line(noisy(0, 100))], [line(noisy(1, 80))])
  (figure,) = found["figures"]
  assert status == 1 and found["dropped"] == 1
  assert figure["verdict"] == "dropped" and "dropped" in said
  low, high = figure["interval"]
  assert low < 0.8 < high < 0.98


def test_more_seconds_are_a_drop_and_fewer_a_rise(run):
  old = [line(noisy(0, 1.0), better=False)]
  new = [line(noisy(1, 1.3), better=False)]
  assert run(old, new)[0] == 1
  status, found, _ = run(new, old)
  assert status == 0 and found["rose"] == 1


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_no_drop(run, seed):
  old, new = noisy(2 * seed, 100), noisy(2 * seed + 1, 100)
  status, found, _ = run([line(old)], [line(new)])
  assert status == 0 and found["same"] == 1


def test_runs_that_differ_widen_the_interval(run):
  """Within a run all is quiet; between runs it is not."""
  calm = [line([100, 100.1, 99.9]), line([90, 90.1, 89.9])]
  status, found, _ = run(calm, [line([90, 90.1, 89.9])])
  assert status == 0
  low, high = found["figures"][0]["interval"]
  assert low < 0.91 and high > 0.99
  status, _, _ = run(calm[:1], [line([90, 90.1, 89.9])])
  assert status == 1


def test_runs_may_have_unlike_numbers_of_repetitions():
  random = np.random.default_rng(0)
  runs = [np.array([1.0]), np.array([2.0, 3.0, 4.0])]
  medians = bench_compare.draw_medians(random, runs)
  shares = {x: (medians == x).mean() for x in np.unique(medians)}
  assert shares.keys() == {1, 2, 2.5, 3, 3.5, 4}
  # Only the short run drawn twice has 1 in its middle.
  assert shares[1] == pytest.approx(1 / 4, abs=0.02)


def test_a_drop_below_the_floor_is_none(run):
  old, new = [line([100, 100, 100])], [line([99, 99, 99])]
  assert run(old, new)[0] == 0
  assert run(old, new, "--floor=0.005")[0] == 1


def test_exact_figures_need_no_spread_and_others_do(run):
  old, new = line([100], better=False), line([110], better=False)
  status, found, _ = run([old], [new])
  assert status == 0 and found["unknown"] == 1
  status, found, _ = run([old | {"exact": True}], [new | {"exact": True}])
  assert status == 1 and found["dropped"] == 1


def beside(**fields):
  return line([100, 100.1, 99.9], **fields)


@pytest.mark.parametrize(
  ("name", "noise", "worse"),
  [
    ("peak_rss_mb", 1.08, 1.15),
    ("peak_device_mb", 1.01, 1.03),
    ("first_call_s", 1.5, 1.6),
    ("compile_s", 1.5, 1.6),
  ],
)
def test_memory_and_compiling_are_judged_by_a_noise_of_their_own(
  run, name, noise, worse
):
  """One run in each file is enough."""
  old = [beside(**{name: 500.0})]
  status, found, _ = run(old, [beside(**{name: 500.0 * noise})])
  assert status == 0 and found["same"] == 2
  status, found, said = run(old, [beside(**{name: 500.0 * worse})])
  assert status == 1 and found["same"] == found["dropped"] == 1
  assert f"W1 {name}" in said and said.count("dropped") > 1
  assert found["figures"][1]["metric"] == name
  status, found, _ = run([beside(**{name: 500.0 * worse})], old)
  assert status == 0 and found["rose"] == 1


def test_runs_tell_how_much_memory_and_compiling_differ(run):
  def runs(*seconds):
    return [beside(first_call_s=s) for s in seconds]

  assert run(runs(10, 15, 10), runs(14, 10, 15))[0] == 0
  status, found, _ = run(runs(10, 10.5, 10), runs(18, 19, 18))
  assert status == 1 and found["dropped"] == 1


def test_runs_with_cached_programs_are_compared_with_such_runs_alone(run):
  compiled = beside(compile_s=20.0, compiled=9, cached=0)
  cached = beside(compile_s=1.0, compiled=2, cached=7)
  status, found, _ = run([cached], [compiled])
  assert status == 0 and found["same"] == 1
  assert found["only_old"] == ["jaxvlm tiny W1 compile_s cached on cpu"]
  assert found["only_new"] == ["jaxvlm tiny W1 compile_s on cpu"]
  assert run([cached], [cached | {"compile_s": 2.0}])[0] == 1


def test_what_only_one_file_has_is_told(run):
  old = [line([1, 2], work="W1"), line([1, 2], work="W2")]
  new = [line([1, 2], work="W1"), line([1, 2], work="W3")]
  status, found, said = run(old, new)
  assert status == 0 and len(found["figures"]) == 1
  assert found["only_old"] == ["jaxvlm tiny W2 tokens_per_s on cpu"]
  assert found["only_new"] == ["jaxvlm tiny W3 tokens_per_s on cpu"]
  assert "only in" in said and "W2" in said and "W3" in said


@pytest.mark.parametrize(
  "field, value", [("device", "gpu"), ("threads", 8), ("dtype", "bfloat16")]
)
def test_other_conditions_are_refused(run, field, value):
  old = [line([1, 2]), line([1, 2], work="W2")]
  status, found, said = run(old, [one | {field: value} for one in old])
  assert status == 2 and found is None
  assert said.count("\n") == 1 and said.startswith("bench_compare: 2 of")
  assert field in said and repr(value) in said


def test_each_device_is_compared_with_itself(run):
  old = [line([100, 101]), line([900, 901], device="gpu")]
  status, found, _ = run(old, old[::-1])
  assert status == 0 and found["same"] == 2
  status, found, _ = run(old, old[:1])
  assert status == 0
  assert found["only_old"] == ["jaxvlm tiny W1 tokens_per_s on gpu"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"metric": "s"}', ""])
def test_what_is_no_figure_is_named(tmp_path, capsys, text):
  file = tmp_path / "figures"
  file.write_text(text)
  with pytest.raises(SystemExit) as status:
    bench_compare.main([str(file), str(file)])
  assert status.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith(f"bench_compare: {file}")
