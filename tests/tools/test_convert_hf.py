"""convert_hf.py there and back, and what it says of what it cannot convert."""

import importlib.util
import json
import pathlib
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import (
  AutoModelForImageTextToText,
  Qwen2_5_VLConfig,
  Qwen2_5_VLForConditionalGeneration,
  Qwen3VLConfig,
  Qwen3VLForConditionalGeneration,
)

from jaxvlm import models
from jaxvlm.nn import hf

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "convert_hf.py"
TEXT = {
  "vocab_size": 40,
  "hidden_size": 24,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "num_key_value_heads": 1,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
VISION = {
  "depth": 2,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_heads": 2,
  "out_hidden_size": 24,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def make_model(family, tied):
  torch.manual_seed(0)
  if family == "qwen2_5_vl":
    text = TEXT | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
    vision = VISION | {"fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = Qwen2_5_VLConfig(
      text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    return Qwen2_5_VLForConditionalGeneration(config)
  text = TEXT | {
    "head_dim": 12,
    "rope_parameters": ROPE | {"mrope_section": [2, 2, 2]},
  }
  vision = VISION | {
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [0],
  }
  config = Qwen3VLConfig(
    text_config=text, vision_config=vision, tie_word_embeddings=tied
  )
  return Qwen3VLForConditionalGeneration(config)


@pytest.fixture(scope="session")
def tool():
  spec = importlib.util.spec_from_file_location("convert_hf", TOOL)
  module = importlib.util.module_from_spec(spec)
  sys.modules["convert_hf"] = module
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def source(tmp_path_factory):
  """A checkpoint with what transformers keeps beside the weights."""
  path = tmp_path_factory.mktemp("source")
  make_model("qwen2_5_vl", False).save_pretrained(path)
  (path / "tokenizer.json").write_text("{}")
  (path / "chat_template.jinja").write_text("{{ messages }}")
  return path


@pytest.fixture
def own(source, tmp_path):
  return shutil.copytree(source, tmp_path / "own")


def refused(tool, capsys, *arguments):
  """The line on which it ends."""
  with pytest.raises(SystemExit) as ended:
    tool.main([str(a) for a in arguments])
  assert capsys.readouterr().err == ""
  (line,) = str(ended.value.code).splitlines()
  return line


def run(tool, *arguments):
  tool.main([str(a) for a in arguments])


def tensors(directory):
  found = {}
  for file in directory.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(file)
  return found


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
  ("tied", "dtype", "shard", "original"),
  [
    (False, torch.float32, "5GB", True),
    (True, torch.bfloat16, "5GB", True),
    (False, torch.bfloat16, "20KB", False),
    (True, torch.float32, "20KB", False),
  ],
)
def test_there_and_back_no_bit_is_lost(
  tool, family, tied, dtype, shard, original, tmp_path, capsys
):
  model = make_model(family, tied).to(dtype)
  model.save_pretrained(
    tmp_path / "source", max_shard_size=shard, save_original_format=original
  )
  run(tool, "to-orbax", tmp_path / "source", tmp_path / "orbax")
  run(tool, "to-hf", tmp_path / "orbax", tmp_path / "back")
  model.save_pretrained(tmp_path / "expected")
  expected, got = tensors(tmp_path / "expected"), tensors(tmp_path / "back")
  assert set(got) == set(expected)
  for name, tensor in expected.items():
    assert got[name].dtype == tensor.dtype
    assert got[name].tobytes() == tensor.tobytes(), name
  again, info = AutoModelForImageTextToText.from_pretrained(
    tmp_path / "back", output_loading_info=True
  )
  assert not any(info.values()), info
  assert again.dtype == dtype
  capsys.readouterr()


def test_what_stands_beside_the_weights_goes_along(tool, source, tmp_path):
  run(tool, "to-orbax", source, tmp_path / "orbax")
  run(tool, "to-hf", tmp_path / "orbax", tmp_path / "back")
  for name in (
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
  ):
    for place in ("orbax", "back"):
      assert (tmp_path / place / name).read_text() == (
        source / name
      ).read_text()


def test_large_exports_have_shards_and_an_index(
  tool, source, tmp_path, monkeypatch
):
  monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
  run(tool, "to-orbax", source, tmp_path / "orbax")
  run(tool, "to-hf", tmp_path / "orbax", tmp_path / "back")
  files = list((tmp_path / "back").glob("*.safetensors"))
  assert len(files) > 2
  index = json.loads((tmp_path / "back" / hf.INDEX).read_text())
  assert set(index["weight_map"].values()) == {file.name for file in files}
  AutoModelForImageTextToText.from_pretrained(tmp_path / "back")


def test_a_dtype_that_is_asked_for_is_written(tool, source, tmp_path):
  run(tool, "to-orbax", source, tmp_path / "orbax")
  run(tool, "to-hf", tmp_path / "orbax", tmp_path / "low", "--dtype=bfloat16")
  expected = make_model("qwen2_5_vl", False).to(torch.bfloat16)
  got = AutoModelForImageTextToText.from_pretrained(tmp_path / "low")
  for name, tensor in expected.state_dict().items():
    assert torch.equal(got.state_dict()[name], tensor), name


def test_a_part_of_an_orbax_checkpoint_is_read_alone(tool, source, tmp_path):
  """The store is open and unread; a layer of a stack is a chunk of its own."""
  run(tool, "to-orbax", source, tmp_path / "orbax")
  arrays = tool.checkpoint.open_params(tmp_path / "orbax" / models.ORBAX)
  kernel = arrays["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.shape == (2, 24, 32)
  name = "model.layers.1.mlp.up_proj.weight"
  np.testing.assert_array_equal(np.asarray(kernel[1]), tensors(source)[name].T)


def test_checks_say_where_two_checkpoints_differ(
  tool, source, own, tmp_path, capsys
):
  run(tool, "to-orbax", source, tmp_path / "orbax")
  for a, b in ((source, own), (source, tmp_path / "orbax")):
    with pytest.raises(SystemExit) as ended:
      run(tool, "check", a, b)
    assert ended.value.code == 0
    assert "0 differ." in capsys.readouterr().out
  changed = tensors(own)
  changed["model.norm.weight"] = changed["model.norm.weight"] + 0.5
  safetensors.numpy.save_file(
    changed, own / "model.safetensors", metadata={"format": "pt"}
  )
  with pytest.raises(SystemExit) as ended:
    run(tool, "check", tmp_path / "orbax", own)
  assert ended.value.code == 1
  out = capsys.readouterr().out
  assert "language_model.norm.weight" in out and "0.5" in out
  assert "1 differ." in out


# -- what cannot be converted --------------------------------------------------


def edit(directory, change):
  file = directory / "model.safetensors"
  found = safetensors.numpy.load_file(file)
  change(found)
  safetensors.numpy.save_file(found, file, metadata={"format": "pt"})


def edit_config(directory, **changes):
  raw = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(raw | changes))


BROKEN = {
  "model.norm.weight": lambda d: edit(d, lambda t: t.pop("model.norm.weight")),
  "model.extra": lambda d: edit(
    d, lambda t: t.update({"model.extra": np.zeros(3, np.float32)})
  ),
  "model.norm.weight has shape [7]": lambda d: edit(
    d, lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)})
  ),
  "model.norm.weight is I8": lambda d: edit(
    d, lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)})
  ),
  "cut short": lambda d: (d / "model.safetensors").write_bytes(
    (d / "model.safetensors").read_bytes()[:-100]
  ),
  "pytorch_model.bin": lambda d: (d / "model.safetensors").rename(
    d / "pytorch_model.bin"
  ),
  "'llava'": lambda d: edit_config(d, model_type="llava"),
  "float16 and float32": lambda d: edit(
    d,
    lambda t: t.update(
      {"model.norm.weight": t["model.norm.weight"].astype(np.float16)}
    ),
  ),
}


