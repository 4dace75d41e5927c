"""The final answer is the row's number, or near enough."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from jaxvlm.rewards import final_answer, plain, unwrapped

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

_LONGEST = 100  # characters; what is longer is prose, or made to cost time
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_QUANTITY = re.compile(
  rf"""(?P<sign>[+-]?)\s*
  (?: \\[dt]?frac\s*\{{\s*(?P<over>{_DECIMAL})\s*\}}\s*
      \{{\s*(?P<under>{_DECIMAL})\s*\}}
    | (?P<value>{_DECIMAL})
      (?: \s*/\s*(?P<divisor>{_DECIMAL})
        | e(?P<power>[+-]?\d{{1,3}})
        | \s*(?:\\times|×|\*)\s*10\s*(?:\^|\*\*)\s*\{{?(?P<ten>[+-]?\d{{1,3}})\}}?
      )?
  )
  \s*(?P<unit>%|[^\W\d_]+(?:\s[^\W\d_]+)?)?\.?""",
  re.IGNORECASE | re.VERBOSE,
)
_SIGNS = str.maketrans({"−": "-", "$": "", "°": " degrees"})
_NO_UNITS = ("and", "or", "to", "not", "x")


class Quantity(NamedTuple):
  value: Fraction
  unit: str  # folded; "": none


def quantity(text: str) -> Quantity | None:
  """The one number that a text consists of; None: it is not one number.

  Read are signs, decimals, thousands' commas, `1/2`, `\\frac{1}{2}`, `1e-3`,
  `2 \\times 10^{5}`, a dollar before and a unit of one or two words or a
  percent sign behind. `3 or 4`, `10^2` and `x = 5` are not one number.
  """
  text = unwrapped(text.replace("\\%", "%").replace("\\$", ""))
  text = text.translate(_SIGNS).strip()
  found = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST else None
  if found is None:
    return None
  unit = plain(found["unit"] or "")
  if set(unit.split()) & set(_NO_UNITS):
    return None
  value = _fraction(found["over"] or found["value"])
  under = _fraction(found["under"] or found["divisor"] or "1")
  if not under:
    return None
  value *= Fraction(10) ** int(found["power"] or found["ten"] or 0)
  return Quantity((-value if found["sign"] == "-" else value) / under, unit)


def _fraction(text: str) -> Fraction:
  return Fraction(text.replace(",", ""))


def reward(
  completion: str,
  example: Example,
  *,
  absolute: float = 0.0,
  relative: float = 0.0,
) -> float:
  """1 if |answer - gold| <= max(absolute, relative |gold|), else 0.

  The comparison is exact, so `number` alone asks for the same number, and a
  bound that is met counts. Where both have a unit, the units must be the same
  word: nothing is converted. `number(relative=0.05)` is ChartQA's relaxed
  accuracy (arXiv 2203.10244, section 5.1).

  Raises:
    ValueError: the row's answer is not one number, or a bound is negative.
  """
  bounds = Fraction(str(absolute)), Fraction(str(relative))
  if min(bounds) < 0:
    raise ValueError(f"absolute={absolute}, relative={relative}: below 0")
  gold = quantity(example.answer)
  if gold is None:
    raise ValueError(f"the row's answer {example.answer!r} is not one number")
  answer = quantity(final_answer(completion) or "")
  if answer is None:
    return 0.0
  if answer.unit and gold.unit and answer.unit != gold.unit:
    return 0.0
  most = max(bounds[0], bounds[1] * abs(gold.value))
  return float(abs(answer.value - gold.value) <= most)
