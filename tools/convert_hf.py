"""Hugging Face directories <-> Orbax checkpoints, in bounded memory.

  python tools/convert_hf.py to-orbax SRC DST   # SRC: a Hugging Face directory
  python tools/convert_hf.py to-hf CKPT DST     # CKPT: what to-orbax wrote, or
                                                # RUN/checkpoints/STEP,
                                                # RUN/best/STAGE of a run
  python tools/convert_hf.py check A B          # tensor by tensor

An Orbax checkpoint that to-orbax wrote has the source's config, tokenizer and
processor beside the weights, so --config.model.checkpoint takes it as it takes
a Hugging Face directory. Nothing is taken for whole that was not written to
its end.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator

# Weights pass through the host's memory; no accelerator is needed or touched.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax import traverse_util
from rich.table import Table

from jaxvlm import checkpoint, models, paths
from jaxvlm.display import Display, make_console
from jaxvlm.models import Network
from jaxvlm.nn import hf

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """One tensor of a checkpoint by its name in the tree, unread."""

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name, (source, destination) in {
    "to-orbax": ("SRC", "DST"),
    "to-hf": ("CKPT", "DST"),
  }.items():
    command = commands.add_parser(name)
    command.add_argument("source", metavar=source, type=paths.local_path)
    command.add_argument(
      "destination", metavar=destination, type=paths.local_path
    )
    command.add_argument(
      "--dtype", choices=DTYPES, help="of the weights; the source's by default"
    )
  check = commands.add_parser("check")
  check.add_argument("first", metavar="A", type=paths.local_path)
  check.add_argument("second", metavar="B", type=paths.local_path)
  given = parser.parse_args(arguments)
  try:
    if given.command == "check":
      sys.exit(check_equal(given.first, given.second))
    convert = {"to-orbax": to_orbax, "to-hf": to_hf}[given.command]
    convert(given.source, given.destination, given.dtype)
  except (OSError, ValueError) as error:
    sys.exit(f"convert_hf: {error}")


def to_orbax(
  source: pathlib.Path, destination: pathlib.Path, dtype: str | None
) -> None:
  """Writes the weights of a Hugging Face directory as an Orbax checkpoint.

  Raises:
    ValueError: the source is not whole or not supported, or the destination
      exists.
    OSError: a file cannot be written, as on a full disk.
  """
  _check_free(destination)
  if (source / models.ORBAX).is_dir() or (source / "state").is_dir():
    raise ValueError(
      f"{source}: is an Orbax checkpoint already; to-hf converts those."
    )
  network = _network(source, "float32")
  found = models.find_tensors(source)
  weights = models.weights(network)
  dtypes = {dtype} if dtype else hf.check_tensors(weights, found)
  if len(dtypes) > 1:
    raise ValueError(
      f"{source}: has tensors of {' and '.join(sorted(dtypes))}; choose one "
      "with --dtype."
    )
  network = dataclasses.replace(network, param_dtype=dtypes.pop())
  aside = destination.with_name(f".{destination.name}.partial")
  shutil.rmtree(aside, ignore_errors=True)
  try:
    _make(aside, destination)  # before the long read
    with _bar("read", _bytes(network)) as advance:
      size = np.dtype(network.param_dtype).itemsize
      params = models.load_params(
        network, source, progress=lambda count: advance(size * count)
      )
    models.copy_companions(network, source, aside)
    with _watched(aside, _bytes(network)):
      checkpoint.save_params(aside / models.ORBAX, params)
    aside.rename(destination)
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def to_hf(
  source: pathlib.Path, destination: pathlib.Path, dtype: str | None
) -> None:
  """Writes an Orbax checkpoint as a directory that transformers loads.

  Raises:
    ValueError: the source is no such checkpoint, or the destination exists.
    OSError: a file cannot be written, as on a full disk.
  """
  _check_free(destination)
  path, home = _find_orbax(source)
  params = checkpoint.open_params(path)
  arrays = traverse_util.flatten_dict(params)
  network = _network(home, dtype or str(next(iter(arrays.values())).dtype.name))
  expected = {weight.path: weight.shape for weight in models.weights(network)}
  got = {path: tuple(array.shape) for path, array in arrays.items()}
  if got != expected:
    names = sorted(
      "/".join(path)
      for path in got.keys() | expected.keys()
      if got.get(path) != expected.get(path)
    )
    raise ValueError(
      f"{path}: does not fit {home / 'config.json'}: {', '.join(names[:5])}"
      + (f" and {len(names) - 5} more." if len(names) > 5 else ".")
    )
  _make(destination.parent, destination)
  with _bar("write", _bytes(network)) as advance:
    models.save_hf(network, params, home, destination, progress=advance)


def check_equal(first: pathlib.Path, second: pathlib.Path) -> int:
  """Prints where two checkpoints differ; 0 if they are equal bit for bit.

  Raises:
    ValueError: one of them is no checkpoint.
  """
  left, right = _tensors(first), _tensors(second)
  table = Table("tensor", str(first), str(second), "largest difference")
  table.columns[0].no_wrap = True  # names are there to be copied
  equal = 0
  total = sum(math.prod(tensor.shape) for tensor in left.values())
  with _bar("compare", total) as advance:
    for name in sorted(left.keys() | right.keys()):
      a, b = left.get(name), right.get(name)
      difference = _difference(a, b)
      if difference is None:
        equal += 1
      else:
        table.add_row(name, _described(a), _described(b), difference)
      advance(math.prod(a.shape) if a else 0)
  console = make_console()
  if table.row_count:
    console.print(table)
  console.print(
    f"{equal} tensors are equal bit for bit, {table.row_count} differ."
  )
  return 1 if table.row_count else 0


def _difference(a: Tensor | None, b: Tensor | None) -> str | None:
  """What is to be said of two tensors; None: they are the same bits."""
  if a is None or b is None:
    return "missing"
  if a.shape != b.shape:
    return "other shape"
  x, y = a.read(), b.read()
  if a.dtype == b.dtype and x.tobytes() == y.tobytes():
    return None
  gap = np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0.0)
  return f"{gap:.3g}"


def _described(tensor: Tensor | None) -> str:
  return f"{tensor.dtype} {list(tensor.shape)}" if tensor else "-"


def _tensors(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a checkpoint of either form, by the tree's names."""
  if not _is_hf(path):
    saved, home = _find_orbax(path)
    arrays = traverse_util.flatten_dict(checkpoint.open_params(saved))
    return {
      name: tensor
      for weight in models.weights(_network(home, "float32"))
      if weight.path in arrays
      for name, tensor in _layers(weight, arrays[weight.path])
    }
  network = _network(path, "float32")
  found = models.find_tensors(path)
  hf.check_tensors(models.weights(network), found)
  return {name: _in_file(*place) for name, place in found.items()}


