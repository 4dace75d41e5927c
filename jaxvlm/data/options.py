"""Multiple choice in another order at each draw, against a bias to letters.

The options stand in lines of their own, "A. text" or "(B) text", and the row's
answer is a letter or an option's text. A row that is not read with certainty is
none: two blocks of options, options that speak of others ("both A and B", "none
of the above"), pictures among them, or a written response.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxvlm.data.messages import MARKER
from jaxvlm.types import Example

LETTERS = "ABCDEFGHIJ"
_LINE = re.compile(r"([ \t]*\(?)([A-J])([.):]\)?[ \t]+)(\S.*?)([ \t]*)")
_ANSWER = re.compile(r"(\(?)([A-J])([.):]?\)?)")
_WITH_TEXT = re.compile(r"(\(?)([A-J])([.):]\)?[ \t]+)(\S.*)", re.DOTALL)
# What in an option speaks of the other options, or may.
_OTHERS = re.compile(
  r"\b(?i:all|none|any|each|both|either|neither|some|one|two)\s+(?i:of\s+)?"
  r"(?i:the\s+)?(?i:above|below|preceding|following|previous|these|those|others?)\b"
  r"|\b(?i:options?|choices?|answers?|former|latter)\b"
  r"|\b[A-J]\)?\s*(?:,|&|/|\+|and|or|nor)\s*\(?[A-J]\b|\([A-J]\)"
  r"|\b(?i:only|both|either|neither|just)\s+[A-J]\b|\b[A-J]\s+(?i:only|alone)\b"
)
# What may stand below the options and is none of the last one's text.
_AFTER = re.compile(
  r"\n[ \t]*(?:\n|$)|\n(?i:answer|please|select|choose|pick|think|first|respond"
  r"|reply|give|provide|output|put|you)\b"
)
# What in the question speaks of an option by its letter.
_NAMED = re.compile(r"(?i:\b(?:option|choice|answer)s?)\s*\(?[A-J]\b")


class Options(NamedTuple):
  """The block of options in a text."""

  before: str
  lines: list[re.Match[str]]
  after: str

  @property
  def texts(self) -> list[str]:
    return [line[4] for line in self.lines]

  def ordered(self, order: Sequence[int]) -> str:
    """The text with option order[i] at the i-th letter."""
    lines = [
      "".join((line[1], line[2], line[3], self.texts[i], line[5]))
      for line, i in zip(self.lines, order, strict=True)
    ]
    return self.before + "\n".join(lines) + self.after


class Choices(NamedTuple):
  """A row that is read with certainty."""

  options: Options
  part: int | None  # of the last turn's content; None: it is all text
  right: int  # which option is


def with_options(problem: str, options: Sequence[Any]) -> str:
  """The problem with its options in lines below it.

  Raises:
    ValueError: they are fewer than two texts, or more than there are letters.
  """
  texts = [str(option).strip() for option in options]
  if not 2 <= len(texts) <= len(LETTERS) or not all(texts):
    raise ValueError(f"the options are {texts}; expected 2 to 10 texts.")
  lines = (
    f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)
  )
  return "\n".join([problem, *lines])


def find_letter(answer: str, texts: Sequence[str]) -> str | None:
  """The letter of the option that an answer names; None: not just one is."""
  letters = LETTERS[: len(texts)]
  found = {letters[i] for i, text in enumerate(texts) if text == answer}
  match = _ANSWER.fullmatch(answer) or _WITH_TEXT.fullmatch(answer)
  if match and match[2] in letters:
    said = match[4] if match.re is _WITH_TEXT else None
    if said is None or said == texts[letters.index(match[2])]:
      found.add(match[2])
  return found.pop() if len(found) == 1 else None


def read_choices(example: Example) -> Choices | None:
  """A row's options and its right one; None: not with certainty."""
  if example.response is not None or any(
    message["role"] == "assistant" for message in example.messages
  ):
    return None
  texts = _texts(example)
  found = [(part, one) for part, text in texts.items() for one in _find(text)]
  if len(found) != 1 or any(_NAMED.search(text) for text in texts.values()):
    return None
  part, options = found[0]
  letter = find_letter(example.answer, options.texts)
  if letter is None or len(set(options.texts)) < len(options.texts):
    return None
  if any(_OTHERS.search(text) or MARKER in text for text in options.texts):
    return None
  return Choices(options, part, LETTERS.index(letter))


def _texts(example: Example) -> dict[int | None, str]:
  """The texts of the last turn, by their place in its content."""
  if not example.messages:
    return {None: example.problem}
  content = example.messages[-1]["content"]
  if isinstance(content, str):
    return {None: content}
  return {i: part["text"] for i, part in enumerate(content) if "text" in part}


def shuffled(example: Example, key: str) -> Example:
  """The row with its options in the order that the key gives.

  Args:
    example: a row that `read_choices` reads.
    key: the order is a function of it and the number of options.
  """
  choices = read_choices(example)
  assert choices is not None
  options = choices.options
  order = list(range(len(options.lines)))
  random.Random(key).shuffle(order)
  letter = LETTERS[order.index(choices.right)]
  old, new = options.ordered(range(len(order))), options.ordered(order)
  messages = example.messages
  if messages:
    content = messages[-1]["content"]
    if choices.part is None:
      content = new
    else:
      content = list(content)
      content[choices.part] = content[choices.part] | {"text": new}
    messages = (*messages[:-1], messages[-1] | {"content": content})
  return dataclasses.replace(
    example,
    problem=example.problem.replace(old, new),
    messages=messages,
    answer=_renamed(example.answer, letter, options.texts),
  )


def _renamed(answer: str, letter: str, texts: Sequence[str]) -> str:
  """The answer with this letter; one that is an option's text stays."""
  if answer in texts:
    return answer
  match = _ANSWER.match(answer)
  assert match is not None
  return answer[: match.start(2)] + letter + answer[match.end(2) :]


def _find(text: str) -> list[Options]:
  """The blocks of lines A, B, ... in a text, all lettered in one style."""
  lines = text.split("\n")
  matches = [_LINE.fullmatch(line) for line in lines]
  found = []
  start = 0
  while start < len(lines):
    end = start
    block: list[re.Match[str]] = []
    while end < len(lines) and end - start < len(LETTERS):
      line = matches[end]
      if line is None or line[2] != LETTERS[end - start]:
        break
      block.append(line)
      end += 1
    styles = {(line[1], line[3]) for line in block}
    if block and (len(block) < 2 or len(styles) > 1):
      return []
    if block:
      before = "".join(line + "\n" for line in lines[:start])
      after = "".join("\n" + line for line in lines[end:])
      found.append(Options(before, block, after))
    elif matches[start] is not None:
      return []  # a lettered line outside of any block
    start = max(end, start + 1)
  if any(one.after and not _AFTER.match(one.after) for one in found):
    return []
  return found
