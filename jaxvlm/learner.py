"""Train state, the update over microbatches, and logprobs of a tree."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxvlm import compiling, sharding
from jaxvlm.models import Network
from jaxvlm.packing import Packed
from jaxvlm.rl import kl, losses, surrogates
from jaxvlm.rl.logprobs import token_logprobs
from jaxvlm.types import Experience, Params, Tree, record

Flat = dict[str, Array]  # parameters by "/"-joined path
Metrics = dict[str, losses.Pair]


@record
class TrainState:
  """What an update changes."""

  params: Params
  opt_state: Any  # over the trainable parameters alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """An optax chain by name; the learning rate is an argument of the update."""

  name: Literal["adamw", "muon"]
  b1: float
  b2: float
  weight_decay: float
  clip_norm: float
  # Whether a bfloat16 weight, which does not hear of a change of less than 1/512
  # of it, keeps the 16 bits that it lacks of a float32 beside the moments. (Kahan's
  # sum keeps a bfloat16 there, which in turn does not hear of 1e-6.)
  compensated: bool

  def make(self, axes: dict[str, tuple[str | None, ...]]) -> Any:
    """The transformation at learning rate 1, over flat parameters.

    Muon (Jordan et al. 2024) takes every matrix between features, with AdamW
    for embeddings, biases and norms. `axes` names each parameter's logical
    axes, by which a matrix is known.
    """
    clip = optax.clip_by_global_norm(self.clip_norm)
    if self.name == "adamw":
      return optax.chain(
        clip,
        optax.adamw(
          1.0, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay
        ),
      )
    if self.name == "muon":
      return optax.chain(
        clip,
        optax.contrib.muon(
          1.0,
          adam_b1=self.b1,
          adam_b2=self.b2,
          weight_decay=self.weight_decay,
          adam_weight_decay=self.weight_decay,
          muon_weight_dimension_numbers={
            path: _matrix(names) for path, names in axes.items()
          },
        ),
      )
    raise ValueError(f"optimizer: got {self.name!r}; there are adamw, muon.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """What is minimised; a stage's knobs that are compiled into the update."""

  kind: Literal["grpo", "sft"]
  temperature: float
  surrogate: tuple[tuple[str, Any], ...]  # items of the config: name, bounds
  aggregation: str
  max_completion_length: int
  kl_coef: float  # 0 also where the KL term is in the reward
  kl_estimator: str
  kl_limit: float
  entropy_coef: float
  importance: str | None  # mode of rl.surrogates.importance_weights
  importance_cap: float
  logprob_chunk: int


