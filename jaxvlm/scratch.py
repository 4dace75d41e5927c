"""A Hugging Face checkpoint made on the spot, for runs without a download.

True Qwen-VL architecture, a word-level tokenizer with Qwen's special tokens
and chat template, and a vision tower that has seen some pictures of `worlds`:
the counterpart of the pretrained tower that a published checkpoint brings.
"""

import json
import pathlib
import random
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import traverse_util
from jaxtyping import Array, Float, Int

from jaxvlm import models
from jaxvlm.data.processor import Processor
from jaxvlm.data.sources import worlds
from jaxvlm.data.vision_layout import pack_vision
from jaxvlm.learner import Optimizer
from jaxvlm.models import Network
from jaxvlm.models.base import Config
from jaxvlm.types import Example, Params, Vision

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

# Qwen's turns; no default system turn, as in Qwen3-VL. Newlines are no tokens.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def make_checkpoint(
  directory: pathlib.Path,
  *,
  seed: int,
  model_type: str,
  text_config: Mapping[str, Any],
  vision_config: Mapping[str, Any],
  tower_steps: int,
  tower_images: int,
  tower_learning_rate: float,
  progress: Callable[[int], object] = lambda updates: None,
) -> None:
  """Writes the directory, aside and then renamed.

  Args:
    directory: to be made.
    seed: of the weights and of the tower's pictures.
    model_type: the family, by config.json's name.
    text_config: sizes of the decoder, by config.json's names.
    vision_config: sizes of the tower, likewise.
    tower_steps: updates of the tower before it is handed over; 0: none.
    tower_images: pictures of each update.
    tower_learning_rate: of Muon at its peak.
    progress: called with the number of updates made since its last call.
  """
  with tempfile.TemporaryDirectory() as aside:
    source = pathlib.Path(aside)
    tokenizer = _write_tokenizer(source)
    network = Network(
      config=_config(tokenizer, model_type, text_config, vision_config),
      dtype="float32",
      param_dtype="float32",
      remat="none",
      attention="plain",
    )
    _write_settings(source, network.config, tokenizer)
    params = network.init(seed)
    if tower_steps:
      params = train_tower(
        network,
        params,
        source,
        seed=seed,
        steps=tower_steps,
        images=tower_images,
        learning_rate=tower_learning_rate,
        progress=progress,
      )
    models.save_hf(network, params, source, directory)


