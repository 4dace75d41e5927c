"""The form with a thought that is asked for: the paper's rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxvlm.rewards import format as any_format

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example


def reward(
  completion: str, example: Example, *, text_after: bool = True
) -> float:
  r"""1 if it is <think>...</think>, then one \boxed{} or <answer>, else 0.

  Args:
    completion: text.
    example: does not matter.
    text_after: as format.py has it.
  """
  if not completion.lstrip().startswith("<think>"):
    return 0.0
  return any_format.reward(completion, example, text_after=text_after)
