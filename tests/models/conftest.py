"""A tiny random checkpoint of each family that transformers wrote, and a batch
to show it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
  Qwen2_5_VLConfig,
  Qwen2_5_VLForConditionalGeneration,
  Qwen3VLConfig,
  Qwen3VLForConditionalGeneration,
)

from jaxvlm import models
from jaxvlm.data import vision_layout
from jaxvlm.types import Example, Question
from tests import dense

IMAGE = 155
IDS = {
  "image_token_id": IMAGE,
  "video_token_id": 156,
  "vision_start_token_id": 152,
  "vision_end_token_id": 153,
}
TEXT = {
  "vocab_size": 160,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-3,  # so large that another one shows
  "bos_token_id": 1,
  "eos_token_id": 2,
}
VISION = {
  "hidden_size": 48,
  "intermediate_size": 56,
  "num_heads": 4,
  "out_hidden_size": 64,
}


def make_qwen2_5(**changes):
  """112 pixels a window; the middle block sees the whole picture."""
  rope = {"rope_type": "default", "rope_theta": 1e2}
  text = {
    **TEXT,
    "num_hidden_layers": 3,
    "rope_parameters": {**rope, "mrope_section": [2, 3, 3]},
  }
  vision = {
    **VISION,
    "depth": 3,
    "fullatt_block_indexes": [1],
    "window_size": 112,
    "tokens_per_second": 2,
  }
  return Qwen2_5_VLConfig(
    **{"text_config": text, "vision_config": vision, **IDS, **changes}
  )


def make_qwen3(*, taps=(0, 2, 3), head_dim=24, **changes):
  """Heads wider than a share of hidden_size; 7 x 7 learned positions."""
  text = {
    **TEXT,
    "num_hidden_layers": 4,
    "head_dim": head_dim,
    "rope_parameters": {
      "rope_type": "default",
      "rope_theta": 1e2,
      "mrope_section": [head_dim // 4, head_dim // 8, head_dim // 8],
      "mrope_interleaved": True,
    },
  }
  vision = {
    **VISION,
    "depth": 5,
    "patch_size": 16,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": list(taps),
  }
  return Qwen3VLConfig(
    **{
      "text_config": text,
      "vision_config": vision,
      "tie_word_embeddings": False,
      **IDS,
      **changes,
    }
  )


MAKE = {
  "qwen2_5_vl": (make_qwen2_5, Qwen2_5_VLForConditionalGeneration),
  "qwen3_vl": (make_qwen3, Qwen3VLForConditionalGeneration),
}


def make_torch(config):
  """A model whose every weight, also bias and norm, matters."""
  torch.manual_seed(0)
  model = MAKE[config.model_type][1](config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.15 * torch.randn_like(weight))
  return model


@pytest.fixture(scope="session", params=list(MAKE))
def family(request):
  return request.param


@pytest.fixture(scope="session")
def make_config(family):
  return MAKE[family][0]


@pytest.fixture(scope="session")
def config(make_config):
  return make_config()


@pytest.fixture(scope="session")
def hf(config):
  return make_torch(config)


@pytest.fixture(scope="session")
def directory(hf, tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  hf.save_pretrained(path)
  return path


def load(directory):
  return models.load_network(
    directory,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    attention="plain",
  )


@pytest.fixture(scope="session")
def network(directory):
  return load(directory)


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
  shape = (int(grids.prod(axis=1).sum()), 6 * layout.patch_size**2)
  random = np.random.default_rng(seed)
  return Question(
    question_id=seed,
    example=Example(problem="", answer=""),
    prompt_ids=prompt_ids,
    position_ids=vision_layout.mrope_positions(prompt_ids, grids, layout),
    pixel_values=random.normal(size=shape).astype(np.float32),
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


def collate(questions, layout, *, lanes=2, **sizes):
  """The batch in two lanes; on the device, as the learner sees it."""
  batch = dense.collate(questions, lanes=lanes, layout=layout, **sizes)
  return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="session")
def prompts(questions, layout):
  return collate(questions, layout)


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


# -- the network, compiled in two halves --------------------------------------


def see(network, params, vision):
  return network.encode(params, vision)


def read(network, params, prompts, features):
  """Logits of every column of the prompts."""
  embeds = network.embed(
    params, prompts.prompt_ids, prompts.vision_index, features
  )
  branches = jnp.where(prompts.prompt_mask, 0, -1)
  hidden = network.forward(
    params, embeds, prompts.position_ids, branches, branches
  )
  return jnp.einsum("qtd,dv->qtv", hidden, network.head(params))


class Run:
  """Logits of prompts, at the columns that are no padding: [tokens V]."""

  def __init__(self):
    # jit knows a function by its identity.
    self.see = jax.jit(lambda *args: see(*args), static_argnums=0)
    self.read = jax.jit(lambda *args: read(*args), static_argnums=0)

  def __call__(self, network, params, prompts):
    return self.reading(
      network, params, prompts, self.see(network, params, prompts.vision)
    )

  def reading(self, network, params, prompts, features):
    logits = self.read(network, params, prompts, features)
    return np.asarray(logits.astype(jnp.float32))[
      np.asarray(prompts.prompt_mask)
    ]


@pytest.fixture(scope="session")
def run():
  return Run()


@pytest.fixture(scope="session")
def features(run, network, params, prompts):
  return run.see(network, params, prompts.vision)


@pytest.fixture(scope="session")
def logits(run, network, params, prompts, features):
  return run.reading(network, params, prompts, features)


@pytest.fixture(scope="session")
def changed(params, prompts):
  """Logits of a network built anew: a test changes the code beneath first."""

  def run(network):
    return Run()(dataclasses.replace(network), params, prompts)

  return run


@pytest.fixture(scope="session", name="logits_of")
def logits_of_fixture():
  return lambda network, params, prompts: read(
    network, params, prompts, see(network, params, prompts.vision)
  )


@dataclasses.dataclass(frozen=True)
class Variant:
  hf: torch.nn.Module
  network: models.Network
  params: dict


@pytest.fixture
def make_variant(make_config, tmp_path):
  """make_variant(**changes): another checkpoint of the family, on both sides."""

  def make(**changes):
    hf = make_torch(make_config(**changes))
    hf.save_pretrained(tmp_path)
    network = load(tmp_path)
    return Variant(hf, network, models.load_params(network, tmp_path))

  return make


@pytest.fixture
def assert_equal_logits(run, prompts, hf_inputs):
  """Those of a variant and of its twin."""

  def check(variant):
    seen = hf_inputs["attention_mask"].bool()
    with torch.no_grad():
      expected = variant.hf(**hf_inputs).logits[seen].numpy()
    got = run(variant.network, variant.params, prompts)
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=0)

  return check


@pytest.fixture(scope="session", name="make_question")
def make_question_fixture():
  return make_question


@pytest.fixture(scope="session", name="collate")
def collate_fixture():
  return collate


@pytest.fixture(scope="session", name="make_hf_inputs")
def make_hf_inputs_fixture():
  return make_hf_inputs


@pytest.fixture(scope="session", name="make_torch")
def make_torch_fixture():
  return make_torch
