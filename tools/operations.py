"""Operations and bytes that a work of bench.py needs, with this layout of it.

What is counted, from the network's shapes and the arrays' lengths alone:

  products with weights   2 for each weight and vector forward, 4 more backward
                          where it is trained (2 where no gradient goes on)
  attention               4 H for each head and pair of a query and a key that
                          it sees, 2.5 times that more backward: five products,
                          the scores' made again, for two
  bytes                   weights, once a pass, or once a step of decoding; keys
                          and values of the columns that a step sees, a prompt's
                          once for all its completions; pixels; what the
                          optimizer reads and writes

A group is one prompt and its completions, the tower sees a picture once a pass.
Left out are padding, rows that have ended, what remat and the head's backward
pass compute again, norms, softmax and sampling: a run does more than this.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxvlm import models
from jaxvlm.data.vision_layout import Layout, patch_places

FORWARD, BACKWARD = 2, 4  # operations for each weight and vector
PAIR, PAIR_BACKWARD = 4, 10  # for each pair, and number of a head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """Vectors, so many at a time, times weights [inner outer]."""

  rows: int
  inner: int
  outer: int
  flops: float  # of all of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
  """What must be done, however it is done."""

  products: tuple[Product, ...] = ()
  attention: float = 0.0  # operations
  bytes: float = 0.0  # read or written

  @property
  def flops(self) -> float:
    return sum(x.flops for x in self.products) + self.attention

  def __add__(self, other: "Need") -> "Need":
    return Need(
      products=self.products + other.products,
      attention=self.attention + other.attention,
      bytes=self.bytes + other.bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Lengths of groups, without padding."""

  prompts: Int[np.ndarray, " Q"]
  completions: Int[np.ndarray, "Q G"]
  grids: Int[np.ndarray, "I 3"]  # of all pictures, in patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """Weights [inner outer] of so many layers, and what they are applied to."""

  unit: str  # pixels | patch | visual | token | target
  layers: int
  inner: int
  outer: int

  @property
  def size(self) -> int:
    return self.layers * self.inner * self.outer


# -- what a network has --------------------------------------------------------


def kernels(network: models.Network) -> list[Kernel]:
  """All matrices; a tied head is one of its own."""
  found = [
    Kernel(
      unit=_unit(weight.path),
      layers=len(weight.names),
      inner=math.prod(weight.hf_shape[1:]),
      outer=weight.hf_shape[0],
    )
    for weight in models.weights(network)
    if weight.path[-1] == "kernel"
  ]
  if network.config.tie_word_embeddings:
    text = network.config.text_config
    size = {"inner": text.hidden_size, "outer": text.vocab_size}
    found.append(Kernel(unit="target", layers=1, **size))
  return found


def _unit(path: tuple[str, ...]) -> str:
  if path[0] == "lm_head":
    return "target"
  if path[0] != "visual":
    return "token"
  if path[1] == "patch_embed":
    return "pixels"
  return "visual" if "merger" in path[1] else "patch"


def tower_pairs(network: models.Network, grids: Int[np.ndarray, "I 3"]) -> int:
  """Pairs of patches that see each other, over all blocks."""
  tower = network.config.vision_config
  layout = Layout.from_config(network.config.to_hf())
  places = patch_places(grids, layout)
  whole, windows = (
    0 if x is None else int((np.bincount(x) ** 2).sum())
    for x in (places.full_segments, places.window_segments)
  )
  full = tower.depth
  if layout.window_size:
    full = np.isin(range(tower.depth), tower.fullatt_block_indexes).sum()
  return int(full * whole + (tower.depth - full) * windows)


def decoder_pairs(batch: Batch) -> int:
  """Pairs of packed trees: prompts, completions over them and themselves."""
  own, length = batch.prompts, batch.completions
  pairs = triangle(own).sum() + (length * own[:, None]).sum()
  return int(pairs + triangle(length).sum())


def triangle(n: Any) -> Any:
  """Pairs of n tokens that see themselves and all before."""
  return n * (n + 1) // 2


# -- what a work needs ---------------------------------------------------------


def of_tower(
  network: models.Network,
  grids: Int[np.ndarray, "I 3"],
  *,
  at_once: int,
  trained: bool,
) -> Need:
  """All pictures through tower and mergers; bytes of pixels and weights."""
  if not len(grids):
    return Need()
  config = network.config.vision_config
  patches = int(grids.prod(1).sum())
  visual = patches // config.spatial_merge_size**2
  counts = {"pixels": patches, "patch": patches, "visual": visual}
  found = _pass(network, counts, at_once=at_once, trained=trained)
  pairs = tower_pairs(network, grids) * config.hidden_size
  pixels = 4 * patches * math.prod(config.patch_shape)
  return found + Need(attention=_pair(trained) * pairs, bytes=pixels)


