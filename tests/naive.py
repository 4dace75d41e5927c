"""What an update must equal: rows packed the naive way, and the loss of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from jaxvlm.data.vision_layout import pack_vision, token_places
from jaxvlm.rl import kl, losses
from jaxvlm.rl.surrogates import SURROGATES, importance_weights
from jaxvlm.types import Experience
from tests.learners import ADAMW, OBJECTIVE

# One shape for the batches of all tests, and so one program.
ROWS, WIDTH, PATCHES = 24, 48, 96


def flat(params):
  return traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")


def assert_trees_close(found, expected, rtol):
  """Every leaf to `rtol` of its own largest entry."""
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    scale = np.abs(x).max()
    np.testing.assert_allclose(
      found[name], x, rtol=0, atol=rtol * scale, err_msg=name
    )


def gradients(state, metrics):
  """The gradient before clipping, as AdamW with b1 = 0 has seen it."""
  norm = float(metrics["grad_norm"][0])
  scale = max(1.0, norm / ADAMW.clip_norm)
  moments = optax.tree_utils.tree_get(state.opt_state["moments"], "mu")
  return {path: scale * np.asarray(mu) for path, mu in moments.items()}


@dataclasses.dataclass
class Naive:
  """G rows [prompt | completion] of each question, each with its pictures."""

  network: object
  layout: object
  banned: np.ndarray

  def __post_init__(self):
    self._run = jax.jit(self._value_and_gradient)

  def rows(self, questions, rollout):
    group, longest = rollout.completion_mask.shape[1:]
    ids = np.zeros((ROWS, WIDTH), np.int32)
    positions = np.zeros((3, ROWS, WIDTH), np.int32)
    branches = np.full((ROWS, WIDTH), -1, np.int32)
    index = np.full((ROWS, WIDTH), -1, np.int32)
    before = np.zeros((ROWS, longest), np.int32)
    for r in range(len(questions) * group):
      q, g = divmod(r, group)
      question, prompt = questions[q], len(questions[q].prompt_ids)
      own = rollout.completion_ids[q, g][rollout.completion_mask[q, g]]
      end = prompt + len(own)
      ids[r, :end] = np.concatenate([question.prompt_ids, own])
      positions[:, r, :prompt] = question.position_ids
      following = question.position_ids[:, -1:] + 1 + np.arange(len(own))
      positions[:, r, prompt:end] = following
      branches[r, :end] = 0
      shown = np.flatnonzero(question.prompt_ids == self.layout.image_token_id)
      index[r, shown] = token_places(question.image_grid_thw, self.layout)
      before[r] = np.minimum(prompt - 1 + np.arange(longest), WIDTH - 1)
    lanes = [[q] for q in questions for _ in range(group)]
    vision = pack_vision(
      lanes + [[]] * (ROWS - len(lanes)), layout=self.layout, patches=PATCHES
    )
    return ids, positions, branches, index, before, vision

  def _logprobs(self, params, rows, temperature, targets):
    ids, positions, branches, index, before, vision = rows
    features = self.network.encode(params, vision)
    embeds = self.network.embed(params, ids, index, features)
    trees = jnp.minimum(branches, 0)
    hidden = self.network.forward(params, embeds, positions, trees, branches)
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    logits = hidden @ self.network.head(params) / temperature
    logits = jnp.where(jnp.asarray(self.banned)[None, None], -1e30, logits)
    scores = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]

  def _value_and_gradient(self, params, rows, temperature, targets, weights):
    logprobs, pull = jax.vjp(
      lambda p: self._logprobs(p, rows, temperature, targets), params
    )
    return logprobs, pull(weights)[0]

  def __call__(self, params, questions, rollout, temperature, loss=None):
    """Logprobs [Q G C], and every gradient of `loss(logprobs)`, flat."""
    rows = self.rows(questions, rollout)
    ids, mask = rollout.completion_ids, rollout.completion_mask

    def padded(x):
      own = np.reshape(x, (-1, x.shape[-1]))
      return np.pad(own, ((0, ROWS - len(own)), (0, 0)))

    def run(weights):
      logprobs, grads = self._run(
        params, rows, temperature, padded(ids), padded(weights)
      )
      return logprobs.reshape(-1)[: mask.size].reshape(mask.shape), grads

    logprobs, grads = run(np.zeros(mask.shape, np.float32))
    if loss is not None:
      weights = np.where(mask, jax.jit(jax.grad(loss))(logprobs), np.float32(0))
      _, grads = run(weights)
    return np.where(mask, logprobs, 0.0), flat(grads)


@dataclasses.dataclass(frozen=True)
class Batch:
  """A rollout with made-up advantages, and old and reference logprobs."""

  advantages: np.ndarray
  old: np.ndarray | None
  ref: np.ndarray | None


def experiences(packed, rollout, batch, groups, change=lambda tree: tree):
  """The microbatches of an update from these."""
  for u in range(len(packed)):
    place = functools.partial(packed.place, u=u)
    yield Experience(
      tree=change(packed.tree(u)),
      completion_mask=place(rollout.completion_mask),
      advantages=place(batch.advantages),
      groups=place(groups),
      sampler_logprobs=place(rollout.sampler_logprobs),
      old_logprobs=place(batch.old),
      ref_logprobs=place(batch.ref),
    )


def grpo_loss(rollout, batch, **changes):
  """The loss of the whole update from logprobs."""
  objective = dataclasses.replace(OBJECTIVE, **changes)
  mask = jnp.asarray(rollout.completion_mask)

  def loss(logprobs):
    bounds = dict(objective.surrogate)
    surrogate = SURROGATES[bounds.pop("name")]
    values, _ = surrogate(logprobs, batch.old, batch.advantages, mask, **bounds)
    if objective.importance:
      weights, _ = importance_weights(
        batch.old,
        rollout.sampler_logprobs,
        mask,
        mode=objective.importance,
        cap=objective.importance_cap,
      )
      values = values * weights
    penalty, _ = kl.estimate(
      logprobs,
      batch.ref,
      mask,
      estimator=objective.kl_estimator,
      limit=objective.kl_limit,
    )
    total, count = losses.aggregate(
      values + objective.kl_coef * penalty,
      mask,
      aggregation=objective.aggregation,
      length=objective.max_completion_length,
    )
    return total / count

  return loss