@dataclasses.dataclass(frozen=True)
class Program:
  """All that is static in an update; equal programs compile once."""

  network: Network
  mesh: Mesh
  frozen: tuple[str, ...]
  optimizer: Optimizer
  objective: Objective

  def trainable(self, params: Params) -> tuple[Flat, Flat]:
    """(trainable, frozen) parameters by path."""
    flat = traverse_util.flatten_dict(params)
    halves: tuple[Flat, Flat] = ({}, {})
    for path, value in flat.items():
      halves[self.network.part_of(path) in self.frozen]["/".join(path)] = value
    return halves

  def by_part(self, flat: Flat) -> dict[str, Flat]:
    """The entries of each part of the network: vision_tower, merger, decoder."""
    parts: dict[str, Flat] = {}
    for path, value in flat.items():
      part = self.network.part_of(tuple(path.split("/")))
      parts.setdefault(part, {})[path] = value
    return parts

  @functools.cached_property
  def axes(self) -> Any:
    """Logical axes of the trainable parameters by path."""
    return self.trainable(self.network.axes())[0]

  def laid(self, flat: Flat) -> Flat:
    """Gradients that lie on the mesh, also one of one device, as parameters do."""
    return {
      path: jax.lax.with_sharding_constraint(
        x, sharding.sharding(self.mesh, self.axes[path], x.shape)
      )
      for path, x in flat.items()
    }

  def transformation(self) -> Any:
    return self.optimizer.make(self.axes)

  def init(self, trainable: Flat) -> dict[str, Any]:
    """The optimizer's state: float32 moments, and the weights' lower bits."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    lower = None
    if self.optimizer.compensated:
      lower = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.int16), trainable)
    return {"moments": self.transformation().init(exact), "lower": lower}


def _matrix(axes: tuple[str | None, ...]) -> Any:
  """Muon's view of a weight [in, out], [in, N, H] or [N, H, in]; else None.

  Layers, and q, k and v where one weight holds them, are matrices of their own.
  """
  if {"vocab", "place"} & set(axes):
    return None  # tables
  head = [i for i, a in enumerate(axes) if str(a).endswith("heads")]
  groups = [
    (i, i + 1) if i in head else (i,)
    for i, a in enumerate(axes)
    if a not in ("layer", None) and i - 1 not in head
  ]
  if len(groups) != 2:
    return None
  return optax.contrib.MuonDimensionNumbers(
    reduction_axis=groups[0], output_axis=groups[1]
  )


def join(*parts: Flat) -> Params:
  """Nested parameters of flat parts."""
  flat = {path: value for part in parts for path, value in part.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


class Learner:
  """One stage's update.

  Learners that differ in nothing static share their compiled programs.
  """

  def __init__(
    self,
    *,
    network: Network,
    mesh: Mesh,
    banned: np.ndarray,
    frozen: tuple[str, ...],
    optimizer: Optimizer,
    objective: Objective,
  ):
    known = {"vision_tower", "merger", "decoder"}
    if set(frozen) - known or set(frozen) == known:
      raise ValueError(
        f"freeze: got {frozen}; name some of {sorted(known)}, not all."
      )
    self.program = Program(network, mesh, frozen, optimizer, objective)
    self._banned = jnp.asarray(banned)

  def init(self, params: Params) -> TrainState:
    """A state with a fresh optimizer, whose moments lie as the parameters."""
    trainable, _ = self.program.trainable(params)
    opt_state = self.make_opt_state(params)(trainable)
    return TrainState(params=params, opt_state=opt_state)

  def make_opt_state(self, params: Params) -> Any:
    """The jitted maker of what `init` puts beside such parameters."""
    places = jax.tree.map(lambda x: x.sharding, self.abstract(params).opt_state)
    return jax.jit(self.program.init, out_shardings=places)

  def abstract(self, params: Params) -> TrainState:
    """Shapes, dtypes and shardings of `init(params)`."""
    trainable, _ = self.program.trainable(params)
    everywhere = NamedSharding(self.program.mesh, PartitionSpec())

    def place(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
      """A moment is a leaf under its parameter's path, of the same shape."""
      for key in path:
        parameter = trainable.get(getattr(key, "key", ""))
        if parameter is not None and parameter.shape == x.shape:
          return _abstract(x, parameter.sharding)
      return _abstract(x, everywhere)

    return TrainState(
      params=jax.tree.map(lambda x: _abstract(x, x.sharding), params),
      opt_state=jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(self.program.init, trainable)
      ),
    )

  def update(
    self,
    state: TrainState,
    microbatches: Iterable[Experience],
    learning_rate: float,
  ) -> tuple[TrainState, Metrics]:
    """One optimizer step; gradients of microbatches are summed in float32.

    Args:
      state: donated.
      microbatches: global arrays; the next one is asked for while the device
        works at the one before.
      learning_rate: of this update.

    Returns:
      The new state, and metrics as (sum, count), [K] each where they are
      counted for each group of questions. Where the gradient is not finite the
      state stays and update_skipped is 1.
    """
    program, found = self.program, []
    with sharding.use(program.mesh):
      total = zeros(program, state.params)
      for micro in microbatches:
        with _compiles("gradient", micro.tree):
          total, metrics = add_gradient(
            program, total, state.params, self._banned, micro
          )
        found.append(metrics)
        _wait(found)
      summed = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *found)
      rate = jnp.float32(learning_rate)
      state, norms = apply(program, state, total, summed["loss"][1], rate)
    return state, summed | norms

  def logprobs(
    self, policies: Sequence[Params], packed: Packed
  ) -> list[Float[np.ndarray, "Q G C"]]:
    """Logprobs of all completion tokens by each policy; 0 where masked."""
    found: list[list[Any]] = [[] for _ in policies]
    with sharding.use(self.program.mesh):
      for u in range(len(packed)):
        tree = packed.tree(u)
        for params, parts in zip(policies, found, strict=True):
          with _compiles("logprobs", tree):
            parts.append(logprobs(self.program, params, self._banned, tree))
          _wait(parts)
    return [packed.collect(parts) for parts in found]