def of_groups(
  network: models.Network, batch: Batch, *, at_once: int, trained: bool
) -> Need:
  """Logprobs of all completions, and their gradient where it is trained."""
  lengths = batch.completions.sum()
  counts = {"token": batch.prompts.sum() + lengths, "target": lengths}
  found = _pass(network, counts, at_once=at_once, trained=trained)
  pairs = decoder_pairs(batch) * _width(network)
  return (
    of_tower(network, batch.grids, at_once=at_once, trained=trained)
    + found
    + Need(attention=_pair(trained) * pairs)
  )


def of_update(network: models.Network, batch: Batch, *, at_once: int) -> Need:
  """The reference's logprobs, the gradient, and AdamW's step."""
  weights = sum(x.size for x in jax.tree.leaves(network.shapes()))
  # The gradient and both moments, in float32, and the weights: there and back.
  each = 2 * (4 + 8 + jnp.dtype(network.param_dtype).itemsize)
  return (
    of_groups(network, batch, at_once=at_once, trained=False)
    + of_groups(network, batch, at_once=at_once, trained=True)
    + Need(bytes=each * weights)
  )


def of_rollout(network: models.Network, batch: Batch, *, at_once: int) -> Need:
  """Prompts are read once, and completions fed but for their last token.

  Each first token is drawn from what its prompt's last column says; a step
  feeds one token of every completion that goes on.
  """
  prompts, fed = batch.prompts, batch.completions - 1
  steps = int(fed.max(initial=0))
  counts = {"token": prompts.sum(), "target": len(prompts)}
  read = (
    of_tower(network, batch.grids, at_once=at_once, trained=False)
    + _pass(network, counts, at_once=at_once, trained=False)
    + Need(attention=PAIR * triangle(prompts).sum() * _width(network))
  )
  if not steps:
    return read
  counts = {"token": fed.sum(), "target": fed.sum()}
  live = -(-int(fed.sum()) // steps)  # completions of a step, on average
  decode = _pass(network, counts, at_once=live, trained=False, passes=steps)
  pairs = (fed * prompts[:, None]).sum() + triangle(fed).sum()
  columns = (prompts * fed.max(1)).sum() + triangle(fed).sum()
  return (
    read
    + decode
    + Need(
      attention=PAIR * pairs * _width(network),
      bytes=columns * column_bytes(network),
    )
  )


def column_bytes(network: models.Network) -> int:
  """Keys and values of a token, in all layers."""
  text = network.config.text_config
  numbers = 2 * text.num_key_value_heads * text.head_dim
  itemsize = jnp.dtype(network.dtype).itemsize
  return text.num_hidden_layers * numbers * itemsize


def of_work(
  work: str,
  network: models.Network,
  arrays: Mapping[str, np.ndarray],
  *,
  at_once: int,
) -> Need:
  """A repetition of one of bench.py's works.

  Args:
    work: W1 to W5.
    network: of the model.
    arrays: of inputs.npz.
    at_once: tokens of a microbatch; other calls but decoding's are taken to
      be cut likewise, for larger products are hardly faster.
  """
  if work == "W5":
    return of_tower(network, arrays["v_grid"], at_once=at_once, trained=False)
  count, length = arrays["prompts"].shape
  shape = (count, int(arrays["G"]))
  lengths = np.full(shape, int(arrays["R"]))
  if work == "W2":
    lengths = arrays["lengths"].reshape(shape).astype(int)
  batch = Batch(
    prompts=np.full(count, length), completions=lengths, grids=arrays["grid"]
  )
  found = Need()
  if work != "W3":
    found += of_rollout(network, batch, at_once=at_once)
  if work in ("W3", "W4"):
    found += of_update(network, batch, at_once=at_once)
  return found


def _pass(
  network: models.Network,
  counts: Mapping[str, int],
  *,
  at_once: int,
  trained: bool,
  passes: int = 1,
) -> Need:
  """So many vectors of each unit through the weights that it meets."""
  products, weights = [], 0
  for kernel in kernels(network):
    if not (count := int(counts.get(kernel.unit, 0))):
      continue
    each = FORWARD
    if trained:
      each += BACKWARD // 2 if kernel.unit == "pixels" else BACKWARD
    weights += kernel.size
    products.append(
      Product(
        rows=min(count, at_once),
        inner=kernel.inner,
        outer=kernel.outer,
        flops=float(each * count * kernel.size),
      )
    )
  # Once more for the backward pass.
  reads = weights * passes * (1 + trained)
  itemsize = jnp.dtype(network.dtype).itemsize
  return Need(products=tuple(products), bytes=float(reads * itemsize))


def _width(network: models.Network) -> int:
  """Numbers of a token's queries, over layers and heads."""
  text = network.config.text_config
  return text.num_hidden_layers * text.num_attention_heads * text.head_dim


def _pair(trained: bool) -> int:
  return PAIR + PAIR_BACKWARD * trained
