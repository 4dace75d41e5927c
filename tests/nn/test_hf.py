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
  KERNEL.path: np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
  NORM.path: np.arange(5, dtype=np.float32),
}


def write(directory):
  hf.write(
    [KERNEL, NORM],
    directory,
    dtype="float32",
    rename=lambda name: f"model.{name}",
    fetch=lambda weight: TREE[weight.path],
    progress=lambda count: None,
  )


def read(directory):
  found = hf.find_tensors(directory, lambda name: name.removeprefix("model."))
  return hf.read(
    [KERNEL, NORM],
    found,
    ignored=[],
    dtype=np.float32,
    make=lambda weight, part: part((slice(None),) * len(weight.shape)),
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
  monkeypatch.setattr(hf, "SHARD_BYTES", 50)
  write(tmp_path)
  names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  index = json.loads((tmp_path / hf.INDEX).read_text())
  assert index["metadata"]["total_size"] == (24 + 5) * 4
  assert index["weight_map"]["model.norm.weight"] == names[2]


def test_a_process_that_does_not_write_fetches_all_the_same(tmp_path):
  fetched = []

  def fetch(weight):
    fetched.append(weight.path)
    return TREE[weight.path]

  hf.write(
    [KERNEL, NORM],
    None,
    dtype="float32",
    rename=str,
    fetch=fetch,
    progress=lambda count: None,
  )
  assert fetched == [KERNEL.path, NORM.path]


# A leaf and the shape of its tensor: kernels to and from heads, a fused one, a
# convolution, biases, a table.
LEAVES = [
  ("kernel", (6, 4, 2), (8, 6)),
  ("kernel", (4, 2, 6), (6, 8)),
  ("kernel", (6, 3, 4, 2), (24, 6)),
  ("kernel", (12, 6), (6, 3, 2, 2)),
  ("bias", (3, 4, 2), (24,)),
  ("bias", (6,), (6,)),
  ("embedding", (8, 6), (8, 6)),
]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("last", "shape", "hf_shape"), LEAVES)
def test_each_part_of_a_leaf_is_read_alone(last, shape, hf_shape, stacked):
  weight = Weight(
    path=("a", last),
    names=("0", "1", "2") if stacked else ("0",),
    stacked=stacked,
    layer_shape=shape,
    hf_shape=hf_shape,
  )
  leaf = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
  tensors = dict(weight.to_hf(leaf))
  asked = []

  def read(name, index):
    asked.append(tensors[name][index].size)
    return tensors[name][index]

  for axis, size in enumerate(leaf.shape):
    for start, stop in [(0, size), (0, size // 2), (size // 2, size)]:
      index = [slice(None)] * leaf.ndim
      index[axis] = slice(start, stop)
      asked.clear()
      got = weight.to_tree(tuple(index), np.float32, read)
      np.testing.assert_array_equal(got, leaf[tuple(index)])
      # A convolution's tensor is read by rows.
      if len(hf_shape) < 3 or axis == leaf.ndim - 1:
        assert sum(asked) == got.size


def test_a_file_holds_no_more_than_it_may(tmp_path, monkeypatch):
  monkeypatch.setattr(hf, "SHARD_BYTES", 96)
  write(tmp_path)
  for path in tmp_path.glob("*.safetensors"):
    tensors = safetensors.numpy.load_file(path)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 96
