"""A penalty on saying the same again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example


def reward(completion: str, example: Example, *, words: int) -> float:
  """Minus the share of runs of so many words that were said before.

  With n runs of `words` consecutive words, u of them different: u / n - 1,
  from 0 (nothing again) to almost -1; 0 where there is no run. It is the
  n-gram penalty of arXiv 2502.03373 averaged over the completion, as TRL
  has it. Words are parted by white space, and case does not count.

  Raises:
    ValueError: words is below 1.
  """
  del example
  if words < 1:
    raise ValueError(f"words={words}: expected at least 1")
  said = completion.casefold().split()
  runs = list(zip(*(said[i:] for i in range(words)), strict=False))
  return len(set(runs)) / len(runs) - 1.0 if runs else 0.0
