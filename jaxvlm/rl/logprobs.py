"""Log-probabilities of tokens, without ever holding all logits."""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that 0 * logit and logit - logit stay numbers.
BANNED_LOGIT = -1e30


def banned_logits(
  logits: Float[Array, "*B V"], banned: Bool[Array, " V"]
) -> Float[Array, "*B V"]:
  """Logits under which a banned id has probability exactly 0."""
  mask = banned.reshape((1,) * (logits.ndim - 1) + banned.shape)
  return jnp.where(mask, jnp.asarray(BANNED_LOGIT, logits.dtype), logits)


def token_logits(
  hidden: Float[Array, "*B D"],
  head: Float[Array, "D V"],
  *,
  temperature: float,
  banned: Bool[Array, " V"],
) -> Float[Array, "*B V"]:
  """Logits of the distribution that is sampled from and trained, float32.

  The sampler and the learner both call this: one rounding of the product,
  one temperature, one set of banned ids.
  """
  logits = jnp.einsum(
    "...d,dv->...v",
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  return banned_logits(logits / temperature, banned)


def token_logprobs(
  hidden: Float[Array, "*B N D"],
  head: Float[Array, "D V"],
  targets: Int[Array, "*B N"],
  *,
  temperature: float,
  banned: Bool[Array, " V"],
  chunk: int,
  entropy_gradient: bool,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"]]:
  """Log-probability of each target, and the entropy it was drawn with.

  `chunk` columns of every row are done at a time, each time from the hidden
  states again in the backward pass, so at most [*B, chunk, V] logits exist.
  Rows are never mixed: a batch that is sharded over rows stays so.

  Args:
    hidden: final hidden states, column n of which predicts targets[..., n].
    head: output matrix.
    targets: ids; those of padding may be anything in [0, V).
    temperature: divides the logits, as it did when sampling.
    banned: ids that cannot be sampled.
    chunk: columns at a time.
    entropy_gradient: whether the entropy has one too, which costs memory and
      time where it is only watched.

  Returns:
    float32 logprobs, with gradients to hidden and head, and float32 entropy
    in nats.
  """
  width = targets.shape[-1]
  chunk = min(chunk, width)
  padding = -width % chunk
  rows = [(0, 0)] * (targets.ndim - 1)
  hidden = jnp.pad(hidden, [*rows, (0, padding), (0, 0)])
  targets = jnp.pad(targets, [*rows, (0, padding)])

  @jax.checkpoint
  def one_chunk(hidden, targets):
    logits = token_logits(hidden, head, temperature=temperature, banned=banned)
    return _score(logits, targets, entropy_gradient)

  _, scores = jax.lax.scan(
    lambda _, columns: (None, one_chunk(*columns)),
    None,
    (
      einops.rearrange(hidden, "... (n c) d -> n ... c d", c=chunk),
      einops.rearrange(targets, "... (n c) -> n ... c", c=chunk),
    ),
  )
  logprobs, entropy = (
    einops.rearrange(x, "n ... c -> ... (n c)")[..., :width] for x in scores
  )
  return logprobs, entropy


def _score(
  logits: Float[Array, "*B V"],
  targets: Int[Array, "*B"],
  entropy_gradient: bool,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
  normaliser = jax.nn.logsumexp(logits, axis=-1)
  # A masked sum where a gather would do: it stays local to each shard of V.
  ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  chosen = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
  watched = logits if entropy_gradient else jax.lax.stop_gradient(logits)
  shares = jax.nn.softmax(watched, axis=-1)
  expected = jnp.sum(shares * watched, axis=-1)
  entropy = jax.nn.logsumexp(watched, axis=-1) - expected
  return chosen - normaliser, entropy