@pytest.mark.parametrize("named", BROKEN)
def test_a_broken_source_is_named_and_nothing_is_left(
  tool, own, tmp_path, capsys, named
):
  BROKEN[named](own)
  line = refused(tool, capsys, "to-orbax", own, tmp_path / "out")
  assert named.removeprefix("model.") in line
  assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_existing_destination_is_left_alone(tool, source, tmp_path, capsys):
  (tmp_path / "mine").write_text("keep")
  for command in ("to-orbax", "to-hf"):
    line = refused(tool, capsys, command, source, tmp_path / "mine")
    assert "mine: exists" in line
  assert (tmp_path / "mine").read_text() == "keep"


def test_what_is_no_orbax_checkpoint_is_refused(tool, source, tmp_path, capsys):
  line = refused(tool, capsys, "to-hf", tmp_path, tmp_path / "out")
  assert f"{tmp_path}: neither what to-orbax wrote" in line
  assert not (tmp_path / "out").exists()


def test_the_wrong_direction_is_told(tool, source, tmp_path, capsys):
  line = refused(tool, capsys, "to-hf", source, tmp_path / "out")
  assert f"{source}: is a Hugging Face directory already; to-orbax" in line
  for name in (models.ORBAX, "state"):
    (tmp_path / name / name).mkdir(parents=True)
    line = refused(tool, capsys, "to-orbax", tmp_path / name, tmp_path / "out")
    assert f"{tmp_path / name}: is an Orbax checkpoint already; to-hf" in line


def test_a_pickled_checkpoint_is_told_to_who_compares(
  tool, source, own, capsys
):
  (own / "model.safetensors").rename(own / "pytorch_model.bin")
  line = refused(tool, capsys, "check", source, own)
  assert f"{own}: no model.safetensors" in line
  assert "pytorch_model.bin is not read" in line


def test_a_place_that_cannot_be_written_is_refused_before_the_read(
  tool, source, tmp_path, capsys, monkeypatch
):
  run(tool, "to-orbax", source, tmp_path / "orbax")
  capsys.readouterr()
  monkeypatch.setattr(models, "load_params", None)
  for command, given in (("to-orbax", source), ("to-hf", tmp_path / "orbax")):
    line = refused(tool, capsys, command, given, "/proc/none/out")
    assert "/proc/none/out: cannot be written (No such file" in line


@pytest.fixture
def small_disk():
  """As on a full disk, no file grows beyond 30 kB."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  signal.signal(signal.SIGXFSZ, handler)


# tensorstore's threads; the tool itself hushes them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_nothing_that_looks_whole(
  tool, source, tmp_path, capsys, request
):
  run(tool, "to-orbax", source, tmp_path / "orbax")
  capsys.readouterr()
  request.getfixturevalue("small_disk")
  line = refused(tool, capsys, "to-hf", tmp_path / "orbax", tmp_path / "out")
  assert "model.safetensors: cannot be written" in line
  line = refused(tool, capsys, "to-orbax", source, tmp_path / "out")
  assert "cannot be written (File too large). Make room" in line
  assert [path.name for path in tmp_path.iterdir()] == ["orbax"]
