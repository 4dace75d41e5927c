"""The records that travel between the stations of the loop.

Letters: Q questions, G completions a question, P prompt length, C completion
length, R packed rows, T packed row length, U rows that follow one another, L
vision patches of a lane, M = L / merge**2 visual tokens, S vision lanes, K
levels of DeepStack.

Arrays are numpy on the host and jax.Array on the device; the records are the
same. Host-only records (`Example`, `Question`, `Scores`) are not pytrees.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

T = TypeVar("T")

if typing.TYPE_CHECKING:
  Array = Any  # of the host or of the device: where a record is, it knows
else:
  Array = jax.Array | np.ndarray
Params = dict[str, Any]  # nested, arrays at the leaves

Picture = str | bytes | np.ndarray  # a path, an encoded file, or uint8 [H W 3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """One row of a data set, as a source gives it."""

  problem: str  # with one <image> marker for each picture
  answer: str  # "" only where response is given
  images: tuple[Picture, ...] = ()
  task: str = ""  # evaluation reports accuracy for each task
  name: str = ""  # file and row, for messages
  report_as: str = ""  # metrics of a step are kept apart by this name
  response: str | None = None  # None: sampled; text: the target of SFT
  # A conversation as chat templates take it, its pictures in `images` and its
  # last turn also in `problem`; (): the problem is the only turn.
  messages: tuple[dict[str, Any], ...] = ()
  # Its further columns: numbers, text and truths; None: it has no value.
  columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # (name, weight) of the rewards of its source; (): the stage's.
  rewards: tuple[tuple[str, float], ...] = ()
  # Where the paths in `images` start; what stands before may differ from
  # machine to machine.
  image_root: str = ""
  # (height, width) of each picture in pixels, upright, and in the units in
  # which the model says boxes; (): the pictures were not read yet.
  picture_sizes: tuple[tuple[int, int], ...] = ()
  box_sizes: tuple[tuple[int, int], ...] = ()
  # Of the completion that a reward is given, EOS included; None: not counted.
  completion_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """One prepared row: what the model is shown, on the host."""

  question_id: int  # uint32, its place in the stage's stream of data
  example: Example
  prompt_ids: np.ndarray  # int32 [P]
  position_ids: np.ndarray  # int32 [3 P]
  pixel_values: np.ndarray  # float32 [patches, channels * 2 * patch ** 2]
  image_grid_thw: np.ndarray  # int32 [images, 3]
  # What a frozen tower sees of them, in the order of a lane: its tokens and
  # DeepStack's K levels [1 + K, visual tokens, D], or, where the mergers are
  # trained, what they merge [1 + K, visual tokens, patches of a token, E].
  # None: it is not known yet.
  features: np.ndarray | None = None
  response_ids: np.ndarray | None = None  # int32 [C] through EOS; None: no SFT


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[T]) -> type[T]:
  """Makes a frozen, keyword-only dataclass that is a pytree of its fields."""
  made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
  names = [field.name for field in dataclasses.fields(made)]
  return jax.tree_util.register_dataclass(made, names, [])


@record
class Vision:
  """The pictures of a batch, packed in S lanes beside the questions.

  Lane s holds the pictures of the s-th of S equal slices of the questions, so
  that no gather crosses shards. Patches are in 2 x 2 merge blocks as Hugging
  Face's processor makes them, and those window by window where the tower has
  windows; padding stands at the end of a lane, with segment -1. None: the
  family's tower has no such thing.
  """

  pixel_values: Float[Array, "S L D"]
  rows: Int[Array, "S L"]  # of the patch within its picture
  cols: Int[Array, "S L"]
  full_segments: Int[Array, "S L"]  # the picture (and frame) of a patch
  window_segments: Int[Array, "S L"] | None  # its attention window
  place_index: Int[Array, "S L 4"] | None  # the nearest learned positions
  place_weight: Float[Array, "S L 4"] | None  # and how near each is

  @property
  def lanes(self) -> tuple[int, int]:
    """How many, and how many patches each has room for."""
    count, room = self.rows.shape[:2]
    return count, room


@record
class Unmerged:
  """What a vision tower's blocks see: B = merge**2 patches of each token."""

  tokens: Float[Array, "S M B E"]
  levels: Float[Array, "K S M B E"] | None  # DeepStack's; None: it has none

  @property
  def lanes(self) -> tuple[int, int]:
    """How many, and how many tokens each has room for."""
    count, room = self.tokens.shape[:2]
    return count, room


