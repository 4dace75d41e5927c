"""The checkpoint made on the spot, as transformers and as we read it."""

import json
import logging
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import (
  AutoConfig,
  AutoImageProcessor,
  AutoModelForImageTextToText,
  AutoTokenizer,
)

from jaxvlm import models, scratch
from jaxvlm.data.processor import Processor
from jaxvlm.data.sources import worlds
from jaxvlm.data.vision_layout import Layout
from jaxvlm.types import Example
from tests.dense import collate

TEXT = {
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 48,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10.0,
  "max_position_embeddings": 128,
  "initializer_range": 0.1,
}
VISION = {
  "depth": 2,
  "hidden_size": 32,
  "num_heads": 4,
  "intermediate_size": 48,
  "temporal_patch_size": 2,
  "spatial_merge_size": 2,
  "initializer_range": 0.1,
}
SIZES = {
  "qwen2_5_vl": {
    "text_config": TEXT
    | {"rope_scaling": {"type": "mrope", "mrope_section": (2, 1, 1)}},
    "vision_config": VISION
    | {
      "patch_size": 14,
      "window_size": 28,
      "fullatt_block_indexes": (1,),
      "tokens_per_second": 2,
    },
  },
  "qwen3_vl": {
    "text_config": TEXT
    | {
      "head_dim": 12,
      "rope_scaling": {"type": "mrope", "mrope_section": (2, 2, 2)},
    },
    "vision_config": VISION
    | {
      "patch_size": 16,
      "num_position_embeddings": 9,
      "deepstack_visual_indexes": (0,),
    },
  },
}
TOWER = {"tower_steps": 2, "tower_images": 4, "tower_learning_rate": 1e-2}


@pytest.fixture(scope="module", params=SIZES)
def family(request):
  return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory):
  path = tmp_path_factory.mktemp("made") / "checkpoint"
  make(path, family)
  return path


def make(path, family):
  scratch.make_checkpoint(
    path, seed=0, model_type=family, **SIZES[family], **TOWER
  )


@pytest.fixture(scope="module")
def network(directory):
  return models.load_network(
    directory,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    attention="plain",
  )


@pytest.fixture(scope="module")
def params(network, directory):
  return models.load_params(network, directory)


@pytest.fixture(scope="module")
def processor(directory):
  return Processor.from_directory(
    directory,
    min_pixels=None,
    max_pixels=None,
    prompt_suffix="",
    system_prompt=None,
  )


@pytest.fixture(scope="module")
def questions(processor):
  """With a picture, and without."""
  picture = worlds.draw(worlds.make_scene(random.Random(0)), "train", 0)
  examples = [
    Example(
      problem="<image>color at a1 ?",
      answer="red",
      images=(picture,),
      response="<answer> red </answer>",
    ),
    Example(problem="calc 1 + 2 + 3 - 4 ?", answer="2"),
  ]
  return [processor.question(e, i) for i, e in enumerate(examples)]


def test_transformers_reads_every_part_without_a_warning(
  family, directory, caplog
):
  logger = transformers.utils.logging.get_logger("transformers")
  logger.addHandler(caplog.handler)
  try:
    with caplog.at_level(logging.WARNING, logger="transformers"):
      config = AutoConfig.from_pretrained(directory)
      tokenizer = AutoTokenizer.from_pretrained(directory)
      model = AutoModelForImageTextToText.from_pretrained(directory)
  finally:
    logger.removeHandler(caplog.handler)
  assert not caplog.records
  assert config.model_type == family
  assert config.text_config.vocab_size == len(tokenizer)
  assert model.config.tie_word_embeddings
  assert model.generation_config.eos_token_id == [
    tokenizer.convert_tokens_to_ids("<|im_end|>"),
    tokenizer.convert_tokens_to_ids("<|endoftext|>"),
  ]


def test_logits_equal_transformers(network, params, questions, directory):
  model = AutoModelForImageTextToText.from_pretrained(directory).eval()
  for question in questions:
    ids = torch.tensor(question.prompt_ids[None]).long()
    pictures = {}
    if len(question.pixel_values):
      image = network.config.image_token_id
      pictures = {
        "pixel_values": torch.tensor(question.pixel_values),
        "image_grid_thw": torch.tensor(question.image_grid_thw).long(),
        "mm_token_type_ids": (ids == image).long(),
      }
    with torch.no_grad():
      expected = model(input_ids=ids, **pictures).logits[0].numpy()
    np.testing.assert_allclose(
      logits(network, params, question), expected, atol=2e-4
    )


