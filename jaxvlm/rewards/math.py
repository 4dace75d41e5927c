"""The final answer equals the row's answer as mathematics (math-verify)."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import math_verify

from jaxvlm.rewards import final_answer, plain

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

# It warns that its own alarm is off; the scorer's wall limit stands instead,
# which also stops what holds the interpreter lock.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_WORD = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*")
# What makes sympy compute for minutes: large factorials, towers of powers,
# powers with long exponents, very long numbers.
_COSTLY = re.compile(
  r"\d{4,}\s*[)}\]]*\s*!|!.*!|\d{50}|(?:\^|\*\*)\s*[({]*\s*[+-]?\d{4,}"
  r"|(?:\^|\*\*)\s*[({]*[^(){}]*(?:\^|\*\*)|[)}]\s*(?:\^|\*\*)\s*[({]*\s*\d{3,}",
  re.DOTALL,
)


def reward(completion: str, example: Example) -> float:
  """1 if the two are equal as mathematics, else 0.

  An answer that would be costly to simplify is right only if it is the row's
  answer letter by letter; words are compared as words.

  Raises:
    ValueError: the row's answer is empty or nothing that can be parsed.
  """
  gold = _cleaned(final_answer(example.answer) or example.answer)
  if not gold:
    raise ValueError("the row has no answer")
  answer = final_answer(completion)
  if answer is None:
    return 0.0
  answer = _cleaned(answer)
  if plain(answer) == plain(gold):
    return 1.0
  if _WORD.fullmatch(gold) or _WORD.fullmatch(answer):
    return 0.0
  if _costly(answer) or _costly(gold):
    return 0.0
  parsed_gold = _parsed(gold)
  if not parsed_gold:
    raise ValueError(f"the row's answer {gold!r} cannot be parsed")
  # The order matters: gold first.
  equal = math_verify.verify(parsed_gold, _parsed(answer), timeout_seconds=None)
  return float(equal)


def _cleaned(text: str) -> str:
  for sign in ("°", r"^\circ", r"^{\circ}", r"\$", "$"):
    text = text.replace(sign, "")
  return text.strip().rstrip(".").rstrip()


def _costly(text: str) -> bool:
  powers = text.count("^") + text.count("**")
  opened = max(text.count("("), text.count("{"))
  return (
    len(text) > 200 or powers > 10 or opened > 40 or bool(_COSTLY.search(text))
  )


def _parsed(text: str) -> list:
  return math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None)