def _write_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer:
  """A word for a token, trained on what `worlds` says."""
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(unk_token="<|endoftext|>")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  trainer = tokenizers.trainers.WordLevelTrainer(
    special_tokens=list(SPECIAL_TOKENS), show_progress=False
  )
  words = [*worlds.words(), "system", "user", "assistant"]
  tokenizer.train_from_iterator(words, trainer)
  tokenizer.save(str(directory / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 32768,
    "clean_up_tokenization_spaces": False,
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
  }
  _write_json(directory / "tokenizer_config.json", settings)
  (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
  return tokenizer


def _config(
  tokenizer: tokenizers.Tokenizer,
  model_type: str,
  text_config: Mapping[str, Any],
  vision_config: Mapping[str, Any],
) -> Config:
  identity = tokenizer.token_to_id
  return models.find_family(model_type).Config.from_hf(
    {
      "model_type": model_type,
      "image_token_id": identity("<|image_pad|>"),
      "video_token_id": identity("<|video_pad|>"),
      "vision_start_token_id": identity("<|vision_start|>"),
      "vision_end_token_id": identity("<|vision_end|>"),
      "tie_word_embeddings": True,
      "text_config": {
        "vocab_size": tokenizer.get_vocab_size(),
        **text_config,
      },
      "vision_config": {
        "out_hidden_size": text_config["hidden_size"],
        **vision_config,
      },
    }
  )


def _write_settings(
  directory: pathlib.Path, config: Config, tokenizer: tokenizers.Tokenizer
) -> None:
  tower = config.vision_config
  end = tokenizer.token_to_id("<|im_end|>")
  padding = tokenizer.token_to_id("<|endoftext|>")
  raw = config.to_hf()
  # Where they are missing transformers takes those of the published vocabulary.
  raw["text_config"] |= {
    "bos_token_id": padding,
    "eos_token_id": end,
    "pad_token_id": padding,
  }
  _write_json(directory / "config.json", raw)
  _write_json(
    directory / "generation_config.json",
    {"eos_token_id": [end, padding], "pad_token_id": padding},
  )
  side = tower.patch_size * tower.spatial_merge_size
  _write_json(
    directory / "preprocessor_config.json",
    {
      "image_processor_type": "Qwen2VLImageProcessor",
      "min_pixels": side**2,
      "max_pixels": 256 * side**2,
      "patch_size": tower.patch_size,
      "temporal_patch_size": tower.temporal_patch_size,
      "merge_size": tower.spatial_merge_size,
      **models.find_family(config.model_type).PROCESSOR,
    },
  )


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(content, indent=2) + "\n")


def train_tower(
  network: Network,
  params: Params,
  directory: pathlib.Path,
  *,
  seed: int,
  steps: int,
  images: int,
  learning_rate: float,
  progress: Callable[[int], object] = lambda updates: None,
) -> Params:
  """Trains vision tower and merger to say what is in each cell.

  A linear probe reads thing and colour off each visual token, and is thrown
  away. Tiny decoders do not get past a plateau without this: a published
  checkpoint has it behind it.
  """
  processor = Processor.from_directory(
    directory,
    min_pixels=None,
    max_pixels=None,
    prompt_suffix="",
    system_prompt=None,
  )
  kinds = (len(worlds.THINGS), len(worlds.COLORS) + 1)
  width = network.config.text_config.hidden_size
  probe = 0.02 * jax.random.normal(jax.random.key(seed), (width, sum(kinds)))
  weights = {"visual": params["visual"], "probe": {"kernel": probe}}
  axes = {**network.axes(), "probe": {"kernel": ("embed", "vocab")}}
  optimizer = Optimizer(
    name="muon",
    b1=0.9,
    b2=0.99,
    weight_decay=0.01,
    clip_norm=1.0,
    compensated=False,
  ).make(traverse_util.flatten_dict({k: axes[k] for k in weights}, sep="/"))
  flat = traverse_util.flatten_dict(weights, sep="/")
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, steps // 5, steps, 0.1 * learning_rate
  )

  @jax.jit
  def update(flat: Any, moments: Any, batch: Any, rate: Array) -> Any:
    loss, grads = jax.value_and_grad(_probe_loss, argnums=1)(
      network, flat, *batch, kinds
    )
    change, moments = optimizer.update(grads, moments, flat)
    flat = jax.tree.map(lambda p, c: p + rate * c, flat, change)
    return flat, moments, loss

  moments = optimizer.init(flat)
  rng = random.Random(seed)
  for step in range(steps):
    batch = _tower_batch(processor, rng, images)
    flat, moments, _ = update(flat, moments, batch, schedule(step))
    progress(1)
  trained = traverse_util.unflatten_dict(flat, sep="/")
  return {**params, "visual": trained["visual"]}


def _probe_loss(
  network: Network,
  flat: Any,
  vision: Vision,
  labels: Int[Array, "M 2"],
  kinds: tuple[int, int],
) -> Float[Array, ""]:
  weights = traverse_util.unflatten_dict(flat, sep="/")
  tokens = network.encode(weights, vision).tokens.reshape(len(labels), -1)
  logits = tokens @ weights["probe"]["kernel"]
  things, colors = jnp.split(logits, [kinds[0]], axis=-1)
  losses = optax.softmax_cross_entropy_with_integer_labels
  return jnp.mean(losses(things, labels[:, 0]) + losses(colors, labels[:, 1]))


def _tower_batch(
  processor: Processor, rng: random.Random, images: int
) -> tuple[Vision, np.ndarray]:
  """Pictures, a lane each, and thing and colour of each visual token."""
  questions, labels = [], []
  for _ in range(images):
    scene = worlds.make_scene(rng)
    picture = worlds.draw(scene, "train", rng.getrandbits(32))
    example = Example(problem="<image>", answer="-", images=(picture,))
    questions.append(processor.question(example, 0))
    labels += [worlds.label(cell) for cell in scene]
  vision = pack_vision([[q] for q in questions], layout=processor.layout)
  assert isinstance(vision, Vision)
  return vision, np.array(labels, np.int32)
