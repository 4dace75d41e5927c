"""Staged GRPO: visual perception, then visual and textual reasoning.

  python -m jaxvlm.main --config=configs/staged.py          # the same as :tiny
  python -m jaxvlm.main --config=configs/staged.py:tiny_qwen3
  python -m jaxvlm.main --config=configs/staged.py:qwen3_vl_8b \
    --config.model.checkpoint=DIR \
    --config.stages.visual_perception.data.files.path=perception.parquet \
    --config.stages.visual_reasoning.data.files.path=visual.parquet \
    --config.stages.textual_reasoning.data.files.path=textual.jsonl

A size (qwen2_5_vl_3b, 7b, 32b, 72b; qwen3_vl_2b, 4b, 8b, 32b) trains a Hugging
Face directory on your own rows with the paper's settings, all devices sharing
the weights; `files` is the same for a directory of any size on replicas.
--config.schedule="('visual_perception',)" runs one stage of it. SIZE,PRESET
(tiny,gspo) takes the recipe of another paper or trainer, of configs/presets.py.
"""

import functools

from ml_collections import ConfigDict

from configs import common, presets

CAPABILITIES = ("visual_perception", "visual_reasoning", "textual_reasoning")


# Side in pixels of the square that a visual token sees, by family.
PIXELS = {"qwen2_5_vl": 28, "qwen3_vl": 32}
SIZES = (
  *(f"qwen2_5_vl_{size}" for size in ("3b", "7b", "32b", "72b")),
  *(f"qwen3_vl_{size}" for size in ("2b", "4b", "8b", "32b")),
)


def get_config(argument: str = "tiny") -> ConfigDict:
  """The config of SIZE or SIZE,PRESET."""
  size, _, preset = argument.partition(",")
  configs = {"tiny": tiny, "tiny_qwen3": tiny_qwen3, "files": files}
  configs |= {name: functools.partial(published, name) for name in SIZES}
  if size not in configs:
    raise ValueError(
      f"staged: no size {size!r}; there are {', '.join(configs)}."
    )
  config = configs[size]()
  if preset:
    small = size.startswith("tiny")
    fields = presets.method(preset) if small else presets.load(preset)
    if not small:
      fields["optimizer"]["compensated"] = True  # weights are in bfloat16
    for name in CAPABILITIES:
      stage = config.stages[name].to_dict() | fields
      if small and stage["max_rollouts"] > 1:
        stage["rollout_questions"] = stage["update_questions"]
      config.stages[name] = ConfigDict(stage)
  return config


def published(size: str) -> ConfigDict:
  """Settings for a checkpoint of this size; its own config.json is what holds."""
  config = files()
  config.workdir = f"runs/staged_{size}"
  config.inputs.max_pixels = 2048 * PIXELS[size.rpartition("_")[0]] ** 2
  config.mesh.update({"data": 1, "fsdp": -1})
  return config


def files() -> ConfigDict:
  """Your own parquet, JSON or JSONL, one source a stage."""
  config = common.base(workdir="runs/staged_files", schedule=CAPABILITIES)
  # At 1e-6, bfloat16 alone would round most updates away: see `compensated`.
  config.model.dtype = config.model.param_dtype = "bfloat16"
  config.model.remat = "full"
  config.inputs.max_pixels = 1_605_632  # 2048 visual tokens
  config.inputs.prompt_suffix = (
    "\nFirst think inside <think> </think>, then put the final answer in "
    "\\boxed{}."
  )
  for name in CAPABILITIES:
    config.stages[name] = common.stage(
      data={"files": _file()},
      rewards=(("math", 0.9), ("think_format", 0.1)),
    )
    config.stages[name].optimizer.compensated = True
  # Held-out rows: --config.evaluation.sets.visual_perception.data.path=FILE
  # and --config.evaluation.capabilities="('visual_perception',)".
  config.evaluation.sets = {
    name: {"reward": config.stages[name].rewards[0][0], "data": _file()}
    for name in CAPABILITIES
  }
  return config


def _file() -> ConfigDict:
  return common.data(
    "files",
    path="",  # a file, pattern or directory; @split after it takes a split
    form="easyr1",  # easyr1 | trl | verl | ms_swift | vlm_r1
    problem_key="",  # "": the form's, as for the next two
    answer_key="",
    images_key="",
    response_key="",  # of what SFT learns
    options_key="",  # of a list, to be put below the problem as "A. text"
    image_dir="",  # where relative paths start; "": beside the file
    problem="",  # asked of every row in place of its own
  )


