"""The questions that a plan is made for: lengths, and arrays that take no memory."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Int

from jaxvlm import sharding
from jaxvlm.data.vision_layout import Layout, mrope_positions
from jaxvlm.models import Network
from jaxvlm.types import Example, Question, Unmerged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
  """Tokens of a run's prompts and completions."""

  prompt: int  # mean, visual tokens among them
  longest_prompt: int
  visual: int  # mean visual tokens of a prompt; 0: text alone
  most_visual: int
  completion: int  # mean
  longest_completion: int

  def __post_init__(self) -> None:
    for name, most, least in (
      ("prompt", self.longest_prompt, self.visual + 2),
      ("visual", self.most_visual, 0),
      ("completion", self.longest_completion, 1),
    ):
      if not least <= getattr(self, name) <= most:
        raise ValueError(
          f"lengths: a mean {name} of {getattr(self, name)} tokens; expected "
          f"{least} to {most}."
        )


def questions(count: int, lengths: Lengths, layout: Layout) -> list[Question]:
  """So many of mean length, but one that is as long as may be.

  Their patches have one number; see `widen`.
  """
  longest = _question(lengths.longest_prompt, lengths.most_visual, layout)
  mean = _question(lengths.prompt, lengths.visual, layout)
  shape = mean.pixel_values.shape
  return [
    longest,
    *(  # each has a picture of its own, which is encoded for itself
      dataclasses.replace(
        mean, pixel_values=np.broadcast_to(np.float32(i), shape)
      )
      for i in range(1, count)
    ),
  ]


def _question(tokens: int, visual: int, layout: Layout) -> Question:
  """One picture, as nearly square as its visual tokens can be, then text."""
  high = next((n for n in range(int(visual**0.5), 0, -1) if visual % n == 0), 1)
  side = layout.spatial_merge_size
  grid = np.array([[1, high * side, visual // high * side]][: visual > 0], int)
  grid = grid.reshape(-1, 3)
  # At least a token of text on either side, as templates have it.
  ids = np.ones(tokens, np.int32)
  ids[1 : visual + 1] = layout.image_token_id
  shape = (visual * layout.patches_per_token, 1)
  return Question(
    question_id=0,
    example=Example(problem="", answer=""),
    prompt_ids=ids,
    position_ids=mrope_positions(ids, grid, layout),
    pixel_values=np.broadcast_to(np.float32(0), shape),
    image_grid_thw=grid,
  )


def seen(
  question: Question, network: Network, layout: Layout, *, merged: bool = True
) -> Question:
  """The question with what the tower saw of it: one number of each vector."""
  tokens = len(question.pixel_values) // layout.patches_per_token
  shape = (1,) if merged else (layout.patches_per_token, 1)
  features = np.broadcast_to(
    np.zeros((), jnp.dtype(network.dtype)),
    (1 + network.num_levels, tokens, *shape),
  )
  return dataclasses.replace(question, features=features)


def widen(vision: Any, network: Network) -> Any:
  """Shapes of lanes with all numbers of a patch or token, for one of each."""
  tower = network.config.vision_config
  unmerged = isinstance(vision, Unmerged)
  size = tower.hidden_size if unmerged else tower.out_hidden_size
  sizes = {"pixel_values": math.prod(tower.patch_shape)}
  sizes |= dict.fromkeys(("tokens", "levels"), size)

  def one(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    wide = sizes.get(path[-1].name)
    if wide is None:
      return x
    shape = (*x.shape[:-1], wide)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

  return jax.tree_util.tree_map_with_path(one, vision)


def completion_lengths(count: int, lengths: Lengths) -> Int[np.ndarray, " N"]:
  """So many, of exponential spread about the mean and cut off at the longest.

  The longest is among them: of many completions one nearly always is cut off.
  """
  quantiles = -np.log1p(-(np.arange(count) + 0.5) / count)
  low, high = 0.0, 64.0 * lengths.longest_completion
  for _ in range(64):  # the scale at which the mean comes out
    scale = (low + high) / 2
    found = np.clip(scale * quantiles, 1, lengths.longest_completion)
    low, high = (
      (low, scale) if found.mean() > lengths.completion else (scale, high)
    )
  found = np.ceil(found).astype(int)
  found[-1] = lengths.longest_completion
  return found


def masks(
  count: int, group: int, lengths: Lengths, columns: int
) -> Bool[np.ndarray, "Q G C"]:
  """Of completions, spread over the groups; the first group is the longest.

  Where rows of the longest group would leave some of a microbatch's columns
  empty, it is as long as rows that fill them: no microbatch is larger.
  """
  found = completion_lengths(count * group, lengths)
  found = np.random.default_rng(0).permutation(found).reshape(count, group)
  longest = lengths.longest_prompt + group * lengths.longest_completion
  if longest < columns:
    longest = columns // -(-columns // longest)
  found[0] = max((longest - lengths.longest_prompt) // group, 1)
  return np.arange(lengths.longest_completion) < found[..., None]


def whole(mesh: Mesh, local: Any, parts: int) -> Any:
  """A record of one data shard -> shapes of the global one, placed.

  Args:
    mesh: whose shards there are.
    local: numpy arrays.
    parts: times that the axis which is split is longer in the global record.
  """

  def one(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
    axes = sharding.batch_axes(path)
    at = len(axes) - 1
    shape = (*x.shape[:at], x.shape[at] * parts, *x.shape[at + 1 :])
    placed = NamedSharding(mesh, sharding.spec(axes))
    return jax.ShapeDtypeStruct(
      shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=placed
    )

  return jax.tree_util.tree_map_with_path(one, local)
