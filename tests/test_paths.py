"""paths.py: files here and in buckets, and whole runs on a bucket."""

import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from etils import epath

from jaxvlm import paths
from jaxvlm.data import pictures
from jaxvlm.data.sources import files, tfds
from jaxvlm.metrics import read_records
from tests import bucket
from tests.runs import ROOT, launch_fixture, project_fixture  # noqa: F401


@pytest.fixture
def home(tmp_path):
  """Where this process finds the buckets."""
  bucket.install(tmp_path / "buckets")
  return tmp_path / "buckets"


def test_a_path_is_absolute_or_in_a_bucket(home, monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert paths.path("~/run") == pathlib.Path("/home/me/run")
  assert paths.path("run") == pathlib.Path.cwd() / "run"
  assert str(paths.path("gs://mine/run") / "hf") == "gs://mine/run/hf"
  with pytest.raises(ValueError, match="s3://mine: expected a path of this"):
    paths.path("s3://mine")


def test_a_bucket_without_its_package_is_told(monkeypatch):
  def missing(self):
    raise ImportError("Please install gcsfs")

  monkeypatch.setattr(type(epath.Path("gs://b")), "exists", missing)
  with pytest.raises(
    ValueError, match=r"install gcsfs. `pip install 'jaxvlm\[g"
  ):
    paths.path("gs://another/run")


def test_a_file_written_aside_is_whole_or_the_old_one(tmp_path, monkeypatch):
  file = tmp_path / "summary.json"
  paths.write(file, b"old")

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="No space"):
    paths.write(file, b"new")
  assert file.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["here", "bucket"])
def test_files_are_replaced_and_grow_here_and_in_buckets(home, tmp_path, place):
  directory = {"here": tmp_path, "bucket": "gs://mine/run"}[place]
  file = paths.path(directory) / "a" / "rows.jsonl"
  file.parent.mkdir(parents=True, exist_ok=True)
  paths.append(file, b"one\n")
  paths.append(file, b"two\n")
  assert file.read_bytes() == b"one\ntwo\n"
  paths.write(file, b"three\n")
  assert file.read_bytes() == b"three\n"
  aside = tmp_path / "aside"
  aside.write_bytes(b"four\n")
  paths.put(aside, file)
  assert file.read_bytes() == b"four\n"
  assert list(paths.files(paths.path(directory) / "a")) == [file]
  moved = paths.path(directory) / "b"
  paths.move(file.parent, moved)
  assert (moved / file.name).read_bytes() == b"four\n"
  assert not file.exists()
  paths.remove(moved)
  assert not moved.exists()
  paths.remove(moved)


def test_what_libraries_open_is_copied_here_once(home):
  there = home / "mine" / "model"
  (there / "orbax").mkdir(parents=True)
  (there / "config.json").write_text("{}")
  (there / "orbax" / "large").write_text("x")
  source = paths.path("gs://mine/model")
  found = paths.local(source, leave=("orbax",))
  assert found.name == "model"
  assert sorted(str(p.relative_to(found)) for p in found.rglob("*")) == [
    "config.json",
    "orbax",
  ]
  assert paths.local(source, leave=("orbax",)) == found
  assert paths.local(there) == there


def test_rows_and_pictures_are_read_from_a_bucket(home):
  directory = home / "mine" / "rows"
  directory.mkdir(parents=True)
  picture = np.zeros((28, 28, 3), np.uint8)
  pictures.PIL.Image.fromarray(picture).save(directory / "a.png")
  row = {"problem": "<image> which?", "answer": "A", "images": ["a.png"]}
  for name in ("train-0", "train-1"):
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, directory / f"{name}.parquet")
  (directory / "test.jsonl").write_text('{"problem": "b", "answer": "B"}\n')
  for path, count in (
    ("gs://mine/rows@train", 2),
    ("gs://mine/rows/train-*.parquet", 2),
    ("gs://mine/rows/test.jsonl", 1),
  ):
    assert len(files.source(path=path)) == count
  (example, _) = files.source(path="gs://mine/rows/*.parquet")
  assert example.images == ("gs://mine/rows/a.png",)
  np.testing.assert_array_equal(
    pictures.load_picture(example.images[0]), picture
  )


def test_what_has_to_lie_here_is_refused(home):
  assert paths.local_path("model") == pathlib.Path("model")
  with pytest.raises(ValueError, match="gs://mine: expected a path of this"):
    paths.local_path("gs://mine")
  with pytest.raises(
    ValueError, match="tfds: got 'gs://mine/set'; ArrayRecord"
  ):
    tfds.source(name="gs://mine/set", split="train")


def test_a_run_lives_in_a_bucket_and_goes_on_there(launch, project, tmp_path):
  """Its checkpoint, rows and workdir are there; it is killed after a step."""
  home = tmp_path / "buckets"
  inputs = home / "mine" / "inputs"
  inputs.mkdir(parents=True)
  for name in ("checkpoint", "train.parquet"):
    (inputs / name).symlink_to(project / name)
  argv = (
    "schedule=('warm',)",
    "stages.warm.metric=''",
    "evaluation.capabilities=()",
    "checkpoint.every=1",
    "workdir=gs://mine/run",
    "model.checkpoint=gs://mine/inputs/checkpoint",
    "stages.warm.data.rows.path=gs://mine/inputs/train.parquet",
  )
  there = home / "mine" / "run"
  told = []
  with bucket.serve(home) as env:
    script = ROOT / "tests" / "bucket.py"
    run = launch(*argv, script=script, **env)
    run.until((there / "checkpoints" / "1" / "commit_success.txt").exists)
    run.kill()
    for _ in range(2):
      status, out, err = launch(*argv, script=script, **env).wait()
      assert status == 0, err
      told.append(out)
  assert "Resumed after 1 steps." in told[0]
  assert told[1] == "This run is finished; its results are in gs://mine/run."
  assert {path.name for path in there.iterdir()} == {
    *("checkpoints", "config.json", "curves.png", "hf", "metrics.jsonl"),
    *("rows.json.gz", "samples", "samples.jsonl", "summary.json"),
    "tensorboard",
  }
  steps = read_records(there / "metrics.jsonl", kind="train")
  assert [record["global_step"] for record in steps] == [1, 2]
  got = safetensors.numpy.load_file(there / "hf" / "model.safetensors")
  start = safetensors.numpy.load_file(inputs / "checkpoint/model.safetensors")
  assert got.keys() == start.keys()
  moved = [name for name in got if (got[name] != start[name]).any()]
  assert len(moved) > len(got) / 2