@record
class Features:
  """What a vision tower sees: the visual tokens of each lane."""

  tokens: Float[Array, "S M D"]
  levels: Float[Array, "K S M D"] | None  # DeepStack's; None: the family's none

  @property
  def lanes(self) -> tuple[int, int]:
    """How many, and how many tokens each has room for."""
    count, room = self.tokens.shape[:2]
    return count, room


@record
class Prompts:
  """Prompts in packed rows; each stands here once, whatever G is.

  Each of R data shards has the prompts of its own questions, in U rows of T
  columns that are read one after the other.
  """

  ids: Int[Array, "R U T"]
  position_ids: Int[Array, "3 R U T"]
  tree_ids: Int[Array, "R U T"]  # which prompt of its row, from 0; -1 padding
  vision_index: Int[Array, "R U T"]
  # Tokens [R U M D] and levels [K R U M D] of a row's pictures; None: all text.
  vision: Features | None
  columns: Int[Array, "Q P"]  # of U T, where a prompt's tokens stand; -1: none
  following: Int[Array, "Q 3"]  # the position after the prompt
  question_id: Int[Array, " Q"]  # uint32


@record
class Rollout:
  """G completions of each question, each from column 0 of its own buffer."""

  completion_ids: Int[Array, "Q G C"]
  completion_mask: Bool[Array, "Q G C"]  # True through EOS
  truncated: Bool[Array, "Q G"]  # ended by the length limit, without EOS
  sampler_logprobs: Float[Array, "Q G C"]  # 0 where masked


@record
class Tree:
  """Packed rows of trees [prompt | completion 1 | ... | completion G].

  Nothing is padded between completions or trees; the end of a row is. A query
  sees a key of its own tree that is not later and lies in the prompt or in its
  own branch. Positions restart after the prompt in each branch. A row has room
  for Q / R questions; a place that none takes is masked throughout.
  """

  ids: Int[Array, "R T"]
  position_ids: Int[Array, "3 R T"]
  tree_ids: Int[Array, "R T"]  # of the row, from 0; -1 padding
  branch_ids: Int[Array, "R T"]  # 0 prompt, g = 1..G completion, -1 padding
  vision_index: Int[Array, "R T"]
  # Pictures, or what a frozen tower sees of them; None: a batch of text alone.
  vision: Vision | Unmerged | Features | None
  predictors: Int[Array, "R T"]  # column whose hidden state predicts token n
  targets: Int[Array, "R T"]  # the id of token n
  counts: Int[Array, " R"]  # tokens n of the row
  slots: Int[Array, "Q G C"]  # n of completion token (g, c); -1: masked


@record
class Experience:
  """What a microbatch of an update learns from."""

  tree: Tree
  completion_mask: Bool[Array, "Q G C"]
  advantages: Float[Array, "Q G"]
  groups: Bool[Array, "Q K"]  # of questions, for which metrics are kept apart
  sampler_logprobs: Float[Array, "Q G C"]
  old_logprobs: Float[Array, "Q G C"] | None  # None: this rollout's only update
  ref_logprobs: Float[Array, "Q G C"] | None  # None: no KL term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Rewards of a rollout, on the host."""

  rewards: np.ndarray  # float64 [Q G], weighted sum of the parts
  # Each reward by name, float64 [Q G]; NaN where a row has rewards of its own.
  parts: dict[str, np.ndarray]
  failed: np.ndarray  # bool [Q]: a reward raised, hung or returned NaN
  # float64 [Q G], the first of each row's rewards; None: nothing was scored.
  accuracy: np.ndarray | None = None
  messages: tuple[str, ...] = ()  # what failed, with reward and row named
