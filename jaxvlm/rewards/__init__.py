"""Rewards: one file each, with reward(completion, example) -> float.

A reward runs in a worker process that holds neither jax nor the pictures:
there `example` has the fields of types.Example with images = (). What it
raises, or a value that is not finite, costs the group its place in the step.
"""

import re

_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_BRACE = re.compile(r"\\boxed\s*\{|\\[{}\\]|[{}]")


def boxes(text: str) -> list[tuple[int, int, str]]:
  r"""Start, end and content of each closed \boxed{}, in order of closing."""
  found = []
  opened: list[re.Match[str]] = []
  for brace in _BRACE.finditer(text):
    kind = brace.group()
    if kind == "}" and opened:
      start = opened.pop()
      if start.group() != "{":
        content = text[start.end() : brace.start()]
        found.append((start.start(), brace.end(), content))
    elif kind == "{" or kind.startswith(r"\boxed"):
      opened.append(brace)
  return found


def final_answer(completion: str) -> str | None:
  r"""The answer that a completion ends on; None: there is none.

  It is the content of the last closed <answer></answer> or \boxed{} after
  the thinking; a box within an answer is opened. A thought that was never
  closed, or an empty answer, is none.
  """
  text = completion.rpartition("</think>")[2]
  if "<think>" in text:
    return None
  found = [(match.end(), match.group(1)) for match in _ANSWER.finditer(text)]
  found += [(end, content) for _, end, content in boxes(text)]
  if not found:
    return None
  answer = max(found)[1]
  while inner := boxes(answer):
    answer = inner[-1][2]
  return answer.strip() or None


def plain(text: str) -> str:
  """Text as it is compared: case folded, runs of white space as one blank."""
  return " ".join(text.split()).casefold()
