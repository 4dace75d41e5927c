"""The final answer is how many there are: a whole number, exactly."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jaxvlm.rewards import final_answer, unwrapped

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

_WORDS = {
  "zero": 0,
  "one": 1,
  "two": 2,
  "three": 3,
  "four": 4,
  "five": 5,
  "six": 6,
  "seven": 7,
  "eight": 8,
  "nine": 9,
  "ten": 10,
  "eleven": 11,
  "twelve": 12,
}
_COUNT = re.compile(
  rf"(\d{{1,3}}(?:,\d{{3}})+|\d{{1,12}}|{'|'.join(_WORDS)})"
  r"(?:\s+(?!(?:or|and|to|point)\b)[^\W\d_]+){0,3}\.?",
  re.IGNORECASE,
)


def counted(text: str) -> int | None:
  """The count that a text names, as `3`, `three` or `3 red cubes`.

  None: none or several (`3 or 4`), or no count (`2.5`, `-1`, `many`).
  """
  found = _COUNT.fullmatch(unwrapped(text).replace("$", "").strip())
  if found is None:
    return None
  number = found[1].lower()
  if number in _WORDS:
    return _WORDS[number]
  return int(number.replace(",", ""))


def reward(completion: str, example: Example) -> float:
  """1 if the two counts are equal, else 0; near is wrong.

  Raises:
    ValueError: the row's answer is no count.
  """
  right = counted(example.answer)
  if right is None:
    raise ValueError(f"the row's answer {example.answer!r} is no count")
  answer = final_answer(completion)
  return float(answer is not None and counted(answer) == right)
