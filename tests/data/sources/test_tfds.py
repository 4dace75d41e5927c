"""Sets that TFDS wrote in ArrayRecord files, read without TensorFlow."""

import io
import sys

import numpy as np
import PIL.Image
import pytest

from jaxvlm.data.pictures import load_picture
from jaxvlm.data.sources.tfds import source

pytestmark = pytest.mark.filterwarnings("ignore")  # of TFDS' own imports

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def jpeg():
  file = io.BytesIO()
  PIL.Image.fromarray(PICTURE).save(file, "JPEG")
  return file.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A set as its authors make them: one picture, a class label, a box."""
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": tfds.features.ClassLabel(names=["cat", "dog"]),
      "question": tfds.features.Text(),
      "rate": tfds.features.Scalar(np.float32),
      "level": np.int64,
      "good": np.bool_,
      "box": tfds.features.BBoxFeature(),
      "words": tfds.features.Sequence(tfds.features.Text()),
    }
  )

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("2.1.0")
    name = "pets"

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=features, disable_shuffling=True
      )

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(4):
        yield (
          i,
          {
            "image": io.BytesIO(jpeg()),
            "label": ("cat", "dog")[i % 2],
            "question": f"Which é{i}?",
            "rate": i / 10,
            "level": i,
            "good": i > 1,
            "box": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
            "words": ["a", "b"],
          },
        )

  home = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  builder = Builder(data_dir=home, file_format="array_record")
  builder.download_and_prepare()
  return home / "pets" / "2.1.0"


def open_set(directory, **changes):
  settings = {
    "name": str(directory),
    "answer_key": "label",
    "images_key": "image",
    "problem": "Which pet?",
  }
  return source(**settings | changes)


def test_rows_are_read_as_their_features_say(directory):
  rows = open_set(directory)
  assert [row.answer for row in rows] == ["cat", "dog", "cat", "dog"]
  assert {row.problem for row in rows} == {"<image>Which pet?"}
  assert rows[3].images == (jpeg(),)  # as it was stored, not decoded
  assert load_picture(rows[3].images[0]).shape == PICTURE.shape
  assert dict(rows[3].columns) == {
    "question": "Which é3?",
    "rate": 0.3,
    "level": 3,
    "good": True,
  }
  assert rows[1].name == "tfds pets/2.1.0/train[1]"
  assert "tensorflow" not in sys.modules


def test_a_set_is_found_by_name_and_split(directory):
  rows = open_set("pets", data_dir=str(directory.parents[1]))
  assert len(rows) == 4
  part = open_set(
    "pets:2.1.0", data_dir=str(directory.parents[1]), split="train[:50%]"
  )
  assert [row.columns["level"] for row in part] == [0, 1]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"split": "dev"}, "split 'dev', is not to be had: Unknown split 'dev'"),
    ({"name": "pets_of_nobody"}, "'pets_of_nobody'.* is not to be had"),
    ({"name": "/no/such"}, "'/no/such'.* is not to be had"),
    ({"answer_key": "lable"}, "no column 'lable'; there are box, good, image"),
    ({"problem": ""}, "no column 'problem'"),
    ({"form": "vrel"}, "no form 'vrel'"),
    ({"split": "train[:0]"}, "is not to be had"),
  ],
)
def test_what_is_not_there_is_said(directory, changes, message):
  with pytest.raises(ValueError, match=message):
    open_set(directory, **changes)


def test_without_the_package_the_remedy_is_told(directory, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(ValueError, match=r"pip install 'jaxvlm\[tfds\]'"):
    open_set(directory)
