"""The sampler: prompts once per question, then a while_loop over columns."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxvlm import sharding
from jaxvlm.data.vision_layout import Layout, collate, needed
from jaxvlm.models import Network
from jaxvlm.rl.logprobs import token_logits
from jaxvlm.rollout.sampling import draw, draw_keys
from jaxvlm.types import Params, Prompts, Question, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
  """How completions are drawn; one compiled program for each value."""

  num_completions: int
  max_completion_length: int
  temperature: float  # 0: the most likely token
  top_k: int  # 0: all
  top_p: float  # 1: all


class Sampler:
  """Samples groups of completions from the trainer's own weights."""

  def __init__(
    self,
    *,
    network: Network,
    mesh: Mesh,
    eos_ids: tuple[int, ...],
    pad_id: int,
    banned: np.ndarray,
    layout: Layout,
  ):
    self._layout = layout
    self._network = network
    self._mesh = mesh
    self._eos_ids = eos_ids
    self._pad_id = pad_id
    self._banned = jnp.asarray(banned)

  def weights(self, params: Params) -> Params:
    """The policy's weights as decoding reads them: cast, gathered over fsdp.

    Where they already lie so (one fsdp shard, same dtype) nothing is copied.
    """
    network = self._network
    if self._mesh.shape["fsdp"] == 1 and network.param_dtype == network.dtype:
      return params
    return _gather(network, self._mesh, params)

  def sample(
    self,
    weights: Params,
    questions: Sequence[Question],
    *,
    key: Key[Array, ""],
    draws: Draws,
    limits: Int[np.ndarray, "Q G"] | None = None,
  ) -> Rollout:
    """G completions of each question of this host, as host arrays.

    Args:
      weights: of `weights`.
      questions: Q / hosts of them, a multiple of this host's data shards.
      key: of this seed, stage and step; question, completion and position are
        folded in, so that the batch's layout does not matter.
      draws: see there.
      limits: tokens that each completion may have at most, from 1; None: what
        draws says, for all.
    """
    return self.start(weights, questions, key=key, draws=draws, limits=limits)()

  def start(
    self,
    weights: Params,
    questions: Sequence[Question],
    *,
    key: Key[Array, ""],
    draws: Draws,
    limits: Int[np.ndarray, "Q G"] | None = None,
  ) -> Callable[[], Rollout]:
    """`sample`, not waited for: the host is free while the device works.

    Returns:
      What waits for the completions and gives them.
    """
    lanes = len(questions)
    prompt_length, patches = sharding.agree_max(
      needed(questions, lanes=lanes, layout=self._layout)
    )
    prompts = collate(
      questions,
      lanes=lanes,
      layout=self._layout,
      prompt_length=int(prompt_length),
      patches=int(patches),
    )
    with sharding.use(self._mesh):
      rollout = _sample(
        self._network,
        draws,
        self._eos_ids,
        self._pad_id,
        weights,
        self._banned,
        sharding.place(self._mesh, prompts),
        None if limits is None else sharding.place(self._mesh, limits),
        key,
      )
    return lambda: jax.tree.map(sharding.to_host, rollout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gather(network: Network, mesh: Mesh, params: Params) -> Params:
  def place(x: Array, axes: tuple[str | None, ...]) -> Array:
    local = tuple(
      None if sharding.RULES.get(a or "") == "fsdp" else a for a in axes
    )
    placed = sharding.sharding(mesh, local, x.shape)
    return jax.lax.with_sharding_constraint(x.astype(network.dtype), placed)

  return jax.tree.map(place, params, network.axes())


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(
  network: Network,
  draws: Draws,
  eos_ids: tuple[int, ...],
  pad_id: int,
  weights: Params,
  banned: Bool[Array, " V"],
  prompts: Prompts,
  limits: Int[Array, "Q G"] | None,
  key: Key[Array, ""],
) -> Rollout:
  questions = prompts.prompt_ids.shape[0]
  group, longest = draws.num_completions, draws.max_completion_length
  rows = (questions, group)
  keys = draw_keys(key, prompts.question_id, group)
  head = network.head(weights)

  def choose(
    hidden: Float[Array, "Q G D"], column: Int[Array, ""]
  ) -> tuple[Array, Array]:
    logits = token_logits(
      hidden, head, temperature=draws.temperature or 1.0, banned=banned
    )
    return draw(
      logits,
      keys,
      column,
      greedy=draws.temperature == 0,
      top_k=draws.top_k,
      top_p=draws.top_p,
    )

  def write(
    state: dict[str, Any], ids: Array, logprobs: Array
  ) -> dict[str, Any]:
    """Puts the tokens of column `state["column"]`; ended rows get padding."""
    at = (0, 0, state["column"])
    live = ~state["ended"]

    def put(buffer: Array, value: Array) -> Array:
      column = value[..., None].astype(buffer.dtype)
      return jax.lax.dynamic_update_slice(buffer, column, at)

    said_all = live & jnp.isin(ids, jnp.asarray(eos_ids, jnp.int32))
    ended = state["ended"] | said_all
    if limits is not None:
      ended |= state["column"] + 1 >= limits
    return state | {
      "ids": put(state["ids"], jnp.where(live, ids, pad_id)),
      "mask": put(state["mask"], live),
      "logprobs": put(state["logprobs"], jnp.where(live, logprobs, 0.0)),
      "ended": ended,
      "truncated": state["truncated"] & ~said_all,
      "last": ids,
      "column": state["column"] + 1,
    }

  features = (
    None if prompts.vision is None else network.encode(weights, prompts.vision)
  )
  embeds = network.embed(
    weights, prompts.prompt_ids, prompts.vision_index, features
  )
  hidden, prompt_cache = network.prefill(
    weights, embeds, prompts.position_ids, prompts.prompt_mask
  )
  last = prompts.prompt_mask.sum(-1) - 1
  following = (
    jnp.take_along_axis(prompts.position_ids, last[None, :, None], axis=2) + 1
  )  # [3 Q 1]
  decode_weights = network.unstack(weights)

  def step(state: dict[str, Any]) -> dict[str, Any]:
    column = state["column"] - 1  # of the token that is fed
    hidden, cache = network.decode(
      decode_weights,
      state["last"],
      jnp.broadcast_to(following + column, (3, *rows)),
      prompt_cache,
      prompts.prompt_mask,
      state["cache"],
      column,
    )
    ids, logprobs = choose(hidden, state["column"])
    return write(state | {"cache": cache}, ids, logprobs)

  state = {
    "ids": jnp.full((*rows, longest), pad_id, jnp.int32),
    "mask": jnp.zeros((*rows, longest), bool),
    "logprobs": jnp.zeros((*rows, longest), jnp.float32),
    "ended": jnp.zeros(rows, bool),
    "truncated": jnp.ones(rows, bool),
    "last": jnp.zeros(rows, jnp.int32),
    "column": jnp.int32(0),
    "cache": network.init_cache(questions, group, longest),
  }
  first = jnp.broadcast_to(hidden[:, None], (*rows, hidden.shape[-1]))
  state = write(state, *choose(first, state["column"]))
  state = jax.lax.while_loop(
    lambda s: (s["column"] < longest) & ~jnp.all(s["ended"]), step, state
  )
  return Rollout(
    completion_ids=state["ids"],
    completion_mask=state["mask"],
    truncated=state["truncated"],
    sampler_logprobs=state["logprobs"],
  )
