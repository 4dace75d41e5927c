"""Rewards: one file each, with reward(completion, example) -> float.

A reward runs in a worker process that holds neither jax nor the pictures:
there `example` has the fields of types.Example with images = (). What it
raises, or a value that is not finite, costs the group its place in the step.
Its further arguments, by keyword, are options that a config may give it.
"""

import ast
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from jaxvlm.find import find

_NAMED = re.compile(r"((?:.*?\.py:)?\w+)\((.*)\)", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm)\s*\{([^{}]*)\}")
_BRACE = re.compile(r"\\boxed\s*\{|\\[{}\\]|[{}]")


def load(name: str) -> Callable[[str, Any], float]:
  """The reward that a config names, its options filled in.

  Args:
    name: a file of this package or a user's "file.py:function", where wanted
      with options as literals: "number(relative=0.05)".

  Raises:
    ValueError: it is not found, its options cannot be read, or they are not
      the function's: one is unknown or missing.
  """
  named = _NAMED.fullmatch(name)
  function = find("rewards", named[1] if named else name, "reward")
  options = _options(name, named[2]) if named else {}
  try:
    inspect.signature(function).bind("", None, **options)
  except TypeError as error:
    raise ValueError(
      f"{name}: {error}; a reward is called with a completion, the row and "
      "its options, as in 'number(relative=0.05)'."
    ) from error
  return functools.partial(function, **options)


def _options(name: str, text: str) -> dict[str, Any]:
  try:
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
      raise ValueError("these are not options")
    if call.args:
      raise ValueError("an option has no name")
    options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    if len(options) < len(call.keywords):
      raise ValueError("an option is given twice")
    return options
  except (SyntaxError, ValueError) as error:
    raise ValueError(
      f"{name}: {error}; options are written as in 'number(relative=0.05)'."
    ) from error


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


def unwrapped(text: str) -> str:
  r"""Text without the commands that set it upright or bold, as \text{(B)}."""
  return _WRAPPED.sub(r"\1", text)


def plain(text: str) -> str:
  """Text as it is compared: case folded, runs of white space as one blank."""
  return " ".join(text.split()).casefold()
