"""The final answer equals the row's answer as mathematics (math-verify)."""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING

import math_verify
import sympy

from jaxvlm.rewards import final_answer, plain

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

# It warns that its own alarm is off; the scorer's wall limit stands instead,
# which also stops what holds the interpreter lock.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Their values at a point are computed by sampling.
_UNEVALUATED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit)
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
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
  if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
    return float(int(answer) == int(gold))
  return float(_equal(gold, answer))


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


# A group has one gold, and its completions often agree.
@functools.lru_cache(maxsize=256)
def _equal(gold: str, answer: str) -> bool:
  parsed_gold = _parsed_gold(gold)
  if not parsed_gold:
    raise ValueError(f"the row's answer {gold!r} cannot be parsed")
  parsed = _parsed(answer)
  # It compares numbers to six decimals, then simplifies what differs, which
  # takes ten times as long; what differs at one point is not equal. (What has
  # a percent sign is parsed as no number, and is compared in full.)
  if _far(_number(parsed_gold), _number(parsed)):
    return False
  # The order matters: gold first.
  return math_verify.verify(parsed_gold, parsed, timeout_seconds=None)


def _number(parsed: list) -> complex | None:
  """What was parsed, if it is a number or a term, the term at one point."""
  found = parsed[0] if parsed else None
  if not isinstance(found, sympy.Expr) or found.has(*_UNEVALUATED):
    return None
  point = {
    x: 0.6 + sum(map(ord, x.name)) % 89 / 100 for x in found.free_symbols
  }
  try:
    return complex(found.evalf(15, subs=point))
  except (TypeError, ValueError, OverflowError):
    return None


def _far(a: complex | None, b: complex | None) -> bool:
  if a is None or b is None:
    return False
  return abs(a - b) > 1e-4 * max(1.0, abs(a), abs(b))


@functools.lru_cache(maxsize=16)
def _parsed_gold(text: str) -> list:
  return _parsed(text)


def _parsed(text: str) -> list:
  return math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None)
