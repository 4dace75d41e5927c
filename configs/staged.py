"""Staged GRPO: visual perception, then visual and textual reasoning.

  python -m jaxvlm.main --config=configs/staged.py          # the same as :tiny
  python -m jaxvlm.main --config=configs/staged.py:files \
    --config.model.checkpoint=DIR \
    --config.stages.visual_perception.data.files.path=perception.parquet \
    --config.stages.visual_reasoning.data.files.path=visual.parquet \
    --config.stages.textual_reasoning.data.files.path=textual.jsonl

`files` trains a Qwen2.5-VL directory on your own rows with the paper's
settings; --config.schedule="('visual_perception',)" runs one stage of it.
"""

from ml_collections import ConfigDict

from configs import common

CAPABILITIES = ("visual_perception", "visual_reasoning", "textual_reasoning")


def get_config(size: str = "tiny") -> ConfigDict:
  if size not in ("tiny", "files"):
    raise ValueError(f"staged: no size {size!r}; there are tiny, files.")
  return {"tiny": tiny, "files": files}[size]()


def files() -> ConfigDict:
  """Your own parquet, JSON or JSONL, one source a stage."""
  config = common.base(workdir="runs/staged_files", schedule=CAPABILITIES)
  config.model.dtype = config.model.param_dtype = "bfloat16"
  config.model.remat = "full"
  config.inputs.max_pixels = 1_605_632  # 2048 visual tokens
  config.inputs.prompt_suffix = (
    "\nFirst think inside <think> </think>, then put the final answer in "
    "\\boxed{}."
  )
  for name in CAPABILITIES:
    config.stages[name] = common.easyr1(
      data={"files": _file()},
      rewards=(("math", 0.9), ("think_format", 0.1)),
    )
  config.stages.visual_perception.rewards = (
    ("multiple_choice", 0.9),
    ("think_format", 0.1),
  )
  # Held-out rows: --config.evaluation.sets.visual_perception.data.path=FILE
  # and --config.evaluation.capabilities="('visual_perception',)".
  config.evaluation.sets = {
    name: {"reward": config.stages[name].rewards[0][0], "data": _file()}
    for name in CAPABILITIES
  }
  return config


def _file() -> dict[str, object]:
  return {
    "source": "files",
    "weight": 1.0,
    "path": "",
    "problem_key": "problem",
    "answer_key": "answer",
    "images_key": "images",
    "image_dir": None,
    "limit": None,
  }


def tiny() -> ConfigDict:
  """A model of 0.6 M weights that is made, warmed up and trained on the spot."""
  raise NotImplementedError
