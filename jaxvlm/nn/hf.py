"""Hugging Face safetensors <-> parameter trees, a tensor at a time.

A weight is one leaf of the tree. In files it is one tensor, or one for each
layer where the leaf is a stack; kernels are [in, out] here, [out, in] there.
Reading takes just the slices that a device holds, and writing goes straight to
the file, so neither needs memory for more than a leaf's share of a device.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import safetensors

from jaxvlm import paths

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000

# Names of dtypes in safetensors' headers.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NAMES = {theirs: ours for ours, theirs in DTYPES.items()}

T = TypeVar("T")
Index = tuple[slice, ...]
Place = tuple[pathlib.Path, str]  # a file, and a tensor's name in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
  """A leaf of the tree and the tensors that it is in files."""

  path: tuple[str, ...]
  names: tuple[str, ...]  # one, or one for each layer of a stack
  stacked: bool
  layer_shape: tuple[int, ...]  # of one layer, as the tree has it
  hf_shape: tuple[int, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the leaf."""
    stack = (len(self.names),) if self.stacked else ()
    return (*stack, *self.layer_shape)

  @property
  def transposed(self) -> bool:
    return self.path[-1] == "kernel"

  def to_tree(
    self, index: Index, dtype: Any, read: Callable[[str, Index], np.ndarray]
  ) -> np.ndarray:
    """A part of the leaf.

    Args:
      index: which part, a slice for each axis of the leaf.
      dtype: of the result.
      read: (name, index) -> that part of a tensor in the files.
    """
    spans = [
      slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True)
    ]
    layers = spans.pop(0) if self.stacked else slice(0, 1)
    sizes = [s.stop - s.start for s in spans]
    part = np.empty((layers.stop - layers.start, *sizes), dtype)
    for i, name in enumerate(self.names[layers]):
      block = self._read(name, spans, read).astype(dtype, copy=False)
      if self.transposed:
        block = _transpose(block)
      part[i] = block.reshape(sizes)
    return part if self.stacked else part[0]

  def to_hf(
    self, leaf: Iterable[np.ndarray] | np.ndarray
  ) -> Iterator[tuple[str, np.ndarray]]:
    """The reverse: names and tensors. A stack may come a layer at a time."""
    layers = leaf if self.stacked else [leaf]
    for name, layer in zip(self.names, layers, strict=True):
      yield name, self.tensor(np.asarray(layer))

  def tensor(self, layer: np.ndarray) -> np.ndarray:
    """The tensor of one layer."""
    if self.transposed:
      layer = _transpose(layer.reshape(-1, self.hf_shape[0]))
    return layer.reshape(self.hf_shape)

  def _read(
    self,
    name: str,
    spans: Sequence[slice],
    read: Callable[[str, Index], np.ndarray],
  ) -> np.ndarray:
    """Those rows and columns of a tensor in the files, as a matrix."""
    shape, axes = self.layer_shape, len(self.layer_shape)
    # How many axes, in the order of the tree, make up the first of its two.
    if self.transposed:
      split = next(
        i for i in range(axes) if math.prod(shape[i:]) == self.hf_shape[0]
      )
    else:
      split = axes if len(self.hf_shape) == 1 else 1
    halves = [(shape[:split], spans[:split]), (shape[split:], spans[split:])]
    if self.transposed:
      halves.reverse()
    rows, cols = (_runs(*half) for half in halves)
    return _join(
      [
        _join([self._block(name, r, c, read) for c in cols], axis=1)
        for r in rows
      ],
      axis=0,
    )

  def _block(
    self,
    name: str,
    rows: slice,
    cols: slice,
    read: Callable[[str, Index], np.ndarray],
  ) -> np.ndarray:
    if len(self.hf_shape) == 2:
      return read(name, (rows, cols))
    # A convolution's columns are its other axes.
    return read(name, (rows,)).reshape(rows.stop - rows.start, -1)[:, cols]


def _join(blocks: Sequence[np.ndarray], *, axis: int) -> np.ndarray:
  return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis)


def _transpose(matrix: np.ndarray) -> np.ndarray:
  """A copy, made a cache line at a time: three times as fast as numpy's."""
  bits = matrix.view(f"u{matrix.itemsize}")  # numpy copies bfloat16 slowly
  turned = np.empty(bits.shape[::-1], bits.dtype)
  strip = 64 // matrix.itemsize
  for i in range(0, len(bits), strip):
    turned[:, i : i + strip] = bits[i : i + strip].T
  return turned.view(matrix.dtype)


