"""Hugging Face checkpoint directories: reading and writing them."""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxvlm import paths, sharding
from jaxvlm.models.network import Network, find_family
from jaxvlm.nn import hf
from jaxvlm.nn.hf import Weight
from jaxvlm.types import Params

# A checkpoint that tools/convert_hf.py wrote has its weights here, in Orbax's
# form, instead of in safetensors.
ORBAX = "params"

# Of a checkpoint's files, those that go along when it is exported: config,
# tokenizer, processor, chat template, generation settings, licence.
COMPANIONS = (".json", ".jinja", ".txt", ".model", "LICENSE")


def load_network(
  directory: str | pathlib.Path,
  *,
  dtype: str,
  param_dtype: str,
  remat: str,
  attention: str,
) -> Network:
  """Reads the architecture of a checkpoint directory.

  The head is tied where config.json says so, or where the files have none.

  Raises:
    ValueError: no such directory or file, or a family not built here.
  """
  directory = pathlib.Path(directory)
  raw = _read_config(directory)
  tied = False
  if not (directory / ORBAX).is_dir():
    tied = "lm_head.weight" not in find_tensors(directory)
  try:
    config = find_family(raw.get("model_type")).Config.from_hf(
      {**raw, "tie_word_embeddings": raw.get("tie_word_embeddings") or tied}
    )
  except ValueError as error:
    raise ValueError(f"{directory}: {error}") from error
  return Network(
    config=config,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
    attention=attention,
  )


def find_tensors(directory: str | pathlib.Path) -> dict[str, hf.Place]:
  """Where each tensor of a checkpoint is: the tree's name -> its place.

  Raises:
    ValueError: no safetensors, a file that is missing or cut short.
  """
  return hf.find_tensors(pathlib.Path(directory), _to_ours)


def check_tensors(network: Network, directory: str | pathlib.Path) -> None:
  """Checks names, shapes and dtypes of the files' tensors, and reads none.

  Raises:
    ValueError: as `load_params`.
  """
  if not (pathlib.Path(directory) / ORBAX).is_dir():
    found = find_tensors(directory)
    hf.check(weights(network), found, ignored=_ignored(network))


def load_params(
  network: Network,
  directory: str | pathlib.Path,
  mesh: Mesh | None = None,
  progress: Callable[[int], object] = lambda weights: None,
) -> Params:
  """Reads the weights of a checkpoint directory, cast to param_dtype.

  Each process reads what its own devices hold, one leaf at a time.

  Args:
    network: from `load_network`.
    directory: has model.safetensors, or an index and its files.
    mesh: lays each weight out by its logical axes; None: on one device.
    progress: called with the number of weights read since its last call.

  Raises:
    ValueError: a file that is missing or cut short; a tensor that is missing,
      unknown, mis-shaped or not finite, by name.
  """
  axes = traverse_util.flatten_dict(network.axes())

  def make(weight: Weight, read: Callable[[hf.Index], np.ndarray]) -> jax.Array:
    layout: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(
      jax.local_devices()[0]
    )
    if mesh is not None:
      layout = sharding.sharding(mesh, axes[weight.path], weight.shape)
    parts: dict[str, np.ndarray] = {}  # that several devices hold

    def part(index: Any) -> np.ndarray:
      if (key := str(index)) not in parts:
        parts[key] = read(index)
      return parts[key]

    array = jax.make_array_from_callback(weight.shape, layout, part)
    progress(array.size)
    return array

  return hf.read(
    weights(network),
    find_tensors(directory),
    ignored=_ignored(network),
    dtype=network.param_dtype,
    make=make,
  )


def _ignored(network: Network) -> list[str]:
  return ["lm_head.weight"] if network.config.tie_word_embeddings else []


