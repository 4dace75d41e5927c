"""Prompts equal those of transformers' processor; bad rows are named."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from jaxvlm.data import vision_layout
from jaxvlm.data.pictures import smart_resize
from jaxvlm.models import find_family
from jaxvlm.types import Example
from tests import dense


def noise(height, width):
  rng = np.random.default_rng(height * 1000 + width)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_example(problem="<image>what?", *, images=None, **changes):
  images = (noise(56, 84),) if images is None else images
  fields = {"answer": "3", "name": "rows.json[4]"} | changes
  return Example(problem=problem, images=images, **fields)


def run_hf(hf_processor, content, pictures, system=None):
  images = iter(PIL.Image.fromarray(p) for p in pictures)
  parts = [
    {"type": "image", "image": next(images)}
    if part is None
    else {"type": "text", "text": part}
    for part in content
  ]
  messages = [{"role": "user", "content": parts}]
  if system is not None:
    system = [{"type": "text", "text": system}]
    messages.insert(0, {"role": "system", "content": system})
  return hf_processor.apply_chat_template(
    messages,
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="np",
  )


@pytest.mark.parametrize(
  ("problem", "content", "sizes"),
  [
    ("<image>what?", [None, "what?"], [(97, 61)]),
    ("see <image> and<image>", ["see ", None, " and", None], [(30, 90)] * 2),
    ("<image>\n<image>", [None, "\n", None], [(56, 56), (120, 200)]),
    ("what is 2 + 3?", ["what is 2 + 3?"], []),
    (" a\u0301 日本 <b>\n", [" a\u0301 日本 <b>\n"], []),
  ],
)
@pytest.mark.parametrize("system", [None, "You see."])
def test_prompts_equal_transformers(
  family_checkpoint,
  make_processor,
  hf_processor,
  problem,
  content,
  sizes,
  system,
):
  suffix = "" if problem.endswith("<image>") else " Think."
  content = [*content[:-1], content[-1] + suffix] if suffix else content
  pictures = tuple(noise(*size) for size in sizes)
  processor = make_processor(
    family_checkpoint, prompt_suffix=suffix, system_prompt=system
  )
  question = processor.question(make_example(problem, images=pictures), 7)
  want = run_hf(hf_processor, content, pictures, system)
  np.testing.assert_array_equal(question.prompt_ids, want["input_ids"][0])
  if sizes:
    np.testing.assert_array_equal(question.pixel_values, want["pixel_values"])
    np.testing.assert_array_equal(
      question.image_grid_thw, want["image_grid_thw"]
    )
  else:
    assert question.pixel_values.shape == (0, processor.pictures.patch_width)
    assert question.image_grid_thw.shape == (0, 3)
  assert question.example.picture_sizes == tuple(sizes)
  assert processor.measure(question.example) == (
    len(question.prompt_ids),
    len(question.pixel_values),
  )
  assert question.position_ids.shape == (3, len(question.prompt_ids))
  assert question.question_id == 7
  assert question.response_ids is None


def test_boxes_are_said_in_pixels_after_the_resize_or_in_thousandths(
  family, family_checkpoint, make_processor
):
  processor = dataclasses.replace(
    make_processor(family_checkpoint), box_side=find_family(family).BOX_SIDE
  )
  sizes = [(97, 61), (640, 64)]
  pictures = tuple(noise(*size) for size in sizes)
  row = make_example("<image><image>?", images=pictures)
  question = processor.question(row, 0)
  assert question.example.picture_sizes == ((97, 61), (640, 64))
  resized = [smart_resize(*size, processor.pictures) for size in sizes]
  assert resized != sizes
  assert (
    question.example.box_sizes
    == {
      "qwen2_5_vl": tuple(resized),
      "qwen3_vl": ((1000, 1000),) * 2,
    }[family]
  )
  assert (row.picture_sizes, row.box_sizes) == ((), ())


def test_a_batch_mixes_text_with_one_and_several_pictures(
  family_checkpoint, make_processor
):
  processor = make_processor(family_checkpoint)
  sizes = [[(60, 90)], [], [(300, 200), (20, 20), (64, 640)]]
  examples = [
    make_example(
      "<image>".join("abcd"[: len(s) + 1]), images=tuple(noise(*x) for x in s)
    )
    for s in sizes
  ]
  questions = [processor.question(e, i) for i, e in enumerate(examples)]
  batch = dense.collate(questions, lanes=1, layout=processor.layout)
  for row, question in enumerate(questions):
    length = len(question.prompt_ids)
    assert batch.prompt_mask[row].sum() == length
    np.testing.assert_array_equal(
      batch.position_ids[:, row, :length], question.position_ids
    )
  # Visual tokens stand in the lane question after question, each where the
  # windows put it.
  shown = batch.vision_index[batch.vision_index >= 0]
  grids = np.concatenate([q.image_grid_thw for q in questions])
  assert len(grids) == 4
  places = vision_layout.token_places(grids, processor.layout)
  np.testing.assert_array_equal(shown, places)
  assert (batch.vision_index[1] == -1).all()
  pixels = np.concatenate([q.pixel_values for q in questions])
  np.testing.assert_array_equal(
    batch.vision.pixel_values[0, : len(pixels)].reshape(-1, 4, pixels.shape[1])[
      places
    ],
    pixels.reshape(-1, 4, pixels.shape[1]),
  )


def test_responses_end_in_the_end_of_turn(processor, hf_tokenizer):
  example = make_example(response="<answer> 3 </answer>")
  ids = processor.question(example, 0).response_ids
  assert ids[-1] == hf_tokenizer.convert_tokens_to_ids("<|im_end|>")
  assert processor.decode(ids) == "<answer> 3 </answer>"
  assert processor.response_length(example) == len(ids)
  assert processor.response_length(make_example()) == 0


def test_every_end_of_the_checkpoint_stops(own_checkpoint, make_processor):
  end, text_end = 278, 276  # <|im_end|>, <|endoftext|>
  assert make_processor(own_checkpoint).eos_ids == (end,)
  assert make_processor(own_checkpoint).pad_id == text_end
  config = json.loads((own_checkpoint / "config.json").read_text())
  config["text_config"] = {"eos_token_id": [text_end]}
  (own_checkpoint / "config.json").write_text(json.dumps(config))
  assert make_processor(own_checkpoint).eos_ids == (text_end,)
  generation = own_checkpoint / "generation_config.json"
  generation.write_text(json.dumps({"eos_token_id": [text_end, end]}))
  # The tokenizer's own goes first: written responses end in it.
  assert make_processor(own_checkpoint).eos_ids == (end, text_end)


def test_vision_tokens_and_rows_without_a_token_are_banned(
  processor, hf_tokenizer
):
  banned = processor.banned_ids(300)
  names = hf_tokenizer.convert_ids_to_tokens(
    np.flatnonzero(banned[: len(hf_tokenizer)]).tolist()
  )
  assert sorted(names) == [
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|vision_start|>",
  ]
  assert banned[len(hf_tokenizer) :].all()
  with pytest.raises(ValueError, match="vocab_size is 200"):
    processor.banned_ids(200)


def test_the_processors_template_goes_before_the_tokenizers(
  own_checkpoint, make_processor
):
  example = make_example("hi", images=())
  file = own_checkpoint / "chat_template.jinja"
  template = file.read_text()
  file.unlink()
  with pytest.raises(ValueError, match="no chat template"):
    make_processor(own_checkpoint)
  config = own_checkpoint / "tokenizer_config.json"
  content = json.loads(config.read_text())
  config.write_text(json.dumps(content | {"chat_template": "tokenizer's"}))
  assert make_processor(own_checkpoint).text(example) == "tokenizer's"
  legacy = own_checkpoint / "chat_template.json"
  legacy.write_text(json.dumps({"chat_template": "legacy"}))
  assert make_processor(own_checkpoint).text(example) == "legacy"
  file.write_text(template)
  assert "user\nhi<|im_end|>" in make_processor(own_checkpoint).text(example)


@pytest.mark.parametrize(
  ("example", "message"),
  [
    (make_example("what?"), r"\[4\]: 0 <image> markers .* 1 pictures"),
    (make_example("<image><image>"), r"\[4\]: 2 <image> markers .* 1 pict"),
    (make_example(images=()), r"\[4\]: 1 <image> markers .* 0 pictures"),
    (make_example("<video>what?"), r"\[4\]: the problem has a <video> marker"),
    (make_example("<image><|image_pad|>"), r"\[4\]: 2 picture tokens"),
    (make_example("<image><|video_pad|>"), r"\[4\]: the prompt has <\|video"),
    (make_example(images=(b"no",)), r"\[4\]: picture 1: cannot read"),
    (
      make_example(images=("no.png",)),
      r"\[4\]: picture 1: .* no such file: no",
    ),
    (make_example(images=(noise(1, 300),)), r"\[4\]: picture 1: .* too thin"),
  ],
)
def test_a_bad_row_is_named(processor, example, message):
  for prepare in (
    processor.length,
    lambda example: processor.question(example, 0),
  ):
    with pytest.raises(ValueError, match=r"rows\.json" + message):
      prepare(example)


def test_a_directory_that_does_not_fit_together_is_refused(
  own_checkpoint, make_processor, tmp_path
):
  with pytest.raises(ValueError, match=r"no config\.json"):
    make_processor(tmp_path)
  file = own_checkpoint / "config.json"
  config = json.loads(file.read_text())
  file.write_text(json.dumps(config | {"image_token_id": 5}))
  with pytest.raises(ValueError, match="image_token_id 5 but the tokenizer"):
    make_processor(own_checkpoint)
  file.write_text(json.dumps(config | {"vision_config": {"patch_size": 16}}))
  with pytest.raises(ValueError, match=r"\(14, 2\) in the picture settings"):
    make_processor(own_checkpoint)
  file.write_text("{")
  with pytest.raises(ValueError, match=r"config\.json: not JSON"):
    make_processor(own_checkpoint)
  file.write_text(json.dumps(config))
  (own_checkpoint / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="no usable tokenizer"):
    make_processor(own_checkpoint)
  (own_checkpoint / "tokenizer.json").unlink()
  with pytest.raises(ValueError, match="tokenizer files are missing or of"):
    make_processor(own_checkpoint)


def test_neither_torch_nor_torchvision_is_needed(checkpoint):
  program = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
import numpy as np
from jaxvlm.data import vision_layout
from jaxvlm.data.processor import Processor
from jaxvlm.types import Example
processor = Processor.from_directory(
  {str(checkpoint)!r}, min_pixels=None, max_pixels=None, prompt_suffix="",
  system_prompt=None)
rows = [Example(
  problem="<image>?", answer="1", images=(np.zeros((56, 56, 3), np.uint8),))]
questions = [processor.question(rows[0], 0)]
vision = vision_layout.pack_vision([questions], layout=processor.layout)
print(vision.pixel_values.shape)
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout == "(1, 16, 1176)\n"
