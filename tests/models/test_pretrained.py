"""Checkpoint directories: every layout that is in use, and every mishap."""

import copy
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForImageTextToText

from jaxvlm import sharding
from jaxvlm.models import load_network, load_params, save_hf
from jaxvlm.nn import hf as hf_files

# What the other family has not, or would only show again.
qwen2_5_vl, qwen3_vl = (
  pytest.mark.parametrize("family", [name], indirect=True)
  for name in ("qwen2_5_vl", "qwen3_vl")
)

DTYPES = {
  "dtype": "float32",
  "param_dtype": "float32",
  "remat": "none",
  "attention": "plain",
}


def load(directory):
  network = load_network(directory, **DTYPES)
  return network, load_params(network, directory)


def assert_equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture
def own(directory, tmp_path):
  return shutil.copytree(directory, tmp_path / "own")


def one_of(tensors, end):
  (name,) = (name for name in tensors if name.endswith(end))
  return name


def edit_config(directory, change):
  path = directory / "config.json"
  raw = json.loads(path.read_text())
  change(raw)
  path.write_text(json.dumps(raw))


def edit_tensors(directory, change):
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


# -- layouts -----------------------------------------------------------------


def test_sharded_files_load_equal(hf, params, tmp_path):
  hf.save_pretrained(tmp_path, max_shard_size="100KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  assert_equal(load(tmp_path)[1], params)


@qwen2_5_vl  # Qwen3-VL's hub files have the modules' names
def test_module_names_load_equal(hf, params, tmp_path):
  hf.save_pretrained(tmp_path, save_original_format=False)
  names = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert any(name.startswith("model.visual.") for name in names)
  assert_equal(load(tmp_path)[1], params)


@qwen2_5_vl
def test_a_flat_config_loads_equal(own, network, params):
  def flatten(raw):
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {
      "type": "mrope",
      "mrope_section": rope["mrope_section"],
    }
    raw.update({k: v for k, v in text.items() if k != "model_type"})

  edit_config(own, flatten)
  read, got = load(own)
  assert read == network
  assert_equal(got, params)


def test_a_tied_checkpoint_has_no_head(make_torch, make_config, tmp_path):
  model = make_torch(make_config(tie_word_embeddings=True))
  model.save_pretrained(tmp_path)
  network, params = load(tmp_path)
  assert network.config.tie_word_embeddings
  assert "lm_head" not in params
  table = params["language_model"]["embed_tokens"]["embedding"]
  np.testing.assert_array_equal(network.head(params), table.T)
  np.testing.assert_array_equal(network.head(network.unstack(params)), table.T)


@qwen2_5_vl
def test_a_head_that_is_not_in_the_files_is_tied(own):
  edit_tensors(own, lambda tensors: tensors.pop("lm_head.weight"))
  assert load(own)[0].config.tie_word_embeddings


@qwen2_5_vl
def test_a_head_beside_a_tied_flag_is_not_read(own):
  edit_config(own, lambda raw: raw.update(tie_word_embeddings=True))
  assert "lm_head" not in load(own)[1]


def test_a_base_model_saved_alone_loads(hf, params, config, tmp_path):
  base = type(hf.model)(config)
  base.load_state_dict(hf.model.state_dict())
  base.save_pretrained(tmp_path)
  names = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert not any(name.startswith("model.") for name in names)
  network, got = load(tmp_path)
  assert network.config.tie_word_embeddings
  assert_equal(got, {k: v for k, v in params.items() if k != "lm_head"})


def test_bfloat16_files_load(hf, params, tmp_path):
  copy.deepcopy(hf).to(torch.bfloat16).save_pretrained(tmp_path)
  got = load(tmp_path)[1]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), got, params
  )


def test_weights_are_laid_out_by_their_axes(network, directory, params):
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, slices=-1)
  got = load_params(network, directory, mesh)
  assert_equal(got, params)
  kernel = got["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"]
  layers, size, heads, head_dim = kernel.shape
  assert (size, heads) == (64, 4)
  assert kernel.addressable_shards[0].data.shape == (layers, 16, 2, head_dim)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1), (2, 2, 2)])
def test_each_element_is_read_once_and_no_more_of_it_than_a_device_holds(
  network, directory, monkeypatch, sizes
):
  """A process that holds a share of the devices reads that share."""
  data, fsdp, tensor = sizes
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, slices=-1)
  elements, parts = [], []
  to_tree = hf_files.Weight.to_tree

  def counted(weight, index, dtype, read):
    def read_and_count(name, index):
      tensor = read(name, index)
      elements.append(tensor.size)
      return tensor

    part = to_tree(weight, index, dtype, read_and_count)
    parts.append(part.size)
    return part

  monkeypatch.setattr(hf_files.Weight, "to_tree", counted)
  params = load_params(network, directory, mesh)
  leaves = jax.tree.leaves(params)
  assert sum(parts) == sum(leaf.size for leaf in leaves)
  shards = {leaf.addressable_shards[0].data.size for leaf in leaves}
  assert set(parts) == shards
  # A convolution's tensor is read by rows.
  assert sum(parts) <= sum(elements) <= 1.2 * sum(parts)


