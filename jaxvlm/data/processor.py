"""Rows to questions: the chat template, the ids and the pictures' patches.

Equal to transformers' processor of the checkpoint, without needing torch or
torchvision.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import jinja2
import numpy as np
from jaxtyping import Bool, Int

from jaxvlm.data.messages import (
  MARKER,
  Message,
  count_images,
  turns,
  with_suffix,
)
from jaxvlm.data.pictures import (
  PictureSettings,
  load_picture,
  make_patches,
  measure_picture,
  read_json,
  smart_resize,
)
from jaxvlm.data.vision_layout import Layout, mrope_positions
from jaxvlm.types import Example, Question

_VISION_TOKENS = (
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
  """Prepares rows for one checkpoint; stateless, shared by threads."""

  tokenizer: Any  # transformers' fast tokenizer
  chat_template: str
  pictures: PictureSettings
  layout: Layout
  prompt_suffix: str  # put after each problem
  system_prompt: str | None  # of rows without one; None: the template's own
  eos_ids: tuple[int, ...]  # any of them ends a completion
  pad_id: int
  # Boxes are said in this many parts of a picture's sides, whatever its size;
  # None: in pixels of the picture as it is resized.
  box_side: int | None = None

  @classmethod
  def from_directory(
    cls,
    directory: str | pathlib.Path,
    *,
    min_pixels: int | None,
    max_pixels: int | None,
    prompt_suffix: str,
    system_prompt: str | None,
  ) -> Self:
    """Reads tokenizer, chat template and settings of a HF directory.

    Args:
      directory: with config.json, tokenizer and preprocessor_config.json.
      min_pixels: area below which pictures grow; None: the checkpoint's.
      max_pixels: area above which pictures shrink; None: the checkpoint's.
      prompt_suffix: text put after each problem, in the last turn.
      system_prompt: text of a system turn, for rows that have none of their
        own; None: what the template does.

    Raises:
      ValueError: a file is missing or does not fit the others.
    """
    import transformers  # 200 MB, where torch is there too

    directory = pathlib.Path(directory)
    config = read_json(directory / "config.json")
    if config is None:
      raise ValueError(f"{directory}: no config.json; not a HF checkpoint.")
    try:
      tokenizer = transformers.AutoTokenizer.from_pretrained(
        directory, local_files_only=True
      )
    except (OSError, ValueError) as error:
      raise ValueError(f"{directory}: no usable tokenizer: {error}") from error
    layout = Layout.from_config(config)
    pictures = PictureSettings.from_directory(
      directory, min_pixels=min_pixels, max_pixels=max_pixels
    )
    _check_agreement(directory, tokenizer, layout, pictures)
    eos_ids = _eos_ids(directory, config, tokenizer)
    pad_id = tokenizer.pad_token_id
    return cls(
      tokenizer=tokenizer,
      chat_template=_chat_template(directory, tokenizer),
      pictures=pictures,
      layout=layout,
      prompt_suffix=prompt_suffix,
      system_prompt=system_prompt,
      eos_ids=eos_ids,
      pad_id=eos_ids[0] if pad_id is None else pad_id,
    )

  def text(self, example: Example) -> str:
    """The prompt as the template renders it, one image_pad a picture.

    Raises:
      ValueError: markers and pictures differ in number, a video, or messages
        that the template does not take; names the row.
    """
    try:
      text = self.tokenizer.apply_chat_template(
        self._messages(example),
        chat_template=self.chat_template,
        tokenize=False,
        add_generation_prompt=True,
      )
    except jinja2.TemplateError as error:
      raise ValueError(
        f"{example.name}: the chat template does not take it: {error}"
      ) from error
    if "<|video_pad|>" in text:
      raise ValueError(
        f"{example.name}: the prompt has <|video_pad|>; only pictures are "
        "supported."
      )
    return text

  def measure(self, example: Example) -> tuple[int, int]:
    """Tokens of the prompt and patches; checks the row, reads its pictures.

    Raises:
      ValueError: the row cannot be prepared; names it and says why.
    """
    words, seen = len(self._encode(example)) - len(example.images), 0
    area = self.pictures.token_side**2
    for i, picture in enumerate(example.images):
      try:
        height, width = measure_picture(picture)
        height, width = smart_resize(height, width, self.pictures)
      except ValueError as error:
        raise _picture_error(example, i, error) from error
      seen += height * width // area
    return words + seen, seen * self.layout.patches_per_token

  def length(self, example: Example) -> int:
    """Tokens of the prompt, as `measure`."""
    return self.measure(example)[0]

  def response_length(self, example: Example) -> int:
    """Tokens of the written response with its EOS; 0 without a response."""
    return len(self._response_ids(example.response))

  def question(self, example: Example, question_id: int) -> Question:
    """Prepares a row.

    Raises:
      ValueError: the row cannot be prepared; names it and says why.
    """
    ids = self._encode(example)
    patches, grids, sizes = [], [], []
    for i, picture in enumerate(example.images):
      try:
        pixels = load_picture(picture)
        rows, grid = make_patches(pixels, self.pictures)
      except ValueError as error:
        raise _picture_error(example, i, error) from error
      patches.append(rows)
      grids.append(grid)
      sizes.append(pixels.shape[:2])
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == self.layout.image_token_id] = [
      grid.prod() // self.layout.patches_per_token for grid in grids
    ]
    ids = np.repeat(ids, repeats)
    grid_thw = np.array(grids, np.int32).reshape(-1, 3)
    empty = np.zeros((0, self.pictures.patch_width), np.float32)
    response_ids = None
    if example.response is not None:
      response_ids = np.array(self._response_ids(example.response), np.int32)
    return Question(
      question_id=question_id,
      example=dataclasses.replace(
        example,
        picture_sizes=tuple((int(h), int(w)) for h, w in sizes),
        box_sizes=tuple(self._box_size(grid) for grid in grids),
      ),
      prompt_ids=ids,
      position_ids=mrope_positions(ids, grid_thw, self.layout),
      pixel_values=np.concatenate(patches) if patches else empty,
      image_grid_thw=grid_thw,
      response_ids=response_ids,
    )

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of a completion, without special tokens."""
    return self.tokenizer.decode(
      np.asarray(ids).tolist(),
      skip_special_tokens=True,
      clean_up_tokenization_spaces=False,
    )

  def banned_ids(self, vocab_size: int) -> Bool[np.ndarray, " V"]:
    """True for ids that are never sampled.

    Those are the placeholders of pictures and videos, and rows of the
    embedding that the tokenizer has no token for.

    Raises:
      ValueError: the tokenizer has ids that the model lacks.
    """
    known = self.tokenizer.get_vocab()
    if max(known.values()) >= vocab_size:
      raise ValueError(
        f"the tokenizer has ids up to {max(known.values())}, but the model's "
        f"vocab_size is {vocab_size}; they are not of one checkpoint."
      )
    banned = np.ones(vocab_size, bool)
    banned[list(known.values())] = False
    banned[[known[token] for token in _VISION_TOKENS if token in known]] = True
    return banned

  def _box_size(self, grid: Int[np.ndarray, " 3"]) -> tuple[int, int]:
    if self.box_side is not None:
      return self.box_side, self.box_side
    rows, columns = (int(n) for n in grid[1:])
    return rows * self.layout.patch_size, columns * self.layout.patch_size

  def _messages(self, example: Example) -> list[Message]:
    messages, what = turns(example), "image parts in the messages"
    if not example.messages:
      what = f"{MARKER} markers in the problem"
    if (count := count_images(messages)) != len(example.images):
      raise ValueError(
        f"{example.name}: {count} {what} but {len(example.images)} pictures; "
        "each picture needs one."
      )
    if self.system_prompt is not None and messages[0]["role"] != "system":
      messages.insert(0, {"role": "system", "content": self.system_prompt})
    messages[-1] = with_suffix(messages[-1], self.prompt_suffix)
    return messages

  def _encode(self, example: Example) -> Int[np.ndarray, " P"]:
    # Placeholders are whole tokens, so copies can be made after encoding.
    ids = np.array(self._ids(self.text(example)), np.int32)
    found = int((ids == self.layout.image_token_id).sum())
    if found != len(example.images):
      raise ValueError(
        f"{example.name}: {found} picture tokens in the prompt but "
        f"{len(example.images)} pictures; the problem must not contain "
        "<|image_pad|> itself, and the chat template must put one for each."
      )
    return ids

  def _ids(self, text: str) -> list[int]:
    # The Rust tokenizer: no state is touched, so threads may share it.
    encode = self.tokenizer.backend_tokenizer.encode
    return encode(text, add_special_tokens=False).ids

  def _response_ids(self, response: str | None) -> list[int]:
    return [] if response is None else [*self._ids(response), self.eos_ids[0]]


