r"""The form: at most one thought, then one answer.

Good: `<answer> 3 </answer>`, `<think> 1 + 2 </think> <answer> 3 </answer>`,
`<think> ... </think> So it is \boxed{3}.` Tags that are nested, repeated or
not closed fail, as do text around an <answer> and an empty answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jaxvlm.rewards import boxes, final_answer

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example

_TAG = re.compile(r"</?(?:think|answer)>")
_THOUGHT = ["<think>", "</think>"]
_ANSWER = ["<answer>", "</answer>"]


def reward(completion: str, example: Example) -> float:
  """1 if the whole completion has the form, else 0."""
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
  return float(whole and final_answer(text) is not None)
