"""A penalty on completions that come near the length limit (DAPO's)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example


def reward(
  completion: str, example: Example, *, longest: int, buffer: int
) -> float:
  """0 up to longest - buffer tokens, then falling evenly to -1 at longest.

  Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), with
  L_max = longest and L_cache = buffer; EOS is a token. The stage's
  max_completion_length ends a completion, so `longest` is at most that.

  Raises:
    ValueError: the tokens were not counted, or buffer is not in 1..longest.
  """
  del completion
  if not 0 < buffer <= longest:
    raise ValueError(f"buffer={buffer}: expected 1 to longest={longest}")
  tokens = example.completion_tokens
  if tokens is None:
    raise ValueError("the completion's tokens were not counted")
  return min(0.0, max(-1.0, (longest - buffer - tokens) / buffer))
