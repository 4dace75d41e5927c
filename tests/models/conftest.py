"""A tiny random checkpoint that transformers wrote, and a batch to show it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
  Qwen2_5_VLConfig,
  Qwen2_5_VLForConditionalGeneration,
)

from jaxvlm import models
from jaxvlm.data import vision_layout
from jaxvlm.types import Example, Question

IMAGE = 155


def make_config(**changes):
  """Tiny, but with every part of the architecture; 112 pixels a window."""
  return Qwen2_5_VLConfig(
    **{
      "text_config": {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
          "rope_type": "default",
          "rope_theta": 1e2,
          "mrope_section": [2, 3, 3],
        },
      },
      "vision_config": {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_heads": 4,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "tokens_per_second": 2,
      },
      "image_token_id": IMAGE,
      "video_token_id": 156,
      "vision_start_token_id": 152,
      "vision_end_token_id": 153,
      **changes,
    }
  )


def make_torch(config):
  """A model whose every weight, also bias and norm, matters."""
  torch.manual_seed(0)
  model = Qwen2_5_VLForConditionalGeneration(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.15 * torch.randn_like(weight))
  return model


@pytest.fixture(scope="session")
def config():
  return make_config()


@pytest.fixture(scope="session")
def hf(config):
  return make_torch(config)


@pytest.fixture(scope="session")
def directory(hf, tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  hf.save_pretrained(path)
  return path


@pytest.fixture(scope="session")
def network(directory):
  return models.load_network(
    directory, dtype="float32", param_dtype="float32", remat="none"
  )


@pytest.fixture(scope="session")
def params(network, directory):
  return models.load_params(network, directory)


@pytest.fixture(scope="session")
def layout(config):
  return vision_layout.Layout.from_config(config.to_dict())


def make_question(ids, grids, layout, seed=0):
  """`ids` with each "image" in place of the image tokens of one grid."""
  grids = np.array(grids, np.int32).reshape(-1, 3)
  counts = iter(grids.prod(axis=1) // 4)
  prompt_ids = np.concatenate(
    [
      [152, *[IMAGE] * next(counts), 153] if part == "image" else part
      for part in ids
    ]
  ).astype(np.int32)
  patches = int(grids.prod(axis=1).sum())
  random = np.random.default_rng(seed)
  return Question(
    question_id=seed,
    example=Example(problem="", answer=""),
    prompt_ids=prompt_ids,
    position_ids=vision_layout.mrope_positions(prompt_ids, grids, layout),
    pixel_values=random.normal(size=(patches, 1176)).astype(np.float32),
    image_grid_thw=grids,
  )


@pytest.fixture(scope="session")
def questions(layout):
  """Two pictures of unlike sizes, one small, none, one with cut windows."""
  return [
    make_question(
      [[5, 6], "image", [7], "image", [8, 9, 10]],
      [(1, 10, 16), (1, 6, 4)],
      layout,
      1,
    ),
    make_question([[11], "image", [12, 13]], [(1, 4, 4)], layout, 2),
    make_question([[20, 21, 22, 23, 24, 25, 26]], [], layout, 3),
    make_question([[30], "image", [31]], [(1, 8, 12)], layout, 4),
  ]


@pytest.fixture(scope="session")
def prompts(questions, layout):
  """The batch in two lanes; on the device, as the learner sees it."""
  return jax.tree.map(
    jnp.asarray, vision_layout.collate(questions, lanes=2, layout=layout)
  )


@pytest.fixture(scope="session")
def hf_inputs(questions):
  """The same batch for transformers, right-padded."""
  return make_hf_inputs(questions, side="right")


def make_hf_inputs(questions, side):
  longest = max(len(question.prompt_ids) for question in questions)

  def pad(rows):
    return torch.tensor(
      np.stack(
        [
          np.pad(
            row,
            (0, longest - len(row))
            if side == "right"
            else (longest - len(row), 0),
          )
          for row in rows
        ]
      )
    ).long()

  ids = [question.prompt_ids for question in questions]
  return {
    "input_ids": pad(ids),
    "attention_mask": pad([np.ones_like(row) for row in ids]),
    "mm_token_type_ids": pad([row == IMAGE for row in ids]),
    "pixel_values": torch.tensor(
      np.concatenate([question.pixel_values for question in questions])
    ),
    "image_grid_thw": torch.tensor(
      np.concatenate([question.image_grid_thw for question in questions])
    ).long(),
  }


@pytest.fixture(scope="session", name="make_question")
def make_question_fixture():
  return make_question


@pytest.fixture(scope="session", name="make_hf_inputs")
def make_hf_inputs_fixture():
  return make_hf_inputs


@pytest.fixture(scope="session", name="make_config")
def make_config_fixture():
  return make_config


@pytest.fixture(scope="session", name="make_torch")
def make_torch_fixture():
  return make_torch