def save_hf(
  network: Network,
  params: Params,
  source_dir: str | pathlib.Path,
  destination: str | pathlib.Path,
  progress: Callable[[int], object] = lambda written: None,
) -> None:
  """Writes a directory that transformers loads, with the hub's tensor names.

  Every process must call it; the first one writes. The directory appears
  whole or not at all: it is written aside, then renamed.

  Args:
    network: the architecture.
    params: its weights, cast to param_dtype; arrays of jax, or whatever
      numpy makes arrays of, a layer at a time.
    source_dir: whose config, tokenizer, processor and other files go along.
    destination: an earlier export there is replaced.
    progress: called with the number of bytes written since its last call.

  Raises:
    ValueError: the destination holds something else than a model.
    OSError: a file cannot be written, as on a full disk.
  """
  place = paths.path(destination)
  if place.exists() and not (place / "config.json").exists():
    raise ValueError(
      f"{place}: exists and is no model directory; remove it or choose "
      "another place."
    )
  # Of a bucket no directory is renamed: there config.json, the last file,
  # says that all are there.
  aside = place
  if not paths.remote(place):
    aside = place.with_name(f".{place.name}.partial")
  writer = jax.process_index() == 0
  leaves = traverse_util.flatten_dict(params)

  def fetch(weight: Weight) -> Iterable[np.ndarray] | np.ndarray:
    leaf = leaves[weight.path]
    if weight.stacked:
      return (_fetch(leaf[i]) for i in range(len(weight.names)))
    return _fetch(leaf)

  try:
    if writer:
      paths.remove(aside)
      aside.mkdir(parents=True)
    hf.write(
      weights(network),
      aside if writer else None,
      dtype=network.param_dtype,
      rename=hub_name(network),
      fetch=fetch,
      progress=progress,
    )
    if writer:
      copy_companions(network, source_dir, aside)
      if aside != place:
        _replace_directory(aside, place)
  finally:
    if writer and aside != place:
      shutil.rmtree(aside, ignore_errors=True)


def hub_name(network: Network) -> Callable[[str], str]:
  """From a tensor's name in the tree to that in the hub's files."""
  family = find_family(network.config.model_type)
  return lambda name: _replace(name, family.HUB_NAMES)


def _fetch(array: Any) -> np.ndarray:
  """An array on this host, whichever hosts hold its parts."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def weights(network: Network) -> list[Weight]:
  """Every leaf of Params and its tensors, by module names without "model."."""
  family = find_family(network.config.model_type)
  shapes = traverse_util.flatten_dict(network.shapes())
  axes = traverse_util.flatten_dict(network.axes())
  hf_shapes = traverse_util.flatten_dict(network.metadata("hf_shape"))
  result = []
  for path, leaf in shapes.items():
    stacked = axes[path][0] == "layer"
    # A stack is always the second word: visual.blocks, language_model.layers.
    stems = [path[:-1]]
    if stacked:
      count = leaf.shape[0]
      stems = [(*path[:2], str(i), *path[2:-1]) for i in range(count)]
    last = "bias" if path[-1] == "bias" else "weight"
    result.append(
      Weight(
        path=path,
        names=tuple(
          _replace(".".join([*stem, last]), family.RENAMED) for stem in stems
        ),
        stacked=stacked,
        layer_shape=leaf.shape[1:] if stacked else leaf.shape,
        hf_shape=hf_shapes[path],
      )
    )
  return result


def _replace_directory(new: pathlib.Path, place: pathlib.Path) -> None:
  old = place.with_name(f".{place.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  if place.exists():
    place.rename(old)
  new.rename(place)
  shutil.rmtree(old, ignore_errors=True)


def _replace(name: str, table: dict[str, str]) -> str:
  for ours, theirs in table.items():
    name = name.replace(ours, theirs)
  return name


def _to_ours(name: str) -> str:
  """A tensor's name in any of the layouts in use, as the tree has it.

  Hub files of Qwen2.5-VL say model.layers and visual.blocks, transformers'
  modules model.language_model.layers and model.visual.blocks, and a base model
  saved alone leaves out the leading model.
  """
  for part in ("visual.", "language_model."):
    if name.startswith(f"model.{part}"):
      return name.removeprefix("model.")
  if name.startswith("model."):
    return f"language_{name}"
  return name


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / "config.json"
  if not path.is_file():
    raise ValueError(
      f"{path}: no such file; expected the directory of a Hugging Face model. "
      "Nothing is downloaded here; `hf download ID --local-dir DIR` does."
    )
  return hf.read_json(path)


def copy_companions(
  network: Network,
  source: str | pathlib.Path,
  destination: str | pathlib.Path,
) -> None:
  """Copies all but weights; config.json says how the weights now are."""
  source, place = pathlib.Path(source), paths.path(destination)
  for file in sorted(source.iterdir()):
    if file.name.endswith(COMPANIONS) and file.name != hf.INDEX:
      (place / file.name).write_bytes(file.read_bytes())
  raw = _read_config(source)
  raw["tie_word_embeddings"] = network.config.tie_word_embeddings
  for part in (raw, raw.get("text_config", {}), raw.get("vision_config", {})):
    for key in ("dtype", "torch_dtype"):
      if part is raw or key in part:
        part.pop(key, None)
        part["dtype"] = network.param_dtype
  text = json.dumps(raw, indent=2, sort_keys=True)
  (place / "config.json").write_text(f"{text}\n")
