"""The form with a thought that is asked for: the paper's rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxvlm.rewards import format as any_format

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example


def reward(completion: str, example: Example) -> float:
  r"""1 if it is <think>...</think>, then one \boxed{} or <answer>, else 0."""
  thinks = completion.lstrip().startswith("<think>")
  return any_format.reward(completion, example) if thinks else 0.0
