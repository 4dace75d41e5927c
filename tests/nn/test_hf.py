"""Weights, one by one, between a tree and files."""

import json

import numpy as np
import pytest
import safetensors.numpy

from jaxvlm.nn import hf
from jaxvlm.nn.hf import Weight

KERNEL = Weight(
  path=("layers", "proj", "kernel"),
  names=("layers.0.proj.weight", "layers.1.proj.weight"),
  stacked=True,
  layer_shape=(3, 2, 2),
  hf_shape=(4, 3),
)
NORM = Weight(
  path=("norm", "weight"),
  names=("norm.weight",),
  stacked=False,
  layer_shape=(5,),
  hf_shape=(5,),
)
TREE = {
  KERNEL.path: np.arange(24.0).reshape(2, 3, 2, 2),
  NORM.path: np.arange(5.0),
}


def write(directory):
  hf.write(
    [KERNEL, NORM],
    directory,
    rename=lambda name: f"model.{name}",
    fetch=lambda weight: TREE[weight.path],
  )


def read(directory):
  found = hf.find_tensors(directory, lambda name: name.removeprefix("model."))
  return hf.read(
    [KERNEL, NORM], found, ignored=[], place=lambda weight, leaf: leaf
  )


def test_kernels_are_transposed_and_one_tensor_for_each_layer(tmp_path):
  write(tmp_path)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert set(tensors) == {
    "model.layers.0.proj.weight",
    "model.layers.1.proj.weight",
    "model.norm.weight",
  }
  np.testing.assert_array_equal(
    tensors["model.layers.1.proj.weight"],
    TREE[KERNEL.path][1].reshape(3, 4).T,
  )


@pytest.mark.parametrize("shard_bytes", [10**9, 1])
def test_what_is_written_reads_back(tmp_path, monkeypatch, shard_bytes):
  monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
  write(tmp_path)
  got = read(tmp_path)
  np.testing.assert_array_equal(
    got["layers"]["proj"]["kernel"], TREE[KERNEL.path]
  )
  np.testing.assert_array_equal(got["norm"]["weight"], TREE[NORM.path])


def test_large_trees_are_written_in_numbered_files(tmp_path, monkeypatch):
  monkeypatch.setattr(hf, "SHARD_BYTES", 100)
  write(tmp_path)
  names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  index = json.loads((tmp_path / hf.INDEX).read_text())
  assert index["metadata"]["total_size"] == (24 + 5) * 8
  assert index["weight_map"]["model.norm.weight"] == names[2]


def test_nothing_is_written_where_nothing_is_fetched(tmp_path):
  hf.write([KERNEL, NORM], tmp_path, rename=str, fetch=lambda weight: None)
  assert not list(tmp_path.iterdir())
