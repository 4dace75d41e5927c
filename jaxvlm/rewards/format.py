r"""The form: at most one thought, then one answer.

Good: `<answer> 3 </answer>`, `<think> 1 + 2 </think> <answer> 3 </answer>`,
`<think> ... </think> So it is \boxed{3}.` Tags that are nested, repeated or
not closed fail, as do text around an <answer> and an empty answer. Text after
a box is allowed unless the config says `format(text_after=False)`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jaxvlm.rewards import boxes, final_answer

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

_TAG = re.compile(r"</?(?:think|answer)>")
# What closes a sentence or a formula is no text.
_CLOSING = re.compile(r"(?:[\s.$]|\\[)\]])*")
_THOUGHT = ["<think>", "</think>"]
_ANSWER = ["<answer>", "</answer>"]


def reward(
  completion: str, example: Example, *, text_after: bool = True
) -> float:
  r"""1 if the whole completion has the form, else 0.

  Args:
    completion: text.
    example: does not matter.
    text_after: False: a \boxed{} is the end, but for a full stop or what closes
      a formula.
  """
  del example
  text = completion.strip()
  tags = _TAG.findall(text)
  if tags[:2] == _THOUGHT:
    thought, _, text = text.partition("</think>")
    if not thought.startswith("<think>"):
      return 0.0
    text, tags = text.strip(), tags[2:]
  boxed = boxes(text)
  if len(boxed) != text.count(r"\boxed") or len(boxed) > 1:
    return 0.0
  if tags == _ANSWER:
    whole = text.startswith("<answer>") and text.endswith("</answer>")
  else:
    whole = not tags and len(boxed) == 1
    if whole and not text_after:
      whole = _CLOSING.fullmatch(text, boxed[0][1]) is not None
  return float(whole and final_answer(text) is not None)