def _picture_error(example: Example, i: int, error: ValueError) -> ValueError:
  return ValueError(f"{example.name}: picture {i + 1}: {error}")


def _check_agreement(
  directory: pathlib.Path,
  tokenizer: Any,
  layout: Layout,
  pictures: PictureSettings,
) -> None:
  pad = tokenizer.get_vocab().get("<|image_pad|>")
  if pad != layout.image_token_id:
    raise ValueError(
      f"{directory}: config.json says image_token_id {layout.image_token_id} "
      f"but the tokenizer has <|image_pad|> as {pad}; the tokenizer files are "
      "missing or of another model."
    )
  sizes = (pictures.patch_size, pictures.merge_size)
  if sizes != (layout.patch_size, layout.spatial_merge_size):
    raise ValueError(
      f"{directory}: patch and merge size are {sizes} in the picture settings "
      f"but {(layout.patch_size, layout.spatial_merge_size)} in config.json."
    )


def _chat_template(directory: pathlib.Path, tokenizer: Any) -> str:
  """The processor's template goes before the tokenizer's, as in HF."""
  file = directory / "chat_template.jinja"
  if file.is_file():
    return file.read_text(encoding="utf-8")
  legacy = read_json(directory / "chat_template.json")
  template = legacy["chat_template"] if legacy else tokenizer.chat_template
  if not isinstance(template, str):
    raise ValueError(
      f"{directory}: no chat template (chat_template.jinja, "
      "chat_template.json or in tokenizer_config.json)."
    )
  return template


def _eos_ids(
  directory: pathlib.Path, config: dict[str, Any], tokenizer: Any
) -> tuple[int, ...]:
  """All ids that end a turn; first the one that a written response ends in."""
  generation = read_json(directory / "generation_config.json") or {}
  places = (
    generation.get("eos_token_id"),
    config.get("eos_token_id"),
    config.get("text_config", {}).get("eos_token_id"),
    tokenizer.eos_token_id,
  )
  found = next((place for place in places if place is not None), None)
  if found is None:
    raise ValueError(
      f"{directory}: no eos_token_id in generation_config.json, config.json "
      "or the tokenizer."
    )
  ids = tuple(found) if isinstance(found, list) else (found,)
  own = tokenizer.eos_token_id
  return (own, *(i for i in ids if i != own)) if own in ids else ids