def logits(network, params, question):
  layout = Layout.from_config(network.config.to_hf())
  prompts = jax.tree.map(
    jnp.asarray, collate([question], lanes=1, layout=layout)
  )
  features = None
  if prompts.vision is not None:
    features = network.encode(params, prompts.vision)
  embeds = network.embed(
    params, prompts.prompt_ids, prompts.vision_index, features
  )
  branches = jnp.where(prompts.prompt_mask, 0, -1)
  hidden = network.forward(
    params, embeds, prompts.position_ids, branches, branches
  )
  return (hidden @ network.head(params))[0, : len(question.prompt_ids)]


def test_a_turn_is_written_as_qwen_writes_it(processor, questions, directory):
  tokenizer = AutoTokenizer.from_pretrained(directory)
  assert tokenizer.convert_ids_to_tokens(questions[0].prompt_ids.tolist()) == [
    "<|im_start|>",
    "user",
    "<|vision_start|>",
    *["<|image_pad|>"] * 4,
    "<|vision_end|>",
    "color",
    "at",
    "a1",
    "?",
    "<|im_end|>",
    "<|im_start|>",
    "assistant",
  ]
  assert tokenizer.convert_ids_to_tokens(
    questions[0].response_ids.tolist()
  ) == ["<answer>", "red", "</answer>", "<|im_end|>"]
  ids = questions[0].response_ids
  assert processor.decode(ids) == "<answer> red </answer>"


def test_special_tokens_come_first_and_no_word_is_unknown(directory):
  tokenizer = AutoTokenizer.from_pretrained(directory)
  specials = list(scratch.SPECIAL_TOKENS)
  assert tokenizer.convert_ids_to_tokens(range(len(specials))) == specials
  for word in (*worlds.words(), "user", "assistant", "system"):
    assert len(tokenizer.encode(word)) == 1
    assert tokenizer.decode(tokenizer.encode(word)) == word


def test_the_config_reads_back(family, directory, network):
  raw = json.loads((directory / "config.json").read_text())
  assert models.find_family(family).Config.from_hf(raw) == network.config
  asked = SIZES[family]["text_config"]["rope_scaling"]["mrope_section"]
  found = raw["text_config"]["rope_parameters"]["mrope_section"]
  assert found == list(asked)


def test_the_image_processor_cuts_what_we_cut(directory, processor):
  picture = worlds.draw(worlds.make_scene(random.Random(1)), "train", 1)
  loaded = AutoImageProcessor.from_pretrained(directory, backend="pil")
  expected = loaded(images=[picture], return_tensors="np")
  example = Example(
    problem="<image>where red ?", answer="a1", images=(picture,)
  )
  ours = processor.question(example, 0)
  np.testing.assert_array_equal(ours.image_grid_thw, expected["image_grid_thw"])
  np.testing.assert_allclose(
    ours.pixel_values, expected["pixel_values"], atol=1e-6
  )


def test_the_same_seed_makes_the_same_weights(
  family, directory, network, tmp_path
):
  make(tmp_path / "again", family)
  one = models.load_params(network, directory)
  again = models.load_params(network, tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, one, again)


def test_tower_training_changes_the_tower_alone(network, directory, params):
  start = network.init(0)
  jax.tree.map(
    np.testing.assert_array_equal,
    params["language_model"],
    start["language_model"],
  )
  moved = jax.tree.map(
    lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))),
    params["visual"],
    start["visual"],
  )
  assert any(jax.tree.leaves(moved))


def test_a_trained_tower_tells_things_apart(
  network, directory, processor, params
):
  """Ridge regression names the things in its tokens better than before."""
  updates = []
  trained = scratch.train_tower(
    network,
    params,
    directory,
    seed=0,
    steps=80,
    images=32,
    learning_rate=1e-2,
    progress=updates.append,
  )
  assert updates == 80 * [1]
  batches = [
    scratch._tower_batch(processor, random.Random(seed), 64) for seed in (8, 9)
  ]

  encode = jax.jit(network.encode)

  def error(weights):
    (x, y), (held_x, held_y) = [
      (
        np.asarray(encode(weights, vision).tokens).reshape(len(labels), -1),
        np.eye(len(worlds.THINGS))[labels[:, 0]],
      )
      for vision, labels in batches
    ]
    solution = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y)
    return np.mean((held_x @ solution).argmax(1) != held_y.argmax(1))

  assert error(trained) < error(network.init(0)) - 0.1
