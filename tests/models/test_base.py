"""config.json of both families: published, written and refused."""

import json

import jax
import pytest

from configs import staged
from jaxvlm.models import Network, find_size, qwen2_5_vl, qwen3_vl

QWEN2_5_VL_3B = {
  "model_type": "qwen2_5_vl",
  "hidden_size": 2048,
  "intermediate_size": 11008,
  "max_position_embeddings": 128000,
  "num_attention_heads": 16,
  "num_hidden_layers": 36,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
  "hidden_act": "silu",
  "vision_config": {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
  },
}

QWEN3_VL_4B = {
  "architectures": ["Qwen3VLForConditionalGeneration"],
  "image_token_id": 151655,
  "model_type": "qwen3_vl",
  "text_config": {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
      "mrope_interleaved": True,
      "mrope_section": [24, 20, 20],
      "rope_type": "default",
    },
    "rope_theta": 5000000,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 151936,
  },
  "tie_word_embeddings": True,
  "video_token_id": 151656,
  "vision_config": {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2560,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
  },
  "vision_end_token_id": 151653,
  "vision_start_token_id": 151652,
}


def test_a_flat_published_config_is_read():
  config = qwen2_5_vl.Config.from_hf(QWEN2_5_VL_3B)
  assert config.tie_word_embeddings
  assert config.text_config.head_dim == 128
  assert config.text_config.mrope_section == (16, 24, 24)
  assert config.text_config.rope_theta == 1e6
  assert config.vision_config.rope_theta == 1e4
  assert config.image_token_id == 151655


def test_a_nested_published_config_is_read():
  config = qwen3_vl.Config.from_hf(QWEN3_VL_4B)
  text, tower = config.text_config, config.vision_config
  assert config.tie_word_embeddings
  assert text.head_dim == 128 != text.hidden_size // text.num_attention_heads
  assert text.mrope_section == (24, 20, 20)
  assert text.rope_theta == 5e6
  assert text.rms_norm_eps == 1e-6
  assert tower.deepstack_visual_indexes == (5, 11, 17)
  assert (tower.head_dim, tower.patch_shape) == (64, (3, 2, 16, 16))
  assert tower.rope_theta == 1e4


# transformers counts the same in a model on its meta device.
# Parameters of the published checkpoints.
COUNTS = {
  "qwen2_5_vl_3b": 3_754_622_976,
  "qwen2_5_vl_7b": 8_292_166_656,
  "qwen2_5_vl_32b": 33_452_718_336,
  "qwen2_5_vl_72b": 73_410_777_344,
  "qwen3_vl_2b": 2_127_532_032,
  "qwen3_vl_4b": 4_437_815_808,
  "qwen3_vl_8b": 8_767_123_696,
  "qwen3_vl_32b": 33_357_390_064,
}


@pytest.mark.parametrize("size", COUNTS)
def test_a_size_by_name_has_the_published_number_of_parameters(size):
  network = Network(
    config=find_size(size),
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="full",
    attention="plain",
  )
  shapes = jax.tree.leaves(network.shapes())
  assert sum(leaf.size for leaf in shapes) == COUNTS[size]


def test_a_size_is_what_its_published_config_says():
  read = qwen2_5_vl.Config.from_hf(QWEN2_5_VL_3B)
  assert find_size("qwen2_5_vl_3b") == read
  assert find_size("qwen3_vl_4b") == qwen3_vl.Config.from_hf(QWEN3_VL_4B)


def test_an_unknown_size_is_refused_with_those_there_are():
  with pytest.raises(ValueError, match=r"qwen3_vl_3b.*qwen3_vl_4b"):
    find_size("qwen3_vl_3b")


def test_every_size_is_an_argument_of_the_config():
  assert set(staged.SIZES) == set(COUNTS)
  for size in staged.SIZES:
    config, patch = staged.get_config(size), find_size(size).vision_config
    side = patch.patch_size * patch.spatial_merge_size
    assert config.inputs.max_pixels == 2048 * side**2


@pytest.mark.parametrize(
  ("family", "published"),
  [(qwen2_5_vl, QWEN2_5_VL_3B), (qwen3_vl, QWEN3_VL_4B)],
)
def test_a_written_config_reads_back_equal(family, published):
  config = family.Config.from_hf(published)
  written = json.loads(json.dumps(config.to_hf()))
  assert family.Config.from_hf(written) == config


def test_what_transformers_reads_of_a_written_config_is_what_we_read(
  network, config
):
  again = type(config).from_dict(network.config.to_hf())
  for part in ("text_config", "vision_config"):
    ours, theirs = (getattr(x, part).to_dict() for x in (again, config))
    assert {key for key in ours if ours[key] != theirs.get(key)} <= {
      "bos_token_id",  # a generation's, not an architecture's
      "eos_token_id",
      "rope_parameters",
    }
    rope = theirs["rope_parameters"]
    assert ours["rope_parameters"].items() <= rope.items()
  assert again.tie_word_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "llava"}, "llava"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"rope_scaling": {"mrope_section": [1, 2, 3]}}, "mrope_section"),
    ({"vision_config": {}}, "depth"),
  ],
)
def test_a_config_that_is_not_built_here_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    qwen2_5_vl.Config.from_hf({**QWEN2_5_VL_3B, **changes})


@pytest.mark.parametrize(
  ("part", "changes", "message"),
  [
    ("vision", {"deepstack_visual_indexes": [11, 5]}, r"\(11, 5\).*rising"),
    ("vision", {"deepstack_visual_indexes": [5, 5]}, r"\(5, 5\).*rising"),
    ("vision", {"deepstack_visual_indexes": [5, 24]}, "the 24 blocks"),
    ("vision", {"deepstack_visual_indexes": [-1, 5]}, "the 24 blocks"),
    ("vision", {"hidden_act": "gelu"}, "hidden_act"),
    ("vision", {"out_hidden_size": 2048}, "out_hidden_size is 2048"),
    ("text", {"num_hidden_layers": 2}, "3 deepstack_visual_indexes for 2"),
    ("text", {"attention_bias": True}, "attention_bias"),
    ("text", {"hidden_act": "gelu"}, "hidden_act"),
    ("text", {"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ("text", {"num_key_value_heads": 5}, "num_key_value_heads"),
  ],
)
def test_a_qwen3_config_that_is_not_built_here_is_refused(
  part, changes, message
):
  name = f"{part}_config"
  raw = {**QWEN3_VL_4B, name: {**QWEN3_VL_4B[name], **changes}}
  with pytest.raises(ValueError, match=message):
    qwen3_vl.Config.from_hf(raw)


def test_a_qwen3_config_lacks_no_field_silently():
  vision = dict(QWEN3_VL_4B["vision_config"])
  del vision["deepstack_visual_indexes"]
  with pytest.raises(ValueError, match=r"lacks \['deepstack_visual_indexes'"):
    qwen3_vl.Config.from_hf({**QWEN3_VL_4B, "vision_config": vision})
