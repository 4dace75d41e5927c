"""The vision tower asked once: for rollouts, and for all where it is frozen."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxvlm import compiling, filling, sharding
from jaxvlm.data.vision_layout import (
  Layout,
  alike,
  capacity,
  pack_vision,
  patch_capacity,
)
from jaxvlm.filling import UNKNOWN, Known
from jaxvlm.metrics import Metrics, add
from jaxvlm.models import Network
from jaxvlm.types import Features, Params, Question, Unmerged, Vision

# Patches of a lane, at least: small pictures share one, where long lanes are as
# good as many.
_LANE = {"cpu": 0, "gpu": 1024, "tpu": 1024}
_STEP = {"cpu": 4, "gpu": 128, "tpu": 128}  # in which lanes are wider
# And of all lanes of a data shard that are read together: what stays near two
# cores, and what fills an accelerator.
_TOGETHER = {"cpu": 4096, "gpu": 32768, "tpu": 32768}
_CALLS = 4  # for a batch in which each question has a lane of its own, or more


@functools.partial(jax.jit, static_argnums=0)
def encode(
  network: Network, params: Params, vision: Vision | Unmerged
) -> Features:
  return network.encode(params, vision)


@functools.partial(jax.jit, static_argnums=0)
def see(network: Network, params: Params, vision: Vision) -> Unmerged:
  return network.see(params, vision)


class Encoder:
  """What a network's tower sees, written beside the pictures.

  Attributes:
    padding: patches of all lanes so far that mean nothing, and all.
  """

  def __init__(
    self,
    *,
    network: Network,
    mesh: Mesh,
    layout: Layout,
    known: Known = UNKNOWN,
  ):
    self._network, self._mesh, self._layout = network, mesh, layout
    # Of known data a lane holds the largest; others have a bucket of their own.
    backend = sharding.backend()
    largest = -(-known.patches // _STEP[backend]) * _STEP[backend]
    self._lane = max(largest, _LANE[backend])
    self._together = _together([b[:, 1] for b in known.batches], self._lane)
    self._shards = sharding.host_shards(mesh)
    self.padding: Metrics = {}

  def __call__(
    self, params: Params, questions: Sequence[Question], *, merge: bool = True
  ) -> list[Question]:
    """The questions of this host with their features; text's are empty.

    A batch that has them stays as it is, and one of text alone asks no tower.
    What several questions show is encoded once.

    Args:
      params: the tree.
      questions: of this host; features of theirs that are not merged yet are
        merged, without the rest of the tower.
      merge: False: the features are what the mergers are given.
    """
    sizes = np.array([len(q.pixel_values) for q in questions])
    longest = int(sharding.agree_max(sizes.max()))
    known = questions[0].features
    if known is not None and (known.ndim == 3 or not merge or not longest):
      return list(questions)
    if not longest:
      nothing = self._nothing(merge)
      return [dataclasses.replace(q, features=nothing) for q in questions]
    first = alike(questions)
    sizes[first != np.arange(len(questions))] = 0
    lane, most = self.shape(longest, len(questions))
    rows, together, _ = filling.fill(
      sizes,
      np.zeros_like(sizes),
      width=lane,
      shards=self._shards,
      together=most,
      even=False,
    )
    whole = float(len(rows) * lane)
    self.padding = add(
      self.padding, {"padding/lanes": (whole - sizes.sum(), whole)}
    )
    seen: list[Unmerged | Features] = []
    for start in range(0, len(rows), together):
      vision = pack_vision(
        [[questions[q] for q in row] for row in rows[start:][:together]],
        layout=self._layout,
        patches=lane,
        like=questions[0],
      )
      assert isinstance(vision, Vision | Unmerged)
      seen.append(self._see(params, vision, merge))
      jax.block_until_ready(seen[-2:-1])  # the host packs one call ahead
    lanes = [found for features in seen for found in _lanes(features)]
    features = [lanes[0][:, :0]] * len(questions)
    for row, found in zip(rows, lanes, strict=True):
      ends = np.cumsum(sizes[row]) // self._layout.patches_per_token
      for q, own in zip(row, np.split(found, ends, axis=1), strict=False):
        features[q] = own
    return [
      dataclasses.replace(question, features=features[q])
      for question, q in zip(questions, first, strict=True)
    ]

  def shape(self, longest: int, questions: int) -> tuple[int, int]:
    """Patches of a lane, and lanes of a data shard that are read together.

    Args:
      longest: patches of the question with most.
      questions: of this host.
    """
    if longest <= self._lane and self._together:
      return self._lane, self._together
    lane = self._lane
    if longest > lane:
      lane = patch_capacity(longest, self._layout)
    # One shape for batches of so many questions, however many are of text.
    each = -(-questions // self._shards)
    return lane, min(capacity(-(-each // _CALLS)), _most(lane))

  def _nothing(self, merge: bool) -> np.ndarray:
    """Features of text, [1+K 0 D] or [1+K 0 B E]."""
    tower = self._network.config.vision_config
    levels = self._network.num_levels
    each = (self._layout.patches_per_token, tower.hidden_size)
    shape = (tower.out_hidden_size,) if merge else each
    return np.zeros((1 + levels, 0, *shape), jnp.dtype(self._network.dtype))

  def _see(
    self, params: Params, vision: Vision | Unmerged, merge: bool
  ) -> Unmerged | Features:
    placed = sharding.place(self._mesh, {"vision": vision})["vision"]
    lanes, length = vision.lanes
    name, run = ("encode", encode) if merge else ("see", see)
    with (
      sharding.use(self._mesh),
      compiling.program(name, lanes=lanes, length=length),
    ):
      return run(self._network, params, placed)


def _most(lane: int) -> int:
  """Lanes of a data shard that are read together, at most."""
  return max(_TOGETHER[sharding.backend()] // lane, 1)


def _together(batches: Sequence[Int[np.ndarray, " N"]], lane: int) -> int:
  """So many lanes in a call leave few of such batches empty; 0: no pictures."""
  rows = np.array(
    [len(filling.first_fit(own, lane)) for own in batches if own.any()]
  )
  if not rows.size:
    return 0
  most = min(-(-rows.max() // _CALLS), _most(lane))
  # Not fewer than half: a call has its own cost.
  options = range(most, most // 2, -1)
  return min(options, key=lambda n: np.mean(-rows % n / (rows + -rows % n)))


def _lanes(features: Unmerged | Features) -> np.ndarray:
  """[S 1+K M D] of this host, or [S 1+K M B E]."""
  found = sharding.to_host(features.tokens)[None]
  if features.levels is not None:
    levels = sharding.to_host(features.levels, axis=1)
    found = np.concatenate([found, levels])
  return found.swapaxes(0, 1)
