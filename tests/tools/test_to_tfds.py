"""A set that TFDS itself wrote is read as the rows that it was made of."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from jaxvlm.data.pictures import load_picture
from jaxvlm.data.rows import row_id
from jaxvlm.data.sources import files, worlds
from jaxvlm.data.sources.tfds import source
from tools.to_tfds import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of TFDS' own imports


def png(seed):
  pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


@pytest.fixture
def rows(tmp_path):
  for i in range(3):
    (tmp_path / f"{i}.png").write_bytes(png(i))
  system = {"role": "system", "content": "Be brief."}
  user = {"role": "user", "content": "<image>Which é?"}
  found = [
    {"problem": "<image><image>a", "images": ["0.png", "1.png"], "rate": 0.1},
    {"problem": "b", "rate": None, "kind": "x"},
    {"problem": [system, user], "images": ["2.png"], "kind": "y", "rate": 1},
  ]
  lines = [
    json.dumps(
      {"answer": str(i), "task": "ab"[i % 2], "level": i, "good": i > 1} | row
    )
    for i, row in enumerate(found)
  ]
  (tmp_path / "rows.jsonl").write_text("\n".join(lines))
  (tmp_path / "test.jsonl").write_text(lines[1])
  return tmp_path


def test_rows_of_files_come_back(rows, capsys):
  out = rows / "data" / "mine"
  main(
    [
      "files",
      str(out),
      f"train.path={rows / 'rows.jsonl'}",
      f"test.path={rows / 'test.jsonl'}",
    ]
  )
  assert f"{out / '1.0.0'}: train 3, test 1 rows" in capsys.readouterr().out
  before = files.source(path=str(rows / "rows.jsonl"))
  after = source(name=str(out / "1.0.0"))
  assert len(after) == 3
  for i, (ours, theirs) in enumerate(zip(after, before, strict=True)):
    for field in ("problem", "answer", "messages", "task", "response"):
      assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.name == f"tfds mine/1.0.0/train[{i}]"
    encoded = [pathlib.Path(path).read_bytes() for path in theirs.images]
    assert list(ours.images) == encoded
  assert [dict(row.columns) for row in after] == [
    {"task": "a", "level": 0, "good": False, "rate": 0.1, "kind": ""},
    {
      "task": "b",
      "level": 1,
      "good": False,
      "rate": pytest.approx(np.nan, nan_ok=True),
      "kind": "x",
    },
    {"task": "a", "level": 2, "good": True, "rate": 1.0, "kind": "y"},
  ]
  assert [path.name for path in out.parent.iterdir()] == ["mine"]
  by_name = source(name="mine", split="test", data_dir=str(out.parent))
  assert [row.problem for row in by_name] == ["b"]
  with pytest.raises(SystemExit, match="mine: is already there"):
    main(["files", str(out), f"path={rows / 'rows.jsonl'}"])


def test_arrays_come_back_as_the_same_pixels(tmp_path):
  settings = {"capability": "perception", "split": "dev", "size": 5, "seed": 0}
  more = {"tasks": {}, "errors": {}, "captions": 0}
  words = [f"{k}={v}" for k, v in (settings | more).items()]
  main(["worlds", str(tmp_path / "worlds"), *words])
  before = worlds.source(**settings, **more)
  after = source(name=str(tmp_path / "worlds" / "1.0.0"))
  for ours, theirs in zip(after, [before[i] for i in range(5)], strict=True):
    assert (ours.problem, ours.task) == (theirs.problem, theirs.task)
    for picture, pixels in zip(ours.images, theirs.images, strict=True):
      np.testing.assert_array_equal(load_picture(picture), pixels)
    same = dataclasses.replace(theirs, images=ours.images)
    assert row_id(same) == row_id(ours)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["files", "Mine", "path={rows}"], "lower-case letters"),
    (["files", "mine", "path={rows}", "pth=1"], "'pth'"),
    (["files", "mine", "rows.jsonl"], "expected key=value"),
    (["filez", "mine"], "no 'filez'. There are: files, reasoning_gym"),
    (["files", "mine", "path={rows}", "answer_key=x"], "no column 'x'"),
  ],
)
def test_what_cannot_be_written_is_said(rows, words, message):
  words = [word.format(rows=rows / "rows.jsonl") for word in words]
  words[1] = str(rows / "data" / words[1])
  with pytest.raises(SystemExit, match=message):
    main(words)
  assert not (rows / "data").exists()


def test_a_row_that_cannot_be_read_leaves_nothing_behind(rows):
  (rows / "1.png").unlink()
  with pytest.raises(SystemExit, match=r"rows\.jsonl\[0\].*1\.png"):
    main(["files", str(rows / "data" / "mine"), f"path={rows / 'rows.jsonl'}"])
  assert not list((rows / "data").iterdir())
