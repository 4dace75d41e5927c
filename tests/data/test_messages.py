"""Message lists render as transformers renders them, whoever wrote them."""

import types

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from jaxvlm.data.messages import in_words, read_messages
from jaxvlm.types import Example

HF_MODELS = {
  "qwen2_5_vl": modeling_qwen2_5_vl.Qwen2_5_VLModel,
  "qwen3_vl": modeling_qwen3_vl.Qwen3VLModel,
}


def noise(height, width):
  rng = np.random.default_rng(height * 1000 + width)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


A, B, C = noise(97, 61), noise(40, 200), noise(20, 20)


def text(words):
  return {"type": "text", "text": words}


def image(picture):
  return {"type": "image", "image": picture}


def user(*content):
  """A turn of parts, or of one text."""
  whole = isinstance(content[0], str) and len(content) == 1
  return {"role": "user", "content": content[0] if whole else list(content)}


def assistant(words):
  return {"role": "assistant", "content": words}


def system(words):
  return {"role": "system", "content": words}


def read(value, images=()):
  """What a source makes of a row; arrays stand for encoded pictures."""
  messages, images, problem = read_messages(
    value, images, read_picture=lambda item: item, name="rows.json[4]"
  )
  return Example(
    messages=messages, images=images, problem=problem, answer="1", name="row"
  )


def hf_positions(family, layout, ids, grids):
  model = types.SimpleNamespace(
    config=types.SimpleNamespace(
      vision_config=types.SimpleNamespace(
        spatial_merge_size=2, tokens_per_second=2
      )
    )
  )
  made = HF_MODELS[family]
  model.get_vision_position_ids = made.get_vision_position_ids.__get__(model)
  ids = torch.from_numpy(ids.astype(np.int64))[None]
  positions, _ = made.get_rope_index(
    model,
    ids,
    (ids == layout.image_token_id).int(),
    image_grid_thw=torch.from_numpy(grids) if len(grids) else None,
  )
  return positions[:, 0].numpy()


def as_pil(content):
  """transformers takes the last axis of an array for channels, or the first."""
  if isinstance(content, str):
    return content
  return [
    part | {"image": PIL.Image.fromarray(part["image"])}
    if part["type"] == "image"
    else part
    for part in content
  ]


