r"""The final answer names the right option, by its letter.

`B`, `(B)`, `B.`, `B. cat`, `(B) cat`, `option B` and `\text{(B)}` are B; an
answer that names two options (`A or B`, `A. cat B. dog`) is neither, and
`A cat` is no option but an article.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jaxvlm.rewards import final_answer, unwrapped

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

_OPTION = re.compile(
  r"""(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)
      (?:\s+is)?\s*:?\s*)?
      (?: \(([A-Z])\) [.:]? | ([A-Z])[.:)] | ([A-Z])(?=$) )
      (?:\s*(\S.*))?""",
  re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
# Case counts: in `B. vitamin c or d`, c and d name no options.
_ANOTHER = re.compile(
  r"\([A-Z]\)|(?<![A-Za-z])[A-Z][.:)](?:\s|$)|\b(?:or|and)\s+[A-Z]\b|^[A-Z]$"
  r"|^(?i:or|and)\b"
)


def letter(text: str) -> str | None:
  """The one option that a text names, in upper case; None: none or several."""
  text = unwrapped(text)
  text = text.replace("$", "").replace("*", "").strip()
  option = _OPTION.fullmatch(text)
  if option is None:
    return None
  if _ANOTHER.search(option.group(4) or ""):
    return None
  return (option.group(1) or option.group(2) or option.group(3)).upper()


def reward(completion: str, example: Example) -> float:
  """1 if the answer names the option that the row's answer names, else 0.

  Raises:
    ValueError: the row's answer names no single option.
  """
  right = letter(example.answer)
  if right is None:
    raise ValueError(f"the row's answer {example.answer!r} names no option")
  answer = final_answer(completion)
  return float(answer is not None and letter(answer) == right)
