"""One token from logits: filters, and draws that are a pure function."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxvlm.rl.logprobs import BANNED_LOGIT

_BLOCKS = 128  # of the vocabulary


def draw_keys(
  key: Key[Array, ""], question_id: Int[Array, " Q"], num_completions: int
) -> Key[Array, "Q G"]:
  """A key for each completion, whatever its row in the batch or its device."""

  def question(identity: Array) -> Array:
    own = jax.random.fold_in(key, identity)
    return jax.vmap(lambda g: jax.random.fold_in(own, g))(
      jnp.arange(num_completions)
    )

  return jax.vmap(question)(question_id)


def keep_top_k(logits: Float[Array, "... V"], k: int) -> Float[Array, "... V"]:
  """Masks all but the k largest logits (ties of the k-th stay)."""
  smallest = jax.lax.top_k(logits, k)[0][..., -1:]
  return jnp.where(logits < smallest, BANNED_LOGIT, logits)


def keep_top_p(
  logits: Float[Array, "... V"], p: float
) -> Float[Array, "... V"]:
  """Masks the tail outside the smallest set whose probability reaches p.

  The token that crosses p stays, as in Hugging Face's TopPLogitsWarper.
  """
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  smallest = jnp.min(
    jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True
  )
  return jnp.where(logits < smallest, BANNED_LOGIT, logits)


def draw(
  logits: Float[Array, "Q G V"],
  keys: Key[Array, "Q G"],
  column: Int[Array, " Q"],
  *,
  greedy: bool,
  top_k: int,
  top_p: float,
) -> tuple[Int[Array, "Q G"], Float[Array, "Q G"]]:
  """Draws one token a row.

  Args:
    logits: float32, of `rl.logprobs.token_logits`: temperature divided,
      banned tokens masked.
    keys: of `draw_keys`; `column` is folded in here.
    column: position within the completions.
    greedy: takes the largest logit instead.
    top_k: keeps the k largest; 0 keeps all.
    top_p: keeps the nucleus; 1 keeps all.

  Returns:
    Ids, and their logprobs before top_k and top_p: those of the distribution
    that the update trains.
  """
  largest = logits.max(-1, keepdims=True)
  normaliser = largest[..., 0] + jnp.log(jnp.exp(logits - largest).sum(-1))
  if greedy:
    ids = _first(logits == largest)
  else:
    kept = logits
    if top_k:
      kept = keep_top_k(kept, top_k)
    if top_p < 1:
      kept = keep_top_p(kept, top_p)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))
    ids = _invert(jnp.exp(kept - largest), uniform(fold(keys, column)))
  chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
  return ids, chosen - normaliser


def _invert(
  weights: Float[Array, "Q G V"], uniform: Float[Array, "Q G 2"]
) -> Int[Array, "Q G"]:
  """Inverts the cumulative distribution: of blocks of ids, then within one.

  Two numbers a row instead of V, and sums of few terms at a time.
  """
  size = weights.shape[-1]
  blocks = weights.reshape(*weights.shape[:-1], math.gcd(size, _BLOCKS), -1)
  block = _reach(blocks.sum(-1), uniform[..., 0])
  own = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)
  place = _reach(own[..., 0, :], uniform[..., 1])
  return block * blocks.shape[-1] + place


def _reach(
  weights: Float[Array, "*B V"], share: Float[Array, "*B"]
) -> Int[Array, "*B"]:
  """Where the sum of the weights first exceeds a share, below 1, of the whole.

  Never where a weight is 0, however the sums are rounded.
  """
  reached = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
  return _first(reached > (share * reached.max(-1))[..., None])


def _first(true: Bool[Array, "*B V"]) -> Int[Array, "*B"]:
  """The first index that holds; the last one where none does (NaN)."""
  # A CPU takes ten times as long for argmax.
  size = true.shape[-1]
  places = jax.lax.broadcasted_iota(jnp.int32, true.shape, true.ndim - 1)
  return jnp.where(true, places, size - 1).min(-1)
