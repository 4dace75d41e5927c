"""What of a row is shown: its pictures, captions in their place, or neither."""

import dataclasses
from collections.abc import Mapping

from jaxvlm.data.loader import Source
from jaxvlm.data.messages import MARKER, in_words
from jaxvlm.types import Example


class Views:
  """The prompts that a source's rows are asked with, by name.

  A row is named by its id; rows of one id are one row. A row has one prompt,
  answered several times, or, where a source shuffles options, a prompt for each
  completion.
  """

  def __init__(
    self,
    source: Source,
    *,
    seed: int,
    completions: int,
    caption_key: str,
    caption_prompt: str,
  ):
    """Shows nothing yet.

    Args:
      source: of the rows.
      seed: of the order of options.
      completions: of each row.
      caption_key: the column with a caption, which stands for all pictures of
        a row; "": captions are given to `example`.
      caption_prompt: what a picture is shown with to be captioned.
    """
    self._source = source
    self._seed = seed
    self._caption_key = caption_key
    self._caption_prompt = caption_prompt
    self._numbers: dict[str, int] = {}
    for number, row in enumerate(source.row_ids):
      self._numbers.setdefault(row, number)
    prompts = completions if source.shuffle_options else 1
    # Of each row: the names of its prompts.
    self.prompts = {
      row: [f"{row}/{i}" for i in range(prompts)] for row in self._numbers
    }
    self.completions = completions // prompts  # of each prompt

  def example(
    self, view: str, prompt: str, captions: Mapping[str, str]
  ) -> Example:
    """A row as a view shows it; its rewards are left out.

    Args:
      view: of annotations.VIEWS.
      prompt: one of `prompts`.
      captions: by the names that `pictures` gives; {} where a column has them.

    Raises:
      ValueError: the row has no caption; names it.
    """
    row, _, draw = prompt.rpartition("/")
    example = self._source.draw(self._numbers[row], int(draw), self._seed)
    if view == "caption":
      example = in_words(example, self.captions(row, captions))
    elif view == "none":
      example = in_words(example, [""] * len(example.images))
    return dataclasses.replace(example, rewards=())

  def pictures(self) -> list[str]:
    """Names of all pictures of all rows."""
    return [
      f"{row}/{i}"
      for row in self._numbers
      for i in range(len(self._row(row).images))
    ]

  def picture(self, name: str) -> Example:
    """What asks for the caption of one picture."""
    row, _, number = name.rpartition("/")
    example = self._row(row)
    return dataclasses.replace(
      example,
      problem=f"{MARKER}{self._caption_prompt}",
      messages=(),
      images=(example.images[int(number)],),
    )

  def captions(self, row: str, captions: Mapping[str, str]) -> list[str]:
    """A text for each picture; one of a column stands for all of them."""
    example, key = self._row(row), self._caption_key
    if not example.images:
      return []
    if not key:
      return [captions[f"{row}/{i}"] for i in range(len(example.images))]
    text = example.columns.get(key)
    if not isinstance(text, str) or not text.strip():
      raise ValueError(
        f"{example.name}: caption_key {key!r} is {text!r}; expected text. "
        f"Columns are {', '.join(example.columns) or 'none'}; a filter leaves "
        "out rows without a caption."
      )
    return [text.strip(), *[""] * (len(example.images) - 1)]

  def _row(self, row: str) -> Example:
    source = self._source
    return source.examples[source.kept[self._numbers[row]]]
