"""Log-probabilities of tokens, without ever holding all logits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxvlm.sharding import constrain, data_shards, mesh_in_use

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
  hidden: Float[Array, "*B T D"],
  head: Float[Array, "D V"],
  predictors: Int[Array, "*B N"],
  targets: Int[Array, "*B N"],
  *,
  counts: Int[Array, "*B"],
  temperature: float,
  banned: Bool[Array, " V"],
  chunk: int,
  entropy_gradient: bool,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"]]:
  """Log-probability of each target, and the entropy it was drawn with.

  `chunk` targets of every row are done at a time, and again from the hidden
  states in the backward pass, so at most [*B, chunk, V] logits exist; chunks
  past the row with most targets cost nothing. Rows are never mixed: a batch
  that is sharded over rows stays so.

  Args:
    hidden: final hidden states.
    head: output matrix.
    predictors: columns of `hidden` that predict the targets.
    targets: ids; those of padding may be anything in [0, V).
    counts: how many targets each row has, its first ones; the others may get
      any score, without a gradient.
    temperature: divides the logits, as it did when sampling.
    banned: ids that cannot be sampled.
    chunk: targets at a time.
    entropy_gradient: whether the entropy has one too, which costs memory and
      time where it is only watched.

  Returns:
    float32 logprobs, with gradients to hidden and head, and float32 entropy
    in nats.
  """
  width = targets.shape[-1]
  chunk = min(chunk, width)
  padding = [(0, 0)] * (targets.ndim - 1) + [(0, -width % chunk)]
  predictors, targets = (jnp.pad(x, padding) for x in (predictors, targets))
  scores = _scores(
    _Static(temperature=temperature, chunk=chunk, learned=entropy_gradient),
    hidden,
    head,
    predictors,
    targets,
    -(-jnp.max(counts) // chunk),
    banned,
  )
  logprobs, entropy = (x[..., :width] for x in scores)
  return logprobs, entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
  temperature: float
  chunk: int
  learned: bool  # whether the entropy has a gradient

  def take(self, x: jax.Array, i: jax.Array) -> jax.Array:
    """The i-th chunk of columns."""
    return jax.lax.dynamic_slice_in_dim(
      x, i * self.chunk, self.chunk, axis=x.ndim - 1
    )

  def put(self, x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
      x, part, i * self.chunk, axis=x.ndim - 1
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
  static: _Static,
  hidden: Float[Array, "*B T D"],
  head: Float[Array, "D V"],
  predictors: Int[Array, "*B N"],
  targets: Int[Array, "*B N"],
  chunks: Int[Array, ""],
  banned: Bool[Array, " V"],
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"]]:
  """Logprobs and entropy, a chunk after the other."""
  return _forward(static, hidden, head, predictors, targets, chunks, banned)[0]


def _forward(
  static: _Static,
  hidden: jax.Array,
  head: jax.Array,
  predictors: jax.Array,
  targets: jax.Array,
  chunks: jax.Array,
  banned: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  head_at_hand = _gathered(head, hidden)

  def score(i: jax.Array, found: Any) -> Any:
    logits = token_logits(
      _columns(hidden, static.take(predictors, i)),
      head_at_hand,
      temperature=static.temperature,
      banned=banned,
    )
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum where a gather would do: it stays local to each shard of V.
    chosen = _is(static.take(targets, i), logits)
    chosen = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    logprobs = logits - normaliser[..., None]
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    parts = (chosen - normaliser, entropy, normaliser)
    return tuple(
      static.put(x, part, i) for x, part in zip(found, parts, strict=True)
    )

  zeros = jnp.zeros(targets.shape, jnp.float32)
  logprobs, entropy, normaliser = jax.lax.fori_loop(
    0, chunks, score, (zeros, zeros, zeros)
  )
  return (logprobs, entropy), (
    *(hidden, head, predictors, targets, chunks, banned),
    *(entropy, normaliser),
  )


def _backward(
  static: _Static, kept: Any, gradients: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
  """With p the softmax of logits z and H its entropy,

  d logprob / dz = onehot - p and dH / dz = -p (log p + H).
  """
  hidden, head, predictors, targets, chunks, banned, entropy, normaliser = kept
  temperature = static.temperature
  head_at_hand = _gathered(head, hidden)
  shards = _shards(hidden)

  def slope(i: jax.Array, totals: Any) -> Any:
    of_hidden, of_head = totals
    own, entropies, tops, of_logprob, of_entropy = (
      static.take(x, i)[..., None]
      for x in (targets, entropy, normaliser, *gradients)
    )
    columns = static.take(predictors, i)
    states = _columns(hidden, columns)
    logits = token_logits(
      states, head_at_hand, temperature=temperature, banned=banned
    )
    logprobs = logits - tops
    pull = of_logprob
    if static.learned:
      pull = pull + of_entropy * (logprobs + entropies)
    found = -jnp.exp(logprobs) * pull
    found += jnp.where(_is(own[..., 0], logits), of_logprob, 0.0)
    # A banned logit is a constant, also where it is padding's target.
    found = banned_logits(found, banned, 0.0) / temperature
    found = found.astype(hidden.dtype)
    of_head += jnp.einsum(
      "snd,snv->sdv",
      states.reshape(shards, -1, states.shape[-1]),
      found.reshape(shards, -1, found.shape[-1]),
      preferred_element_type=jnp.float32,
    )
    of_head = constrain(of_head, "question", None, "vocab")
    pulled = jnp.einsum(
      "...v,dv->...d",
      found,
      head_at_hand,
      preferred_element_type=jnp.float32,
    )
    return _add_columns(of_hidden, columns, pulled), of_head

  of_hidden, of_head = jax.lax.fori_loop(
    0,
    chunks,
    slope,
    (
      jnp.zeros(hidden.shape, jnp.float32),
      # Each data shard sums its own; they are added once, at the end.
      jnp.zeros((shards, *head.shape), jnp.float32),
    ),
  )
  of_head = constrain(of_head.sum(0), "embed", "vocab")
  return (
    *(of_hidden.astype(hidden.dtype), of_head.astype(head.dtype)),
    *(None, None, None, None),
  )


_scores.defvjp(_forward, _backward)


def _gathered(
  head: Float[Array, "D V"], hidden: Float[Array, "*B T D"]
) -> Float[Array, "D V"]:
  """The head as products with the hidden states read it, in every chunk."""
  return constrain(head.astype(hidden.dtype), None, "vocab")


def _shards(hidden: Float[Array, "*B T D"]) -> int:
  """Equal parts of the rows that lie on data shards of their own."""
  mesh = mesh_in_use()
  shards = data_shards(mesh) if mesh is not None else 1
  return shards if hidden.ndim > 2 and hidden.shape[0] % shards == 0 else 1


def _columns(
  hidden: Float[Array, "*B T D"], columns: Int[Array, "*B c"]
) -> Float[Array, "*B c D"]:
  return jnp.take_along_axis(hidden, columns[..., None], axis=-2)


def _add_columns(
  total: Float[Array, "*B T D"],
  columns: Int[Array, "*B c"],
  parts: Float[Array, "*B c D"],
) -> Float[Array, "*B T D"]:
  """Adds to these columns, as often as each is named."""

  def row(total: jax.Array, columns: jax.Array, parts: jax.Array) -> jax.Array:
    return total.at[columns].add(parts)

  for _ in range(columns.ndim - 1):
    row = jax.vmap(row)
  return row(total, columns, parts)


def _is(
  targets: Int[Array, "*B"], logits: Float[Array, "*B V"]
) -> Bool[Array, "*B V"]:
  ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  return ids == targets[..., None]