def _wait(found: Sequence[Any]) -> None:
  """Lets the host be one microbatch ahead, for its arrays take memory."""
  jax.block_until_ready(found[-2:-1])


def _compiles(name: str, tree: Tree) -> contextlib.AbstractContextManager[None]:
  rows, columns = tree.ids.shape
  lane = 0 if tree.vision is None else tree.vision.lanes[1]
  return compiling.program(
    name,
    rows=rows,
    columns=columns,
    questions=len(tree.slots),
    lane=lane,
  )


def _abstract(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _score(
  program: Program, params: Params, banned: Bool[Array, " V"], tree: Tree
) -> tuple[Float[Array, "Q G C"], Float[Array, "Q G C"]]:
  """Logprob and entropy of every completion token, 0 where masked."""
  network, objective = program.network, program.objective
  features = None
  if tree.vision is not None:
    features = network.encode(params, tree.vision)
  embeds = network.embed(params, tree.ids, tree.vision_index, features)
  hidden = network.forward(
    params, embeds, tree.position_ids, tree.tree_ids, tree.branch_ids
  )
  scores = token_logprobs(
    hidden,
    network.head(params),
    tree.predictors,
    tree.targets,
    counts=tree.counts,
    temperature=objective.temperature,
    banned=banned,
    chunk=objective.logprob_chunk,
    entropy_gradient=objective.entropy_coef != 0,
  )
  return tuple(_unpack(x, tree.slots) for x in scores)  # type: ignore


def _unpack(
  values: Float[Array, "R T"], slots: Int[Array, "Q G C"]
) -> Float[Array, "Q G C"]:
  flat = slots.reshape(len(values), -1)
  taken = jnp.take_along_axis(values, jnp.maximum(flat, 0), axis=1)
  return jnp.where(flat >= 0, taken, 0.0).reshape(slots.shape)


@functools.partial(jax.jit, static_argnums=0)
def logprobs(
  program: Program, params: Params, banned: Bool[Array, " V"], tree: Tree
) -> Float[Array, "Q G C"]:
  return sharding.pin(_score(program, params, banned, tree)[0])


def _loss(
  program: Program,
  trainable: Flat,
  frozen: Flat,
  banned: Bool[Array, " V"],
  micro: Experience,
) -> tuple[Float[Array, ""], Metrics]:
  """A sum (the update divides it by its count), and metrics."""
  objective, mask = program.objective, micro.completion_mask
  logprobs, entropy = _score(
    program, join(trainable, frozen), banned, micro.tree
  )
  figures = {"entropy": jax.lax.stop_gradient(entropy)}
  if objective.kind == "sft":
    loss = -logprobs
  else:
    loss, found = _policy_loss(objective, logprobs, micro)
    figures |= found
    if objective.entropy_coef:
      loss = loss - objective.entropy_coef * entropy
  total, count = losses.aggregate(
    loss,
    mask,
    aggregation=objective.aggregation,
    length=objective.max_completion_length,
  )
  metrics = {
    name: losses.by_group(values, mask, micro.groups)
    for name, values in figures.items()
  }
  return total, metrics | {"loss": (jax.lax.stop_gradient(total), count)}


def _policy_loss(
  objective: Objective, logprobs: Float[Array, "Q G C"], micro: Experience
) -> tuple[Float[Array, "Q G C"], surrogates.Figures]:
  """Surrogate and KL term of each token, and figures to watch."""
  mask = micro.completion_mask
  old = logprobs if micro.old_logprobs is None else micro.old_logprobs
  bounds = dict(objective.surrogate)
  surrogate = surrogates.SURROGATES[bounds.pop("name")]
  loss, figures = surrogate(logprobs, old, micro.advantages, mask, **bounds)
  gap = jax.lax.stop_gradient(old) - micro.sampler_logprobs
  figures["sampler_gap"] = jnp.abs(gap)
  if objective.importance is not None:
    weights, found = surrogates.importance_weights(
      old,
      micro.sampler_logprobs,
      mask,
      mode=objective.importance,
      cap=objective.importance_cap,
    )
    loss, figures = loss * weights, figures | found
  if micro.ref_logprobs is not None:
    penalty, found = kl.estimate(
      logprobs,
      micro.ref_logprobs,
      mask,
      estimator=objective.kl_estimator,
      limit=objective.kl_limit,
    )
    loss, figures = loss + objective.kl_coef * penalty, figures | found
  return loss, figures


@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def zeros(program: Program, params: Params) -> Flat:
  """A gradient to add to.

  It lies as one that was added to does, or `add_gradient` would be compiled for
  both. Where jit drops the parameters, whose values are not used, it does not.
  """
  trainable, _ = program.trainable(params)
  return program.laid(
    jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), trainable)
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def add_gradient(
  program: Program,
  total: Flat,
  params: Params,
  banned: Bool[Array, " V"],
  micro: Experience,
) -> tuple[Flat, Metrics]:
  """The gradient of a microbatch's sum of losses added, and its metrics."""
  trainable, frozen = program.trainable(params)
  gradient = jax.grad(
    functools.partial(_loss, program), argnums=0, has_aux=True
  )
  part, metrics = gradient(trainable, frozen, banned, micro)
  added = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, part)
  return program.laid(added), metrics


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def apply(
  program: Program,
  state: TrainState,
  total: Flat,
  count: Float[Array, ""],
  learning_rate: Float[Array, ""],
) -> tuple[TrainState, Metrics]:
  """The optimizer's step with the mean gradient, and its norms."""
  trainable, frozen = program.trainable(state.params)
  grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), total)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(norm)

  lower = state.opt_state["lower"]
  exact = trainable
  if lower is not None:
    exact = jax.tree.map(_join, trainable, lower)
  step, moments = program.transformation().update(
    grads, state.opt_state["moments"], exact
  )
  moved = jax.tree.map(lambda p, s: p + learning_rate * s, exact, step)
  if lower is None:
    moved = jax.tree.map(lambda x, p: x.astype(p.dtype), moved, trainable)
  else:
    parts = jax.tree.map(_split, moved)
    moved, lower = (
      {path: pair[i] for path, pair in parts.items()} for i in range(2)
    )
  keep = functools.partial(
    jax.tree.map, lambda new, old: jnp.where(finite, new, old)
  )
  one = jnp.float32(1.0)
  return TrainState(
    params=join(keep(moved, trainable), frozen),
    opt_state=keep({"moments": moments, "lower": lower}, state.opt_state),
  ), {
    "grad_norm": (norm, one),
    **{
      f"grad_norm/{part}": (optax.tree.norm(own), one)
      for part, own in program.by_part(grads).items()
    },
    "update_skipped": (jnp.where(finite, 0.0, one), one),
  }


def _join(high: jax.Array, low: jax.Array) -> Float[Array, "*B"]:
  """The float32 whose upper bits are a bfloat16 and lower ones an int16."""
  upper = jax.lax.bitcast_convert_type(high, jnp.uint16).astype(jnp.uint32)
  lower = jax.lax.bitcast_convert_type(low.astype(jnp.int32), jnp.uint32)
  return jax.lax.bitcast_convert_type((upper << 16) + lower, jnp.float32)


def _split(exact: Float[Array, "*B"]) -> tuple[jax.Array, jax.Array]:
  """The nearest bfloat16 (ties away from 0), and what `_join` adds to it."""
  bits = jax.lax.bitcast_convert_type(exact, jnp.uint32)
  upper = (bits + jnp.uint32(0x8000)) >> 16
  lower = jax.lax.bitcast_convert_type(bits - (upper << 16), jnp.int32)
  high = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
  return high, lower.astype(jnp.int16)
