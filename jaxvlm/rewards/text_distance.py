"""The final answer reads as the row's answer, for OCR: edit distance."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from jaxvlm.rewards import final_answer

if TYPE_CHECKING:  # jaxvlm.types imports jax, and a worker must not
  from jaxvlm.types import Example


def distance(a: str, b: str) -> int:
  """Levenshtein distance: insertions, deletions and substitutions, each 1.

  Myers' bit vectors (J. ACM 46, 1999) in Hyyrö's form (2003): a column of the
  table is two integers of len(a) bits, of the steps that go up and down in it.
  """
  if not a or not b:
    return len(a) + len(b)
  places: dict[str, int] = {}
  for i, sign in enumerate(a):
    places[sign] = places.get(sign, 0) | 1 << i
  whole, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
  up, down, count = whole, 0, len(a)
  for sign in b:
    equal = places.get(sign, 0)
    diagonal = ((((equal & up) + up) ^ up) | equal | down) & whole
    right_up = down | (whole & ~(diagonal | up))
    right_down = up & diagonal
    count += bool(right_up & last) - bool(right_down & last)
    right_up = (right_up << 1 | 1) & whole
    right_down = (right_down << 1) & whole
    up = right_down | (whole & ~(diagonal | right_up))
    down = right_up & diagonal
  return count


def reward(completion: str, example: Example, *, threshold: float) -> float:
  """1 - distance / length of the longer text; below threshold, 0.

  ANLS (arXiv 1905.13648, equation 1) of one answer, but that case counts, for
  it is read. Runs of white space are one blank, and Unicode is composed (NFC).
  Any text shares some letters with any other, so a threshold of 0 pays for
  wrong answers; the paper has 0.5.

  Raises:
    ValueError: the row's answer is empty, or threshold is not in 0..1.
  """
  if not 0 <= threshold <= 1:
    raise ValueError(f"threshold={threshold}: expected 0 to 1")
  gold = _read(example.answer)
  if not gold:
    raise ValueError("the row has no answer")
  answer = _read(final_answer(completion) or "")
  longer = max(len(gold), len(answer))
  # The lengths alone cost this much: long answers are not worth the time.
  if 1 - abs(len(gold) - len(answer)) / longer < threshold:
    return 0.0
  similarity = 1 - distance(gold, answer) / longer
  return similarity if similarity >= threshold else 0.0


def _read(text: str) -> str:
  return unicodedata.normalize("NFC", " ".join(text.split()))
