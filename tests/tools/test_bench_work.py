"""A folder made from nothing is what bench.py reads."""

import functools
import json
import sys

import numpy as np
import pytest

from jaxvlm.models import find_family
from jaxvlm.types import Example
from tools import bench, bench_work, machine
from tools.bench_work import MODELS, SHAPES, Sizes

SIZES = Sizes(
  questions=2, group=2, length=6, side=224, tower_side=224, tower_pictures=2
)
SMALLER = {
  "vocab_size": 64,
  "num_hidden_layers": 1,
  "intermediate_size": 32,
}
TOWER = {
  "qwen25vl-tiny": {"depth": 2, "fullatt_block_indexes": [1]},
  "qwen3vl-tiny": {"depth": 2, "deepstack_visual_indexes": [0]},
}


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
  """Of a model smaller than the one of the name; once for each name."""
  directory = tmp_path_factory.mktemp("work")

  @functools.cache
  def make(name):
    shape = SHAPES[name]
    config = bench_work.read_shape(
      {
        **shape,
        "text_config": {**shape["text_config"], **SMALLER},
        "vision_config": {**shape["vision_config"], **TOWER[name]},
      }
    )
    bench_work.make(config, SIZES, directory / name)
    return directory, name

  return make


@pytest.fixture(params=sorted(TOWER))
def folder(request, make_folder):
  """(directory, name)."""
  return make_folder(request.param)


@pytest.fixture
def arrays(folder):
  directory, name = folder
  return dict(np.load(directory / name / "inputs.npz"))


@pytest.mark.parametrize(
  "folder, work",
  [
    *(("qwen25vl-tiny", work) for work in ("W1", "W3", "W4", "W5")),
    *(("qwen3vl-tiny", work) for work in ("W1", "W5")),
  ],
  indirect=["folder"],
)
def test_bench_does_each_work_on_it(folder, work, monkeypatch, capsys):
  directory, name = folder
  flags = (f"--work={work}", f"--work-dir={directory}", "--reps=1")
  flags += ("--wait=0", "--compilation_cache=")
  monkeypatch.setattr(sys, "argv", ["bench", f"--model={name}", *flags])
  monkeypatch.setattr(machine, "SECONDS", 0.001)
  monkeypatch.setattr(machine, "ARRAY", 1 << 16)
  bench.main()
  line = json.loads(capsys.readouterr().out)
  check = line["check"]
  assert line["median"] > 0
  if work == "W1":
    assert check["max_abs_logp_err"] < 1e-5
  if work == "W3":
    # The reference has weights of its own, and old logprobs are near.
    assert check["kl1"] > 0 and abs(check["loss1"]) < 0.1
  if work in ("W3", "W4"):
    assert check.get("grad_norm1", check.get("grad_norm")) > 0
  if work == "W5":
    tokens = 64 if name == "qwen25vl-tiny" else 49
    assert check["shape"] == [2 * tokens, 128]


def test_bench_makes_the_same_patches_of_the_pictures(folder, arrays, tmp_path):
  lab = bench.Lab.read(
    folder[0] / folder[1], microbatch_tokens=2048, remat="none"
  )
  processor = bench.make_processor(lab, tmp_path)
  made = []
  for i, picture in enumerate(arrays["images"]):
    example = Example(problem="<image>", answer="", images=(picture,))
    made.append(processor.question(example, i).pixel_values)
  np.testing.assert_array_equal(np.concatenate(made), arrays["pixels"])


def test_arrays_are_what_the_docstring_says(arrays, folder):
  tokens = 64 if folder[1] == "qwen25vl-tiny" else 49
  prompts = arrays["prompts"]
  assert prompts.shape == (2, 8 + 1 + tokens + 1 + 22)
  assert prompts[:, 8].tolist() == [58, 58]
  assert (prompts[:, 9 : 9 + tokens] == 56).all()
  assert prompts[:, 9 + tokens].tolist() == [59, 59]
  text = np.delete(prompts, np.arange(8, 10 + tokens), axis=1)
  np.testing.assert_array_equal(text, arrays["text"])
  assert arrays["images"].shape == (2, 224, 224, 3)
  assert arrays["completions"].shape == (4, 6)
  assert max(text.max(), arrays["completions"].max()) < 64 - 16
  groups = arrays["advantages"].reshape(2, 2)
  np.testing.assert_allclose(groups.mean(1), 0, atol=1e-6)
  np.testing.assert_allclose(groups.std(1), 1, atol=1e-2)
  assert arrays["lengths"].max() == 6 and arrays["lengths"].min() >= 1
  noise = arrays["old_logps"] - arrays["policy_logps"]
  assert 0 < np.abs(noise).max() < 6 * bench_work.OLD_NOISE
  assert len(arrays["v_pixels"]) == arrays["v_grid"].prod(1).sum()


def test_the_same_seeds_make_the_same_inputs(arrays, folder):
  config = bench_work.find_config(folder[1])
  first, second = (bench_work.draw_inputs(config, SIZES) for _ in range(2))
  assert set(arrays) - set(first) == {"policy_logps", "old_logps"}
  for name, array in first.items():
    np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_its_special_ids_at_the_top(model):
  config = bench_work.find_config(model)
  top = config.vocab_size
  assert (config.image_token_id, config.video_token_id) == (top - 8, top - 7)
  assert config.vision_start_token_id == top - 6
  assert config.vision_end_token_id == top - 5
  # The written config.json says the same model.
  read = find_family(config.model_type).Config.from_hf(config.to_hf())
  assert read == config


def test_pictures_are_whole_tokens():
  config = bench_work.find_config("qwen3vl-tiny")
  with pytest.raises(ValueError, match="100 pixels a side; expected a mult"):
    bench_work.draw_pictures(np.random.default_rng(0), config, 1, 100)


def test_another_directory_is_not_replaced(tmp_path, monkeypatch):
  (tmp_path / "qwen25vl-tiny").mkdir()
  flags = ("--model=qwen25vl-tiny", f"--work-dir={tmp_path}")
  monkeypatch.setattr(sys, "argv", ["bench_work", *flags])
  with pytest.raises(SystemExit, match="is no work folder"):
    bench_work.main()
