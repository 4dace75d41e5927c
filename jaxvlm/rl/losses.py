"""From the losses of tokens to that of an update.

Means are not made here: a sum and its count travel, so that the mean over an
update does not depend on how it was split into microbatches, padded, packed
or sharded.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pair = tuple[Float[Array, "*K"], Float[Array, "*K"]]  # a sum and its count

AGGREGATIONS = ("token", "sequence", "sequence_sum", "fixed")


def token_sum(
  values: Float[Array, "Q G C"], mask: Bool[Array, "Q G C"]
) -> Float[Array, ""]:
  """Sum over the tokens that count, in float32."""
  return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0))


def by_group(
  values: Float[Array, "Q G C"],
  mask: Bool[Array, "Q G C"],
  groups: Bool[Array, "Q K"],
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
  """Sums and counts of tokens over the questions of each of K groups."""

  def total(tokens: Float[Array, "Q G C"]) -> Float[Array, " K"]:
    questions = jnp.sum(jnp.where(mask, tokens, 0.0), (1, 2))
    return jnp.sum(jnp.where(groups, questions[:, None], 0.0), 0)

  values = values.astype(jnp.float32)
  return total(values), total(jnp.ones_like(values))


def aggregate(
  losses: Float[Array, "Q G C"],
  mask: Bool[Array, "Q G C"],
  *,
  aggregation: str,
  length: int,
) -> Pair:
  """(sum, count), whose quotient over a whole update is its loss.

    token         the mean over all tokens (DAPO, arXiv 2503.14476)
    sequence      the mean over completions of their token means (GRPO)
    sequence_sum  the mean over completions of their sums
    fixed         that, divided by the fixed `length` (Dr.GRPO, 2503.20783)

  A completion that is masked as a whole does not count.

  Args:
    losses: of each token.
    mask: True where a token counts.
    aggregation: one of the above.
    length: the largest length that a completion may have.
  """
  lengths = jnp.sum(mask, -1, dtype=jnp.float32)
  if aggregation == "token":
    return token_sum(losses, mask), jnp.sum(lengths)
  per_sequence = jnp.sum(jnp.where(mask, losses.astype(jnp.float32), 0.0), -1)
  if aggregation == "sequence":
    per_sequence = per_sequence / jnp.maximum(lengths, 1.0)
  elif aggregation == "fixed":
    per_sequence = per_sequence / length
  return jnp.sum(per_sequence), jnp.sum(lengths > 0, dtype=jnp.float32)
