"""Conversations: message lists as TRL, transformers and verl write them.

A message is {role, content}. Its content is text, in which <image> stands for
a picture, or a list of parts: {type: text, text} and {type: image}. Text in a
part is literal, as in transformers.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxvlm.types import Example, Picture

MARKER = "<image>"
_MARKERS = re.compile(r"<image>|<video>")
_ROLES = ("system", "user", "assistant")
_IMAGE_TYPES = ("image", "image_url")
# Where an image part may have its picture.
_PICTURE_KEYS = ("image", "path", "url", "base64", "image_url")

Message = dict[str, Any]
Content = str | list[dict[str, str]]


class Conversation(NamedTuple):
  """The fields of an `Example` that a message list fills."""

  messages: tuple[Message, ...]  # what a chat template takes, pictures left out
  images: tuple[Picture, ...]  # one for each image part, in order
  problem: str  # the last turn, with a marker for each picture


def split_markers(text: str, name: str) -> Content:
  """The content of a turn: text, or parts where it has markers.

  Raises:
    ValueError: it has a <video> marker; begins with `name`.
  """
  markers = _MARKERS.findall(text)
  if "<video>" in markers:
    raise ValueError(
      f"{name}: the problem has a <video> marker; only pictures are supported."
    )
  if not markers:
    return text
  parts: list[dict[str, str]] = []
  for i, piece in enumerate(text.split(MARKER)):
    if i:
      parts.append({"type": "image"})
    if piece:
      parts.append({"type": "text", "text": piece})
  return parts


def turns(example: Example) -> list[Message]:
  """A row's conversation; a problem alone is one turn of the user's.

  Raises:
    ValueError: as `split_markers`.
  """
  if example.messages:
    return list(example.messages)
  content = split_markers(example.problem, example.name)
  return [{"role": "user", "content": content}]


def in_words(example: Example, texts: Sequence[str]) -> Example:
  """The row with a text in place of each picture; "": nothing there.

  Raises:
    ValueError: as `split_markers`, or texts that are not one a picture.
  """
  messages = turns(example)
  if (count := count_images(messages)) != len(texts):
    raise ValueError(
      f"{example.name}: {len(texts)} texts in place of {count} pictures."
    )
  following = iter(texts)
  for i, message in enumerate(messages):
    if count_images([message]):
      said = [
        part["text"] if part["type"] == "text" else next(following)
        for part in message["content"]
      ]
      # Literal, as strings are: a text may hold what looks like a marker.
      messages[i] = message | {"content": "".join(said).strip()}
  return dataclasses.replace(
    example,
    problem=_as_text(messages[-1]["content"]),
    messages=tuple(messages),
    images=(),
  )


def count_images(messages: Sequence[Message]) -> int:
  """Image parts of all turns."""
  return sum(
    part["type"] == "image"
    for message in messages
    if not isinstance(message["content"], str)
    for part in message["content"]
  )


def with_suffix(message: Message, suffix: str) -> Message:
  """The message with this text put after its content."""
  content = message["content"]
  if not suffix:
    return message
  if isinstance(content, str):
    return message | {"content": content + suffix}
  return message | {"content": [*content, {"type": "text", "text": suffix}]}


def read_messages(
  value: Sequence[Any],
  images: tuple[Picture, ...],
  *,
  read_picture: Callable[[Any], Picture],
  name: str,
  unmarked: bool = True,
) -> Conversation:
  """Reads a row's message list.

  Args:
    value: the messages: an optional system turn, then user and assistant
      turns; the last is the user's. Image parts hold their picture (image,
      path, url, base64 or image_url) or stand for the next of `images`.
    images: the row's pictures. Without any image part or marker they are put
      before the first user turn that is plain text, as TRL does.
    read_picture: reads what an image part holds.
    name: of the row.
    unmarked: False: pictures without any image part or marker are refused.

  Raises:
    ValueError: another role, type or key, a video, or pictures that are not
      as many as image parts ask for; begins with `name`.
  """
  if not value:
    raise ValueError(f"{name}: the message list is empty.")
  messages: list[Message] = []
  found: list[Picture | None] = []  # None: the next of images
  for i, message in enumerate(value):
    made, pictures = _message(message, i, f"{name}: message {i + 1}")
    messages.append(made)
    found += [None if p is None else read_picture(p) for p in pictures]
  if messages[-1]["role"] != "user":
    raise ValueError(
      f"{name}: the last message is the {messages[-1]['role']}'s; expected the "
      "user's. A written response belongs in a column of its own "
      "(response_key)."
    )
  if images and not found and unmarked:
    messages = _pictures_first(messages, len(images))
    found = [None] * count_images(messages)
  asked = sum(picture is None for picture in found)
  if asked != len(images):
    raise ValueError(
      f"{name}: {asked} image parts without a picture of their own but "
      f"{len(images)} pictures beside the messages; each needs one."
    )
  following = iter(images)
  return Conversation(
    tuple(messages),
    tuple(next(following) if p is None else p for p in found),
    _as_text(messages[-1]["content"]),
  )


def split_answered(value: Sequence[Any]) -> tuple[list[Any], str | None]:
  """A conversation without the assistant's last turn, and what that says.

  Turns may also be {from, value}, as LLaVA and VLM-R1 write them.
  """
  turns = [_renamed(turn) for turn in value]
  last = turns[-1] if turns else None
  if not isinstance(last, Mapping) or last.get("role") != "assistant":
    return turns, None
  said = last.get("content")
  return turns[:-1], said if isinstance(said, str) else None


def _renamed(turn: Any) -> Any:
  if not isinstance(turn, Mapping) or "from" not in turn:
    return turn
  role = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
  return {"role": role, "content": turn.get("value")}


def encode_messages(messages: Sequence[Message]) -> str:
  """A conversation as text; "": there is none."""
  return json.dumps(list(messages)) if messages else ""


def decode_messages(text: str) -> list[Message]:
  return json.loads(text)


def _message(message: Any, i: int, name: str) -> tuple[Message, list[Any]]:
  """A message as templates take it, and what its image parts hold."""
  if not isinstance(message, Mapping):
    raise ValueError(f"{name}: is {message!r}; expected role and content.")
  _refuse_keys(message, ("role", "content"), name)
  role, content = message.get("role"), message.get("content")
  if role not in _ROLES or (role == "system" and i):
    raise ValueError(
      f"{name}: the role is {role!r}; expected user or assistant, and system "
      "in the first message alone."
    )
  if isinstance(content, str):
    content = split_markers(content, name)
    pictures = [None] * count_images([{"content": content}])
    return {"role": role, "content": content}, pictures
  if not isinstance(content, list) or not content:
    raise ValueError(
      f"{name}: the content is {content!r}; expected text or a list of parts."
    )
  parts, pictures = [], []
  for part in content:
    made, picture = _part(part, name)
    parts.append(made)
    if made["type"] == "image":
      pictures.append(picture)
  return {"role": role, "content": parts}, pictures


def _part(part: Any, name: str) -> tuple[dict[str, str], Any]:
  """A part as templates take it, and the picture it holds, if it does."""
  kind = part.get("type") if isinstance(part, Mapping) else None
  if kind == "text" and isinstance(part.get("text"), str):
    _refuse_keys(part, ("type", "text"), name)
    return {"type": "text", "text": part["text"]}, None
  if kind not in _IMAGE_TYPES:
    shown = part if kind in (None, "text") else kind
    raise ValueError(
      f"{name}: a part is {shown!r}; expected {{type: text, text}} or "
      "{type: image}; video and audio are not supported."
    )
  _refuse_keys(part, ("type", *_PICTURE_KEYS), name)
  held = [part[key] for key in _PICTURE_KEYS if part.get(key) is not None]
  if len(held) > 1:
    raise ValueError(f"{name}: an image part holds {len(held)} pictures.")
  picture = held[0] if held else None
  if picture is not None and part.get("base64") is not None:
    picture = {"base64": picture}  # which is no path
  if isinstance(picture, Mapping) and "url" in picture:
    picture = picture["url"]
  return {"type": "image"}, picture


def _refuse_keys(
  given: Mapping[str, Any], known: Sequence[str], name: str
) -> None:
  # Parquet fills the keys of other parts with None. Any other key might change
  # what a template renders or how large a picture is shown.
  for key, value in given.items():
    absent = value is None or (isinstance(value, str | list) and not value)
    if key not in known and not absent:
      raise ValueError(
        f"{name}: has {key!r}, which is not supported; expected "
        f"{', '.join(known)}."
      )


def _pictures_first(messages: list[Message], count: int) -> list[Message]:
  for i, message in enumerate(messages):
    content = message["content"]
    if message["role"] == "user" and isinstance(content, str):
      parts = [{"type": "image"} for _ in range(count)]
      parts.append({"type": "text", "text": content})
      return [*messages[:i], message | {"content": parts}, *messages[i + 1 :]]
  return messages


def _as_text(content: Content) -> str:
  if isinstance(content, str):
    return content
  return "".join(part.get("text", MARKER) for part in content)