def _runs(shape: Sequence[int], spans: Sequence[slice]) -> list[slice]:
  """What is contiguous of those parts of axes that one axis holds in a row."""
  whole = len(shape)
  while whole and spans[whole - 1] == slice(0, shape[whole - 1]):
    whole -= 1
  size = math.prod(shape[whole:])
  if not whole:
    return [slice(0, size)]
  last = spans[whole - 1]
  runs = []
  for place in itertools.product(
    *(range(s.start, s.stop) for s in spans[: whole - 1])
  ):
    start = 0
    for i, n in zip(place, shape[: whole - 1], strict=True):
      start = start * n + i
    start *= shape[whole - 1]
    runs.append(slice((start + last.start) * size, (start + last.stop) * size))
  return runs


def find_tensors(
  directory: pathlib.Path, rename: Callable[[str], str]
) -> dict[str, Place]:
  """Where each tensor of a checkpoint is: our name -> (file, its name there).

  Raises:
    ValueError: no safetensors, a file that is missing, damaged or cut short.
  """
  index = directory / INDEX
  if index.is_file():
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
      raise ValueError(f"{index}: has no weight_map; copy the file again.")
    files = set(listed.values())
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
    with open_file(directory / name) as tensors:
      for key in tensors.keys():  # noqa: SIM118 (not a mapping)
        found[rename(key)] = (directory / name, key)
  return found


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A file's one object.

  Raises:
    ValueError: it holds something else.
  """
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f"{path}: not JSON ({error}); copy the file again."
    ) from error
  if not isinstance(found, dict):
    raise ValueError(f"{path}: not a JSON object; copy the file again.")
  return found


def read(
  weights: Iterable[Weight],
  found: Mapping[str, Place],
  *,
  ignored: Iterable[str],
  dtype: Any,
  make: Callable[[Weight, Callable[[Index], np.ndarray]], Any],
) -> dict[str, Any]:
  """Reads a tree, one leaf at a time.

  Args:
    weights: every leaf of the tree.
    found: what `find_tensors` found.
    ignored: names that may be in the files and are not read.
    dtype: of the leaves.
    make: (weight, read) -> the leaf; read(index) is a part of it, in dtype.

  Raises:
    ValueError: names a tensor that is missing, unknown, mis-shaped or not
      finite.
  """
  weights = list(weights)
  check(weights, found, ignored=ignored)

  def read_tensor(name: str, index: Index) -> np.ndarray:
    # Opened anew for each: pages of a mapped file count as memory in use.
    path, key = found[name]
    with open_file(path) as tensors:
      block = tensors.get_slice(key)[index]
    if not _is_finite(block):
      raise ValueError(
        f"{path}: {key} has values that are not finite (NaN or infinity); "
        "copy the file again, or take another checkpoint."
      )
    return block

  tree: dict[str, Any] = {}
  for weight in weights:
    read_part = functools.partial(weight.to_tree, dtype=dtype, read=read_tensor)
    _set(tree, weight.path, make(weight, read_part))
  return tree


def check(
  weights: Iterable[Weight],
  found: Mapping[str, Place],
  *,
  ignored: Iterable[str],
) -> None:
  """Checks what is said of the tensors without reading one.

  Raises:
    ValueError: names a tensor that is missing, unknown or mis-shaped.
  """
  weights = list(weights)
  expected = {name for weight in weights for name in weight.names}
  _check_names(
    expected, {n: at for n, at in found.items() if n not in set(ignored)}
  )
  check_tensors(weights, found)


def _is_finite(values: np.ndarray) -> bool:
  """As integers, infinity and NaN are above all else of their sign."""
  if not values.size:
    return True
  signed, unsigned = f"i{values.itemsize}", f"u{values.itemsize}"
  limits = np.array([np.inf, -np.inf], values.dtype)
  return bool(
    values.view(signed).max() < limits.view(signed)[0]
    and values.view(unsigned).max() < limits.view(unsigned)[1]
  )


def check_tensors(
  weights: Iterable[Weight], found: Mapping[str, Place]
) -> set[str]:
  """The dtypes of the tensors, whose shapes must be those of the weights.

  Raises:
    ValueError: names a tensor that has another shape or no float in it.
  """
  shapes = {name: w.hf_shape for w in weights for name in w.names}
  dtypes = set()
  for path in sorted({path for path, _ in found.values()}):
    with open_file(path) as tensors:
      for name, (place, key) in found.items():
        if place != path or name not in shapes:
          continue
        tensor = tensors.get_slice(key)
        if tuple(tensor.get_shape()) != shapes[name]:
          raise ValueError(
            f"{path}: {key} has shape {tensor.get_shape()}, config.json asks "
            f"for {list(shapes[name])}."
          )
        if tensor.get_dtype() not in _NAMES:
          raise ValueError(
            f"{path}: {key} is {tensor.get_dtype()}; expected one of "
            f"{', '.join(_NAMES)}. Quantized models are not read."
          )
        dtypes.add(_NAMES[tensor.get_dtype()])
  return dtypes


def write(
  weights: Iterable[Weight],
  directory: Any,
  *,
  dtype: str,
  rename: Callable[[str], str],
  fetch: Callable[[Weight], Iterable[np.ndarray] | np.ndarray],
  progress: Callable[[int], object],
) -> None:
  """Writes a tree: one file, or several and an index where it is large.

  Args:
    weights: every leaf of the tree.
    directory: exists; None: this process fetches with the others, and does
      not write.
    dtype: of the tensors in the files.
    rename: our name -> the name in the file.
    fetch: the value of a leaf, that of a stack a layer at a time.
    progress: called with the number of bytes written since its last call.

  Raises:
    OSError: a file cannot be written, as on a full disk.
  """
  weights = list(weights)
  size = np.dtype(dtype).itemsize
  files: list[dict[str, Any]] = [{}]  # headers
  for weight in weights:
    count = size * math.prod(weight.hf_shape)
    for name in weight.names:
      if files[-1] and _end(files[-1]) + count > SHARD_BYTES:
        files.append({})
      start = _end(files[-1])
      files[-1][rename(name)] = {
        "dtype": DTYPES[dtype],
        "shape": list(weight.hf_shape),
        "data_offsets": [start, start + count],
      }
  total = sum(_end(header) for header in files)
  names = [
    f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
    for i in range(len(files))
  ]
  if len(files) == 1:
    names = [SINGLE]
  elif directory is not None:
    weight_map = {
      tensor: name
      for name, header in zip(names, files, strict=True)
      for tensor in header
    }
    index = {
      "metadata": {"total_size": total},
      "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

  # safetensors has memory as it lies, whatever the strides say.
  tensors = _ahead(
    (rename(name), np.ascontiguousarray(tensor, dtype).view(np.uint8))
    for weight in weights
    for name, tensor in weight.to_hf(fetch(weight))
  )
  for name, header in zip(names, files, strict=True):
    with contextlib.ExitStack() as stack:
      file = None
      if directory is not None:
        file = stack.enter_context(_create(directory / name, header))
      for expected, (got, tensor) in zip(header, tensors, strict=False):
        assert expected == got
        if file is not None:
          file.write(tensor)
        progress(tensor.size)


def _ahead(items: Iterator[T]) -> Iterator[T]:
  """The items, each made by another thread while the one before is used."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
      coming = pool.submit(next, items, None)
      yield item


