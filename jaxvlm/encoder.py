"""A frozen vision tower, asked once for rollout, reference and update."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxvlm import compiling, sharding
from jaxvlm.data.vision_layout import Layout, pack_vision, patch_capacity
from jaxvlm.models import Network
from jaxvlm.types import Features, Params, Question, Vision


@functools.partial(jax.jit, static_argnums=0)
def _encode(network: Network, params: Params, vision: Vision) -> Features:
  return network.encode(params, vision)


class Encoder:
  """What a network's tower sees, written beside the pictures."""

  def __init__(self, *, network: Network, mesh: Mesh, layout: Layout):
    self._network, self._mesh, self._layout = network, mesh, layout

  def __call__(
    self, params: Params, questions: Sequence[Question]
  ) -> list[Question]:
    """The questions of this host with their features; text's are empty.

    Args:
      params: the policy.
      questions: a multiple of this host's data shards.
    """
    counts = [len(q.pixel_values) for q in questions]
    patches = int(sharding.agree_max(max(counts)))
    if not patches:
      return list(questions)
    patches = patch_capacity(patches, self._layout)
    vision = pack_vision(
      [[q] for q in questions], layout=self._layout, patches=patches
    )
    placed = sharding.place(self._mesh, {"vision": vision})["vision"]
    with (
      sharding.use(self._mesh),
      compiling.program("encode", lanes=len(counts), patches=patches),
    ):
      found = _encode(self._network, params, placed)
    lanes = sharding.to_host(found.tokens)[None]
    if found.levels is not None:
      levels = sharding.to_host(found.levels, axis=1)
      lanes = np.concatenate([lanes, levels])
    own = [count // self._layout.patches_per_token for count in counts]
    return [
      dataclasses.replace(question, features=lanes[:, q, : own[q]])
      for q, question in enumerate(questions)
    ]