CONVERSATIONS = {
  "text": [user("what is 2 + 3?")],
  "parts of text": [user(text("what "), text(""), text("is it?"))],
  "one picture": [user(image(A), text("what?"))],
  "a picture last": [user(text("what is\n"), image(A))],
  "pictures alone": [user(image(A), image(B))],
  "a system turn": [system("See."), user(text("1"), image(A), text("2"))],
  "a system turn of parts": [
    {"role": "system", "content": [text("Look "), text("well.")]},
    user(image(A)),
  ],
  "several turns": [
    user(image(A), text("and "), image(B), text("?")),
    assistant(" Two.\n"),
    user("Sure?"),
    {"role": "assistant", "content": [text("No, "), text("three.")]},
    user(text("And "), image(C), text(" 日本 a\u0301?")),
  ],
  "markers are literal in parts": [user(text("<image> <video>"), image(A))],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_transformers(
  family, family_checkpoint, make_processor, hf_processor, name
):
  given = CONVERSATIONS[name]
  processor = make_processor(family_checkpoint)
  example = read(given)
  for hf in (hf_processor, hf_processor.tokenizer):
    want = hf.apply_chat_template(
      given,
      chat_template=hf_processor.chat_template,
      add_generation_prompt=True,
      tokenize=False,
    )
    assert processor.text(example) == want

  want = hf_processor.apply_chat_template(
    [turn | {"content": as_pil(turn["content"])} for turn in given],
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="np",
  )
  question = processor.question(example, 0)
  np.testing.assert_array_equal(question.prompt_ids, want["input_ids"][0])
  assert processor.length(example) == len(question.prompt_ids)
  grids = want.get("image_grid_thw", np.zeros((0, 3), np.int64))
  np.testing.assert_array_equal(question.image_grid_thw, grids)
  if len(grids):
    np.testing.assert_array_equal(question.pixel_values, want["pixel_values"])
  np.testing.assert_array_equal(
    question.position_ids,
    hf_positions(family, processor.layout, question.prompt_ids, grids),
  )


def test_markers_and_parts_are_one_prompt(processor):
  marked = Example(problem="see <image> or<image>?", answer="1", images=(A, B))
  parts = [user(text("see "), image(A), text(" or"), image(B), text("?"))]
  in_turns = [user("see <image> or<image>?")]
  want = processor.question(marked, 0)
  for example in (read(parts), read(in_turns, (A, B))):
    assert example.problem == marked.problem
    assert processor.text(example) == processor.text(marked)
    got = processor.question(example, 0)
    np.testing.assert_array_equal(got.prompt_ids, want.prompt_ids)
    np.testing.assert_array_equal(got.pixel_values, want.pixel_values)


def test_parts_without_a_picture_take_the_rows_in_order():
  bare = {"type": "image"}
  filled_by_parquet = {"type": "image", "text": None, "image": None, "id": []}
  example = read(
    [
      user(bare, text("1"), image(C)),
      assistant("ok"),
      user("<image>2"),
      user(filled_by_parquet, {"type": "text", "text": "3", "image": None}),
    ],
    (A, B, A),
  )
  assert [len(p) for p in example.images] == [97, 20, 40, 97]
  assert example.problem == "<image>3"
  assert example.messages[-1]["content"] == [bare, text("3")]


def test_pictures_without_a_place_go_before_the_first_question():
  messages = [system("s"), user("first"), assistant("a"), user("second")]
  example = read(messages, (A, B))
  assert example.messages[1] == user(
    {"type": "image"}, {"type": "image"}, text("first")
  )
  assert [example.messages[i] for i in (0, 2, 3)] == [
    messages[i] for i in (0, 2, 3)
  ]
  assert read([user("one")], (A,)).problem == "<image>one"


@pytest.mark.parametrize(
  "part",
  [
    {"type": "image", "image": "a.png"},
    {"type": "image", "path": "a.png"},
    {"type": "image", "url": "a.png"},
    {"type": "image", "base64": "a.png"},
    {"type": "image_url", "image_url": "a.png"},
    {"type": "image_url", "image_url": {"url": "a.png"}},
    {"type": "image", "image": {"bytes": b"a", "path": None}},
  ],
)
def test_a_picture_may_stand_in_its_part_in_every_form(part):
  (picture,) = read([user(part, text("?"))]).images
  held = {"base64": "a.png"} if "base64" in part else "a.png"
  assert picture == part.get("image", held)
  assert read([user(part, text("?"))]).messages == (
    user({"type": "image"}, text("?")),
  )


def test_the_suffix_ends_the_last_turn_alone(checkpoint, make_processor):
  processor = make_processor(checkpoint, prompt_suffix=" Think.")
  bare = make_processor(checkpoint)
  for last, want in (
    (user("b"), user("b Think.")),
    (user(image(A), text("b")), user(image(A), text("b Think."))),
    (user(text("b"), image(A)), user(text("b"), image(A), text(" Think."))),
  ):
    turns = [user("a"), assistant("c")]
    example = read([*turns, last])
    before = repr(example.messages)
    assert processor.text(example) == bare.text(read([*turns, want]))
    assert repr(example.messages) == before


def test_a_rows_system_turn_goes_before_the_configs(
  family_checkpoint, make_processor
):
  processor = make_processor(family_checkpoint, system_prompt="Config.")
  own = processor.text(read([system("Row."), user("a")]))
  assert "Row." in own and "Config." not in own
  without = processor.text(read([user("a")]))
  assert without.startswith("<|im_start|>system\nConfig.<|im_end|>")


@pytest.mark.parametrize(
  ("messages", "images", "error"),
  [
    ([], (), "the message list is empty"),
    (["hi"], (), "message 1: is 'hi'; expected role and content"),
    ([{"content": "a"}], (), "message 1: the role is None"),
    ([{"role": "tool", "content": "a"}], (), "the role is 'tool'; expected us"),
    ([user("a"), system("b")], (), "message 2: the role is 'system'"),
    ([user("a"), assistant("b")], (), "last message is the assistant's; .*key"),
    ([{"role": "user", "content": None}], (), "the content is None"),
    ([{"role": "user", "content": []}], (), r"the content is \[\]"),
    ([user("a") | {"tool_calls": [1]}], (), "has 'tool_calls'.* role, content"),
    (
      [user({"type": "video", "video": "a.mp4"}, text("?"))],
      (),
      "is 'video'; ",
    ),
    ([user({"type": "audio"}, text("?"))], (), "is 'audio'; .* not supported"),
    ([user("<video>what?")], (), "message 1: the problem has a <video> marker"),
    ([user({"text": "a"}, text("?"))], (), r"a part is \{'text': 'a'\}"),
    ([user({"type": "text"}, text("?"))], (), r"a part is \{'type': 'text'\}"),
    ([user("a", "b")], (), "a part is 'a'"),
    ([user(text("a") | {"image": "a.png"})], (), "has 'image'.* type, text"),
    ([user(image(A) | {"max_pixels": 9}, text("?"))], (), "has 'max_pixels'"),
    (
      [user({"type": "image", "url": "a", "path": "b"}, text("?"))],
      (),
      "message 1: an image part holds 2 pictures",
    ),
    ([user({"type": "image"}, text("?"))], (), "1 image parts .* 0 pictures"),
    ([user({"type": "image"}, text("?"))], (A, B), "1 image parts .* 2 pict"),
    ([user(image(A), text("?"))], (B,), "0 image parts .* 1 pictures"),
    ([user(text("?"), text("!"))], (A,), "0 image parts .* 1 pictures"),
  ],
)
def test_messages_that_cannot_be_shown_are_refused(messages, images, error):
  with pytest.raises(ValueError, match=r"^rows\.json\[4\]: .*" + error):
    read(messages, images)


def test_what_the_template_does_not_take_is_refused(
  own_checkpoint, make_processor
):
  template = own_checkpoint / "chat_template.jinja"
  example = read([user(image(A), text("?")), assistant("a"), user("b")])
  template.write_text("{{ raise_exception('no turns') }}")
  with pytest.raises(ValueError, match=r"row: the chat template .*: no turns"):
    make_processor(own_checkpoint).length(example)
  template.write_text("a template that shows no pictures")
  with pytest.raises(ValueError, match=r"row: 0 picture tokens .* 1 pictures"):
    make_processor(own_checkpoint).length(example)


def test_an_example_made_elsewhere_is_checked_too(processor):
  example = Example(
    messages=(user({"type": "image"}, text("?")),),
    problem="?",
    answer="1",
    name="mine",
  )
  with pytest.raises(ValueError, match=r"mine: 1 image parts .* 0 pictures"):
    processor.length(example)


def test_a_text_takes_the_place_of_each_picture_and_is_taken_literally():
  example = Example(
    problem="see <image> and <image>?", answer="x", images=(A, B), name="row"
  )
  said = in_words(example, ["<image>", ""])
  assert said.problem == "see <image> and ?"
  assert said.messages == ({"role": "user", "content": "see <image> and ?"},)
  assert said.images == () and said.answer == "x"
  with pytest.raises(ValueError, match="row: 1 texts in place of 2 pictures"):
    in_words(example, ["one"])


def test_turns_without_pictures_stay_as_they_are():
  parts = [{"type": "image"}, {"type": "text", "text": ""}, text(" now")]
  messages = (
    {"role": "system", "content": " be brief\n"},
    {"role": "user", "content": parts},
    {"role": "assistant", "content": "ok "},
    {"role": "user", "content": [text("why?")]},
  )
  example = Example(problem="why?", answer="x", images=(A,), messages=messages)
  said = in_words(example, ["a cat,"])
  assert said.messages == (
    messages[0],
    {"role": "user", "content": "a cat, now"},
    *messages[2:],
  )
  assert said.problem == "why?"
