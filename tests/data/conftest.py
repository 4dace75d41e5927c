"""Hugging Face directories of both families, with a small tokenizer."""

import json
import pathlib
from typing import Any, NamedTuple

import pytest
import tokenizers
import transformers
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl
from transformers.models.qwen3_vl import processing_qwen3_vl

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


# What Qwen3-VL's does: no system turn of its own, text alone in other turns.
CHAT_TEMPLATE_3 = """\
{%- macro show(content, pictures) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' and pictures -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{{- show(message.content, message.role == 'user') }}
{{- '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""


class Family(NamedTuple):
  """What in the files of a published checkpoint differs between families."""

  template: str
  vision_config: dict[str, Any]
  picture_settings: dict[str, Any]
  hf_processor: type


FAMILIES = {
  "qwen2_5_vl": Family(
    CHAT_TEMPLATE,
    {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112},
    {
      "min_pixels": 3136,
      "max_pixels": 12845056,
      "image_mean": [0.48145466, 0.4578275, 0.40821073],
      "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    processing_qwen2_5_vl.Qwen2_5_VLProcessor,
  ),
  "qwen3_vl": Family(
    CHAT_TEMPLATE_3,
    {
      "patch_size": 16,
      "spatial_merge_size": 2,
      "num_position_embeddings": 2304,
    },
    {
      "size": {"shortest_edge": 65536, "longest_edge": 16777216},
      "patch_size": 16,
      "temporal_patch_size": 2,
      "merge_size": 2,
      "image_mean": [0.5, 0.5, 0.5],
      "image_std": [0.5, 0.5, 0.5],
    },
    processing_qwen3_vl.Qwen3VLProcessor,
  ),
}


def small_tokenizer() -> tokenizers.Tokenizer:
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
  return tokenizer


def write_checkpoint(
  directory: pathlib.Path,
  family: str = "qwen2_5_vl",
  tokenizer: tokenizers.Tokenizer | None = None,
) -> pathlib.Path:
  """All of a checkpoint but its weights."""
  tokenizer = tokenizer or small_tokenizer()
  made = FAMILIES[family]
  directory.mkdir(parents=True, exist_ok=True)
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
    model_type=family,
    image_token_id=tokenizer.token_to_id("<|image_pad|>"),
    vision_config=made.vision_config,
  )
  write_json(
    directory / "preprocessor_config.json",
    image_processor_type="Qwen2VLImageProcessor",
    **made.picture_settings,
  )
  (directory / "chat_template.jinja").write_text(made.template)
  return directory


def open_hf_processor(directory: pathlib.Path, family: str, tokenizer):
  """transformers' processor, its pictures by Pillow."""

  class WithoutVideo(FAMILIES[family].hf_processor):
    """Its video processor needs torchvision; pictures and text do not."""

    def check_argument_for_proper_class(self, name, argument):
      pass

  return WithoutVideo(
    image_processor=transformers.AutoImageProcessor.from_pretrained(
      directory, backend="pil"
    ),
    tokenizer=tokenizer,
    chat_template=FAMILIES[family].template,
  )


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


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
  return request.param


@pytest.fixture(scope="session")
def family_checkpoint(family, tmp_path_factory) -> pathlib.Path:
  return write_checkpoint(tmp_path_factory.mktemp(family) / family, family)


@pytest.fixture(scope="session")
def hf_processor(family, family_checkpoint):
  tokenizer = transformers.AutoTokenizer.from_pretrained(family_checkpoint)
  return open_hf_processor(family_checkpoint, family, tokenizer)


@pytest.fixture(scope="session", name="write_checkpoint")
def write_checkpoint_fixture():
  return write_checkpoint


@pytest.fixture(scope="session", name="open_hf_processor")
def open_hf_processor_fixture():
  return open_hf_processor
