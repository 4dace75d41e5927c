"""The final answer is the row's answer, letter by letter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxvlm.rewards import final_answer, plain

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example


def reward(completion: str, example: Example) -> float:
  """1 if the answers are equal but for case and white space, else 0.

  Raises:
    ValueError: the row's answer is empty.
  """
  if not example.answer.strip():
    raise ValueError("the row has no answer")
  answer = final_answer(completion)
  return float(answer is not None and plain(answer) == plain(example.answer))
