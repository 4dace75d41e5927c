"""The final answer says yes or no, as the row's answer does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jaxvlm.rewards import final_answer, unwrapped

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

_WORD = re.compile(r"[^\W\d_]+")


def said(text: str) -> str | None:
  """ "yes" or "no", if the text begins with it and never says the other."""
  words = _WORD.findall(unwrapped(text).casefold())
  if not words or words[0] not in ("yes", "no"):
    return None
  other = "no" if words[0] == "yes" else "yes"
  return None if other in words else words[0]


def reward(completion: str, example: Example) -> float:
  """1 if both say yes or both say no, else 0.

  `Yes.` and `No, the cup is red` are answers; `yes or no` and `I think so`
  are none, and two that are none are not equal.

  Raises:
    ValueError: the row's answer is neither.
  """
  right = said(example.answer)
  if right is None:
    raise ValueError(f"the row's answer {example.answer!r} is not yes or no")
  answer = final_answer(completion)
  return float(answer is not None and said(answer) == right)