def _end(header: dict[str, Any]) -> int:
  """Where the last tensor of a file ends, counted from the header's end."""
  return next(reversed(header.values()))["data_offsets"][1] if header else 0


@contextlib.contextmanager
def _create(path: Any, header: dict[str, Any]) -> Iterator[Any]:
  """A safetensors file, written up to its first tensor."""
  text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
  text += b" " * (-len(text) % 8)
  try:
    with path.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      yield file
      if not paths.remote(path):
        file.flush()
        os.fsync(file.fileno())
  except OSError as error:
    raise OSError(
      error.errno, f"{path}: cannot be written ({error.strerror})."
    ) from error


def open_file(path: pathlib.Path) -> Any:
  """A safetensors file, mapped.

  Raises:
    ValueError: it is missing, damaged or cut short.
  """
  if not path.is_file():
    raise ValueError(f"{path}: no such file, but {INDEX} names it.")
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path}: damaged or cut short ({error}); copy it again."
    ) from error


def _check_names(expected: set[str], found: Mapping[str, Place]) -> None:
  if expected == found.keys():
    return
  known = {name: at for name, at in found.items() if name in expected}
  lacking = [_in_files(name, known) for name in expected - found.keys()]
  beside = [
    f"{key} ({path.name})"
    for name, (path, key) in found.items()
    if name not in expected
  ]
  parts = []
  for words, names in (
    ("lacks", lacking),
    ("has beside what config.json asks for", beside),
  ):
    if names:
      some = ", ".join(sorted(names)[:5])
      more = f" and {len(names) - 5} more" if len(names) > 5 else ""
      parts.append(f"{words} {some}{more}")
  home = next(
    (str(path.parent) for path, _ in found.values()), "the checkpoint"
  )
  raise ValueError(
    f"{home}: {'; '.join(parts)}. Expected config.json and weights of one "
    "model, as they were saved together."
  )


def _in_files(name: str, known: Mapping[str, Place]) -> str:
  """A name as the files would have it, judged by others of its part."""
  part = name.partition(".")[0]
  for ours, (_, theirs) in known.items():
    if ours.partition(".")[0] == part:
      ends = zip(reversed(ours), reversed(theirs), strict=False)
      same = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], ends))
      stem = theirs[: len(theirs) - same]
      return stem + name.removeprefix(ours[: len(ours) - same])
  return name


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  *parents, last = path
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = value