def tiny() -> ConfigDict:
  """A model of 0.74 M weights that is made, warmed up and trained on the spot."""
  config = common.base(
    workdir="runs/staged", schedule=("warm_start", *CAPABILITIES)
  )
  # Memory is what two cores wait for: keep little, and few rows at a time.
  config.model.remat = "dots"
  config.model.scratch = {
    "model_type": "qwen2_5_vl",
    "text_config": {
      "hidden_size": 96,
      "num_hidden_layers": 3,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "intermediate_size": 192,
      "rms_norm_eps": 1e-6,
      "rope_theta": 10.0,  # prompts are short: each axis turns within them
      "rope_scaling": {"type": "mrope", "mrope_section": (4, 4, 4)},
      "max_position_embeddings": 512,
      "initializer_range": 0.1,
    },
    "vision_config": {
      "depth": 2,
      "hidden_size": 96,
      "num_heads": 4,
      "intermediate_size": 192,
      "patch_size": 14,
      "temporal_patch_size": 2,
      "spatial_merge_size": 2,
      "window_size": 28,  # the first block looks at one cell at a time
      "fullatt_block_indexes": (1,),
      "tokens_per_second": 2,
      "initializer_range": 0.1,
    },
    "tower_steps": 100,
    "tower_images": 64,
    "tower_learning_rate": 1e-2,
  }
  config.inputs.max_prompt_length = 64
  config.checkpoint.every = 40
  config.evaluation.update(
    {
      "capabilities": ("perception", "visual_reasoning", "textual_reasoning"),
      "sets": {
        name: {
          "reward": "exact",
          "data": _world(name, split="test", size=384, seed=1),
        }
        for name in ("perception", "visual_reasoning", "textual_reasoning")
      },
      "batch_questions": 96,  # as in training: the same compiled programs
      "max_completion_length": 18,
    }
  )
  config.stages.warm_start = common.stage(
    kind="sft",
    data={
      "worlds": _world(
        "warm_start",
        split="train",
        size=550 * 64,
        seed=0,
        # How often the teacher is wrong: it leaves GRPO something to mend.
        errors={
          "perception": 0.45,
          "visual_reasoning": 0.25,
          "textual_reasoning": 0.25,
        },
        captions=200 * 64,
        tasks={
          "describe": 2.0,
          "color": 0.8,
          "shape": 0.8,
          "digit": 1.2,
          "where": 1.2,
          "count": 1.5,
          "sum": 1.0,
          "difference": 0.9,
          "largest": 1.0,
          "smallest": 0.7,
          "calc": 2.2,
          "larger": 0.8,
          "smaller": 0.8,
        },
      )
    },
    shuffle=False,  # captions first
    steps=550,
    rollout_questions=64,
    update_questions=64,
    updates_per_rollout=1,
    microbatch_tokens=1024,
    max_completion_length=18,
    learning_rate=1e-2,
    lr_schedule="cosine",
    lr_warmup=20,
    lr_final=0.1,
  )
  config.stages.warm_start.optimizer.update({"name": "muon", "b2": 0.99})
  for stage, capability, steps, learning_rate in (
    ("visual_perception", "perception", 100, 3e-4),
    ("visual_reasoning", "visual_reasoning", 130, 3e-4),
    ("textual_reasoning", "textual_reasoning", 190, 3.5e-4),
  ):
    config.stages[stage] = common.stage(
      data={"worlds": _world(capability, split="train", size=8192, seed=1)},
      rewards=(("exact", 1.0), ("think_format", 0.1)),
      steps=steps,
      rollout_questions=96,
      update_questions=48,
      updates_per_rollout=1,
      microbatch_tokens=1024,
      num_completions=8,
      max_completion_length=18,
      surrogate=presets.clip(0.2, 0.28, 3.0),
      kl_coef=0.0,
      reference="none",
      learning_rate=learning_rate,
      lr_schedule="linear",
      lr_warmup=5,
      advantage={"name": "grpo", "eps": 1e-4},
    )
    config.stages[stage].optimizer.b2 = 0.99
  # A model this small forgets what it no longer does, so it rehearses a little.
  for stage, capability, weight in (
    ("visual_reasoning", "perception", 0.2),
    ("textual_reasoning", "perception", 0.12),
    ("textual_reasoning", "visual_reasoning", 0.12),
  ):
    config.stages[stage].data[f"rehearse_{capability}"] = _world(
      capability,
      split="train",
      size=4096,
      seed=2,
      weight=weight,
      report_as=capability,
    )
  return config


def tiny_qwen3() -> ConfigDict:
  """The Qwen3-VL twin of `tiny`: the same worlds, stages and budget."""
  config = tiny()
  config.workdir = "runs/staged_qwen3"
  scratch = config.model.scratch
  scratch.model_type = "qwen3_vl"
  scratch.text_config.update(
    {
      "head_dim": 32,
      "rope_scaling": {"type": "mrope", "mrope_section": (6, 5, 5)},
    }
  )
  vision = scratch.vision_config
  vision.update(
    {
      "patch_size": 16,  # the pictures are resized to 64 x 64 pixels
      "num_position_embeddings": 16,
      "deepstack_visual_indexes": (0,),
    }
  )
  for field in ("window_size", "fullatt_block_indexes", "tokens_per_second"):
    del vision[field]
  return config


def _world(
  capability: str, *, split: str, size: int, seed: int, **more: object
) -> ConfigDict:
  fields = {"tasks": {}, "errors": {}, "captions": 0} | more
  return common.data(
    "worlds",
    capability=capability,
    split=split,
    size=size,
    seed=seed,
    **fields,
  )
