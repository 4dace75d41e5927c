"""The command as a user gives it, on a random model."""

import pathlib

import pyarrow.parquet
import pytest

from tests.runs import launch_fixture, project_fixture  # noqa: F401

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "annotate.py"


@pytest.fixture(scope="module")
def annotate(launch):
  """annotate(output, *argv) starts the tool on the rows of a stage."""

  def annotate(output, *argv):
    given = {
      "stage": "perceive",
      "source": "rows",
      "completions": "2",
      "output": str(output),
    }
    given |= dict(a.removeprefix("--").split("=", 1) for a in argv)
    return launch(*(f"--{k}={v}" for k, v in given.items()), script=TOOL)

  return annotate


def finish(run):
  status, out, err = run.wait()
  assert status == 0, err
  return out


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(
  annotate, tmp_path
):
  whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
  out = finish(annotate(whole))
  assert "Pass rates of 24 rows, 2 completions each" in out
  parts = tmp_path / "cut.parquet.parts"
  run = annotate(cut)
  run.until((parts / "image.000000.json").exists)
  run.kill()
  assert not cut.exists()
  finish(annotate(cut))
  assert cut.read_bytes() == whole.read_bytes()
  assert {path.name for path in tmp_path.iterdir()} == {cut.name, whole.name}
  found = pyarrow.parquet.read_table(cut).to_pydict()
  assert len(set(found["pass_rate"])) > 2  # it is the model that answers


@pytest.mark.parametrize(
  ("argv", "told"),
  [
    (["--views=image,sound"], "annotate: views: got ('image', 'sound')"),
    (["--completions=many"], "jaxvlm: flag --completions=many: invalid"),
    (["--output=rows.csv"], "rows.csv; expected a .parquet file in a dir"),
    (["--config.stages.perceive.stepz=1"], "no field 'stepz'; there are"),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(annotate, tmp_path, argv, told):
  status, out, err = annotate(tmp_path / "out.parquet", *argv).wait()
  assert status == 1, out + err
  (line,) = err.strip().splitlines()
  assert told in line
  assert not list(tmp_path.iterdir())