def _in_file(path: pathlib.Path, key: str) -> Tensor:
  def read() -> np.ndarray:
    with hf.open_file(path) as tensors:
      return tensors.get_tensor(key)

  with hf.open_file(path) as tensors:
    tensor = tensors.get_slice(key)
    return Tensor(
      shape=tuple(tensor.get_shape()),
      dtype=tensor.get_dtype(),
      read=read,
    )


def _layers(weight: hf.Weight, array: object) -> Iterator[tuple[str, Tensor]]:
  for i, name in enumerate(weight.names):

    def read(i: int = i) -> np.ndarray:
      return weight.tensor(np.asarray(array[i] if weight.stacked else array))

    yield (
      name,
      Tensor(
        shape=weight.hf_shape, dtype=hf.DTYPES[array.dtype.name], read=read
      ),
    )


def _find_orbax(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Where the weights are, and the directory with config and tokenizer."""
  path = path.expanduser().absolute()
  if _is_hf(path):
    raise ValueError(
      f"{path}: is a Hugging Face directory already; to-orbax converts those."
    )
  if (path / models.ORBAX).is_dir():
    return path / models.ORBAX, path
  run = path.parent.parent
  if path.is_dir() and (run / "config.json").is_file():
    model = json.loads((run / "config.json").read_text()).get("model", {})
    base = model.get("checkpoint") or run / "scratch"
    return path, pathlib.Path(base).expanduser()
  raise ValueError(
    f"{path}: neither what to-orbax wrote nor a checkpoint of a run, as "
    "RUN/checkpoints/STEP or RUN/best/STAGE."
  )


def _is_hf(path: pathlib.Path) -> bool:
  others = path / models.ORBAX, path / "checkpoints"  # of to-orbax, of a run
  config = (path / "config.json").is_file()
  return config and not any(other.is_dir() for other in others)


def _make(directory: pathlib.Path, destination: pathlib.Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"{destination}: cannot be written ({error.strerror}); choose another "
      "place."
    ) from error


def _network(directory: pathlib.Path, param_dtype: str) -> Network:
  return models.load_network(
    directory,
    dtype="float32",
    param_dtype=param_dtype,
    remat="none",
    attention="plain",
  )


def _bytes(network: Network) -> int:
  count = sum(leaf.size for leaf in jax.tree.leaves(network.shapes()))
  return count * np.dtype(network.param_dtype).itemsize


def _check_free(destination: pathlib.Path) -> None:
  if destination.exists():
    raise ValueError(f"{destination}: exists; choose another place.")


@contextlib.contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
  """A bar over so many bytes; yields what advances it."""
  done = 0

  def megabytes(count: int) -> int:
    return -(-count // 10**6)

  with (
    Display(make_console()) as display,
    display.task(f"{description} (MB)", total=megabytes(total)) as advance,
  ):

    def advance_by(count: int) -> None:
      nonlocal done
      before, done = done, done + count
      if step := megabytes(done) - megabytes(before):
        advance(step)

    yield advance_by


@contextlib.contextmanager
def _watched(directory: pathlib.Path, total: int) -> Iterator[None]:
  """A bar over what others write into a directory, by the size of its files."""
  done = threading.Event()

  def size() -> int:
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
      files = [file for file in directory.rglob("*") if file.is_file()]
      return sum(file.stat().st_size for file in files)
    return 0

  def watch() -> None:
    seen = 0
    with _bar("write", total) as advance:
      while not done.wait(1.0):
        now = min(size(), total)
        advance(now - seen)
        seen = now
      advance(total - seen)

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


if __name__ == "__main__":
  sys.unraisablehook = checkpoint.print_unraisable
  main()
