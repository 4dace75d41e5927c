"""Hugging Face safetensors <-> parameter trees.

A weight is one leaf of the tree. In files it is one tensor, or one for each
layer where the leaf is a stack; kernels are [in, out] here, [out, in] there.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
  """A leaf of the tree and the tensors that it is in files."""

  path: tuple[str, ...]
  names: tuple[str, ...]  # one, or one for each layer of a stack
  stacked: bool
  layer_shape: tuple[int, ...]  # of one layer, as the tree has it
  hf_shape: tuple[int, ...]

  @property
  def transposed(self) -> bool:
    return self.path[-1] == "kernel"

  def to_tree(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """The tensors of a file, one for each name, as the leaf."""
    if self.transposed:
      tensors = [tensor.reshape(len(tensor), -1).T for tensor in tensors]
    layers = [tensor.reshape(self.layer_shape) for tensor in tensors]
    return np.stack(layers) if self.stacked else layers[0]

  def to_hf(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The reverse: names and tensors."""
    for name, array in zip(
      self.names, leaf if self.stacked else [leaf], strict=True
    ):
      if self.transposed:
        array = array.reshape(-1, self.hf_shape[0]).T
      # safetensors writes memory as it lies, whatever the strides say.
      yield name, np.ascontiguousarray(array.reshape(self.hf_shape))


def find_tensors(
  directory: pathlib.Path, rename: Callable[[str], str]
) -> dict[str, tuple[pathlib.Path, str]]:
  """Where each tensor of a checkpoint is: our name -> (file, its name there).

  Raises:
    ValueError: no safetensors, a file that is missing or cut short.
  """
  index = directory / INDEX
  if index.is_file():
    files = set(json.loads(index.read_text())["weight_map"].values())
  elif (directory / SINGLE).is_file():
    files = {SINGLE}
  else:
    torch = sorted(file.name for file in directory.glob("*.bin"))
    raise ValueError(
      f"{directory}: no {SINGLE} and no {INDEX}"
      + (f"; {torch[0]} is not read (pickle)" if torch else "")
      + ". Save the model with transformers' save_pretrained."
    )
  found = {}
  for name in sorted(files):
    with _open(directory / name) as tensors:
      for key in tensors.keys():  # noqa: SIM118 (not a mapping)
        found[rename(key)] = (directory / name, key)
  return found


def read(
  weights: Iterable[Weight],
  found: Mapping[str, tuple[pathlib.Path, str]],
  *,
  ignored: Iterable[str],
  place: Callable[[Weight, np.ndarray], Any],
) -> dict[str, Any]:
  """Reads a tree, one leaf at a time.

  Args:
    weights: every leaf of the tree.
    found: what `find_tensors` found.
    ignored: names that may be in the files and are not read.
    place: puts a leaf where it shall live.

  Raises:
    ValueError: names a tensor that is missing, unknown or mis-shaped.
  """
  weights = list(weights)
  expected = {name for weight in weights for name in weight.names}
  _check_names(expected, set(found) - set(ignored))
  tree: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    files = {
      path: stack.enter_context(_open(path)) for path, _ in found.values()
    }
    for weight in weights:
      tensors = []
      for name in weight.names:
        path, key = found[name]
        tensor = files[path].get_tensor(key)
        if tensor.shape != weight.hf_shape:
          raise ValueError(
            f"{path}: {key} has shape {list(tensor.shape)}, config.json asks "
            f"for {list(weight.hf_shape)}."
          )
        tensors.append(tensor)
      _set(tree, weight.path, place(weight, weight.to_tree(tensors)))
  return tree


def write(
  weights: Iterable[Weight],
  directory: pathlib.Path,
  *,
  rename: Callable[[str], str],
  fetch: Callable[[Weight], np.ndarray | None],
) -> None:
  """Writes a tree: one file, or several and an index where it is large.

  Args:
    weights: every leaf of the tree.
    directory: exists.
    rename: our name -> the name in the file.
    fetch: the value of a leaf; None where this process does not write.

  Raises:
    OSError: a file cannot be written, as on a full disk.
  """
  shards: list[pathlib.Path] = []
  weight_map: dict[str, int] = {}
  held: dict[str, np.ndarray] = {}
  total = 0

  def flush() -> None:
    shards.append(directory / f"model-{len(shards) + 1:05d}.safetensors")
    try:
      save_file(held, shards[-1], metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
      raise OSError(f"{shards[-1]}: cannot be written ({error}).") from error
    held.clear()

  for weight in weights:
    leaf = fetch(weight)
    for name, tensor in [] if leaf is None else weight.to_hf(leaf):
      size = sum(array.nbytes for array in held.values())
      if held and size + tensor.nbytes > SHARD_BYTES:
        flush()
      held[rename(name)] = tensor
      weight_map[rename(name)] = len(shards)
      total += tensor.nbytes
  if not held:
    return
  flush()
  if len(shards) == 1:
    shards[0].rename(directory / SINGLE)
    return
  names = [
    f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    for i in range(len(shards))
  ]
  for shard, name in zip(shards, names, strict=True):
    shard.rename(directory / name)
  index = {
    "metadata": {"total_size": total},
    "weight_map": {name: names[i] for name, i in sorted(weight_map.items())},
  }
  (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _open(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise ValueError(f"{path}: no such file, but {INDEX} names it.")
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path}: damaged or cut short ({error}); copy it again."
    ) from error


def _check_names(expected: set[str], got: set[str]) -> None:
  if expected == got:
    return
  parts = []
  for words, names in (
    ("lacks", expected - got),
    ("has beside what config.json asks for", got - expected),
  ):
    if names:
      some = ", ".join(sorted(names)[:5])
      more = f" and {len(names) - 5} more" if len(names) > 5 else ""
      parts.append(f"{words} {some}{more}")
  raise ValueError(f"The checkpoint {'; it '.join(parts)}.")


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  *parents, last = path
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = value
