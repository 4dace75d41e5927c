"""One token from logits: filters, and draws that are a pure function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxvlm.rl.logprobs import BANNED_LOGIT


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
  column: Int[Array, ""],
  *,
  greedy: bool,
  top_k: int,
  top_p: float,
) -> tuple[Int[Array, "Q G"], Float[Array, "Q G"]]:
  """Draws one token a row, by the Gumbel maximum.

  Args:
    logits: float32, of `rl.logprobs.token_logits`: temperature divided,
      banned tokens masked.
    keys: of `draw_keys`; `column` is folded in here.
    column: position within the completion.
    greedy: takes the largest logit instead.
    top_k: keeps the k largest; 0 keeps all.
    top_p: keeps the nucleus; 1 keeps all.

  Returns:
    Ids, and their logprobs before top_k and top_p: those of the distribution
    that the update trains.
  """
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  if not greedy:
    if top_k:
      logits = keep_top_k(logits, top_k)
    if top_p < 1:
      logits = keep_top_p(logits, top_p)
    flat = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), column)
    noise = jax.vmap(
      lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32)
    )(flat)
    logits = logits + noise.reshape(logits.shape)
  ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  chosen = jnp.take_along_axis(logprobs, ids[..., None], axis=-1)[..., 0]
  return ids, chosen