# -- export ------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 100_000])
def test_transformers_loads_what_is_exported(
  make_torch, make_config, tmp_path, monkeypatch, tied, shard_bytes
):
  monkeypatch.setattr(hf_files, "SHARD_BYTES", shard_bytes)
  model = make_torch(make_config(tie_word_embeddings=tied))
  model.save_pretrained(tmp_path / "source")
  (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
  network, params = load(tmp_path / "source")
  changed = jax.tree.map(lambda x: 2 * x, params)
  save_hf(network, changed, tmp_path / "source", tmp_path / "export")

  again, info = AutoModelForImageTextToText.from_pretrained(
    tmp_path / "export", output_loading_info=True
  )
  assert not any(info.values()), info
  state = again.state_dict()
  for name, weight in model.state_dict().items():
    torch.testing.assert_close(state[name], 2 * weight, rtol=0, atol=0)
  assert (tmp_path / "export" / "chat_template.jinja").is_file()
  files = list((tmp_path / "export").glob("*.safetensors"))
  assert len(files) == 1 if shard_bytes > 1e6 else len(files) > 5


def test_an_export_has_the_names_that_transformers_writes(
  network, params, directory, tmp_path
):
  save_hf(network, params, directory, tmp_path / "export")
  got = safetensors.numpy.load_file(tmp_path / "export/model.safetensors")
  expected = safetensors.numpy.load_file(directory / "model.safetensors")
  assert_equal(got, expected)


@qwen2_5_vl
def test_an_export_replaces_an_earlier_one_and_leaves_nothing_beside(
  network, params, directory, tmp_path
):
  for _ in range(2):
    save_hf(network, params, directory, tmp_path / "export")
  assert [path.name for path in tmp_path.iterdir()] == ["export"]


@qwen2_5_vl
def test_an_export_does_not_replace_what_is_no_model(
  network, params, directory, tmp_path
):
  (tmp_path / "thesis.tex").write_text("")
  with pytest.raises(ValueError, match="no model directory"):
    save_hf(network, params, directory, tmp_path)


@qwen2_5_vl
def test_an_export_in_bfloat16_says_so(directory, tmp_path):
  network = load_network(
    directory,
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="none",
    attention="plain",
  )
  params = load_params(network, directory)
  save_hf(network, params, directory, tmp_path / "export")
  model = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
  assert model.dtype == torch.bfloat16


# -- mishaps -----------------------------------------------------------------


def test_a_missing_directory_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere/config.json: no such file"):
    load(tmp_path / "nowhere")


@qwen2_5_vl
def test_another_family_is_named(own):
  edit_config(own, lambda raw: raw.update(model_type="llava"))
  with pytest.raises(ValueError, match=f"{own}: .*'llava'"):
    load(own)


@qwen2_5_vl
def test_a_quantized_checkpoint_is_refused(own):
  edit_config(own, lambda r: r.update(quantization_config={"bits": 4}))
  with pytest.raises(ValueError, match=f"{own}: .*quantization_config"):
    load(own)


@qwen2_5_vl
@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("config.json", "[]"),
    ("config.json", "{"),
    ("model.safetensors.index.json", "{"),
    ("model.safetensors.index.json", "{}"),
  ],
)
def test_a_damaged_json_is_named(own, name, text):
  (own / name).write_text(text)
  with pytest.raises(ValueError, match=f"^{own / name}: .*copy the file again"):
    load(own)


@qwen2_5_vl
def test_a_pickled_checkpoint_is_refused(own):
  (own / "model.safetensors").rename(own / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"pytorch_model.bin is not read"):
    load(own)


def test_a_missing_tensor_is_named(own):
  def lose(tensors):
    del tensors[one_of(tensors, "layers.1.mlp.up_proj.weight")]

  with safetensors.safe_open(own / "model.safetensors", "np") as file:
    name = one_of(file.keys(), "layers.1.mlp.up_proj.weight")
  edit_tensors(own, lose)
  with pytest.raises(ValueError, match=f"^{own}: lacks {name}. Expected"):
    load(own)


@qwen3_vl
def test_a_missing_deepstack_merger_is_named(own):
  name = "visual.deepstack_merger_list.2.norm.bias"
  edit_tensors(own, lambda tensors: tensors.pop(f"model.{name}"))
  with pytest.raises(ValueError, match=f"lacks model.{name}"):
    load(own)


@qwen3_vl
def test_deepstack_mergers_that_no_tap_feeds_are_refused(own):
  def untap(raw):
    raw["vision_config"]["deepstack_visual_indexes"] = [0, 2]

  edit_config(own, untap)
  with pytest.raises(ValueError, match=r"beside .*deepstack_merger_list.2"):
    load(own)


def test_an_unknown_tensor_is_named(own):
  # Under no name but the file's own.
  edit_tensors(own, lambda t: t.update({"model.extra": np.zeros(3)}))
  with pytest.raises(
    ValueError, match=r"for model.extra \(model.safetensors\)"
  ):
    load(own)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@qwen2_5_vl
def test_a_tensor_that_is_not_finite_is_named(own, value, dtype):
  def spoil(tensors):
    name = one_of(tensors, "layers.1.mlp.up_proj.weight")
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][3, 5] = value

  edit_tensors(own, spoil)
  with pytest.raises(
    ValueError,
    match=r"model.safetensors: .*layers.1.mlp.up_proj.weight has "
    "values that are not finite",
  ):
    load(own)


def test_a_mis_shaped_tensor_is_named(own):
  def cut(tensors):
    name = one_of(tensors, "model.norm.weight")
    tensors[name] = tensors[name][:-1].copy()

  edit_tensors(own, cut)
  with pytest.raises(ValueError, match=r"model.norm.weight has shape \[63\]"):
    load(own)


@qwen2_5_vl
def test_a_file_cut_short_is_named(own):
  path = own / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"model.safetensors: damaged or cut"):
    load(own)


@qwen2_5_vl
def test_a_missing_shard_is_named(hf, tmp_path):
  hf.save_pretrained(tmp_path, max_shard_size="100KB")
  lost = sorted(tmp_path.glob("*.safetensors"))[1]
  lost.unlink()
  with pytest.raises(ValueError, match=lost.name):
    load(tmp_path)
