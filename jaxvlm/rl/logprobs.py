"""Log-probabilities of tokens, without ever holding all logits."""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that 0 * logit and logit - logit stay numbers.
BANNED_LOGIT = -1e30


def banned_logits(
  logits: Float[Array, "*B V"],
  banned: Bool[Array, " V"],
  value: float = BANNED_LOGIT,
) -> Float[Array, "*B V"]:
  """Logits under which a banned id has probability exactly 0."""
  mask = banned.reshape((1,) * (logits.ndim - 1) + banned.shape)
  return jnp.where(mask, jnp.asarray(value, logits.dtype), logits)


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

  `chunk` columns of every row are done at a time, and again from the hidden
  states in the backward pass, so at most [*B, chunk, V] logits exist. Rows are
  never mixed: a batch that is sharded over rows stays so.

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
  padding = [(0, 0)] * (targets.ndim - 1) + [(0, -width % chunk)]
  hidden = jnp.pad(hidden, [*padding, (0, 0)])
  targets = jnp.pad(targets, padding)
  logprobs, entropy = _scores(
    temperature,
    entropy_gradient,
    einops.rearrange(hidden, "... (n c) d -> n ... c d", c=chunk),
    head,
    einops.rearrange(targets, "... (n c) -> n ... c", c=chunk),
    banned,
  )
  logprobs, entropy = (
    einops.rearrange(x, "n ... c -> ... (n c)")[..., :width]
    for x in (logprobs, entropy)
  )
  return logprobs, entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(
  temperature: float,
  entropy_gradient: bool,
  hidden: Float[Array, "n *B c D"],
  head: Float[Array, "D V"],
  targets: Int[Array, "n *B c"],
  banned: Bool[Array, " V"],
) -> tuple[Float[Array, "n *B c"], Float[Array, "n *B c"]]:
  """Logprobs and entropy, a chunk after the other."""
  return _forward(temperature, entropy_gradient, hidden, head, targets, banned)[
    0
  ]


def _forward(
  temperature: float,
  entropy_gradient: bool,
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  banned: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  del entropy_gradient

  def score(_: None, columns: Any) -> tuple[None, Any]:
    hidden, targets = columns
    logits = token_logits(hidden, head, temperature=temperature, banned=banned)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum where a gather would do: it stays local to each shard of V.
    chosen = jnp.sum(jnp.where(_is(targets, logits), logits, 0.0), axis=-1)
    logprobs = logits - normaliser[..., None]
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    return None, (chosen - normaliser, entropy, normaliser)

  _, found = jax.lax.scan(score, None, (hidden, targets))
  logprobs, entropy, normaliser = found
  return (logprobs, entropy), (
    *(hidden, head, targets, banned),
    *(entropy, normaliser),
  )


def _backward(
  temperature: float,
  entropy_gradient: bool,
  kept: Any,
  gradients: tuple[jax.Array, jax.Array],
) -> tuple[Any, ...]:
  """With p the softmax of logits z and H its entropy,

  d logprob / dz = onehot - p and dH / dz = -p (log p + H).
  """
  hidden, head, targets, banned, entropy, normaliser = kept

  def slope(total: jax.Array, columns: Any) -> tuple[jax.Array, jax.Array]:
    hidden, targets, entropy, normaliser, (of_logprob, of_entropy) = columns
    logits = token_logits(hidden, head, temperature=temperature, banned=banned)
    logprobs = logits - normaliser[..., None]
    pull = of_logprob[..., None]
    if entropy_gradient:
      pull += of_entropy[..., None] * (logprobs + entropy[..., None])
    found = -jnp.exp(logprobs) * pull
    found += jnp.where(_is(targets, logits), of_logprob[..., None], 0.0)
    # A banned logit is a constant, also where it is padding's target.
    found = banned_logits(found, banned, 0.0) / temperature
    found = found.astype(hidden.dtype)
    total += jnp.einsum(
      "nd,nv->dv",
      hidden.reshape(-1, hidden.shape[-1]),
      found.reshape(-1, found.shape[-1]),
      preferred_element_type=jnp.float32,
    )
    return total, jnp.einsum(
      "...v,dv->...d",
      found,
      head.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    ).astype(hidden.dtype)

  of_head, of_hidden = jax.lax.scan(
    slope,
    jnp.zeros(head.shape, jnp.float32),
    (hidden, targets, entropy, normaliser, gradients),
  )
  return of_hidden, of_head.astype(head.dtype), None, None


_scores.defvjp(_forward, _backward)


def _is(
  targets: Int[Array, "*B"], logits: Float[Array, "*B V"]
) -> Bool[Array, "*B V"]:
  ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  return ids == targets[..., None]
