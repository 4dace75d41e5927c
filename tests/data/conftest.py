"""A small tokenizer with Qwen's special tokens, in a Hugging Face directory."""

import json
import pathlib

import pytest
import tokenizers
import transformers

from jaxvlm.data.processor import Processor

SPECIAL_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)

# What the template of Qwen2.5-VL does with text and pictures.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif -%}
<|im_start|>{{ message['role'] }}\n
{%- if message['content'] is string -%}
{{ '\n' + message['content'] }}
{%- else -%}
{{ '\n' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>\n{% endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""


def write_checkpoint(directory: pathlib.Path) -> pathlib.Path:
  directory.mkdir(parents=True, exist_ok=True)
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.normalizer = tokenizers.normalizers.NFC()
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=sorted(byte_level.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(["you are a helpful assistant"] * 3, trainer)
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  tokenizer.save(str(directory / "tokenizer.json"))
  write_json(
    directory / "tokenizer_config.json",
    tokenizer_class="Qwen2Tokenizer",
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    model_max_length=32768,
  )
  write_json(
    directory / "config.json",
    model_type="qwen2_5_vl",
    image_token_id=tokenizer.token_to_id("<|image_pad|>"),
    vision_config={"patch_size": 14, "spatial_merge_size": 2},
  )
  write_json(
    directory / "preprocessor_config.json",
    image_processor_type="Qwen2VLImageProcessor",
    min_pixels=3136,
    max_pixels=12845056,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
  )
  (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
  return directory


def write_json(file: pathlib.Path, **content) -> None:
  file.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  return write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint")


@pytest.fixture
def own_checkpoint(tmp_path) -> pathlib.Path:
  """A copy that a test may spoil."""
  return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def make_processor():
  """Opens a directory, all settings the checkpoint's unless given."""

  def make(directory, **changes) -> Processor:
    settings = {
      "min_pixels": None,
      "max_pixels": None,
      "prompt_suffix": "",
      "system_prompt": None,
    }
    return Processor.from_directory(directory, **(settings | changes))

  return make


@pytest.fixture(scope="session")
def processor(checkpoint, make_processor) -> Processor:
  return make_processor(checkpoint)


@pytest.fixture(scope="session")
def hf_tokenizer(checkpoint):
  return transformers.AutoTokenizer.from_pretrained(checkpoint)
