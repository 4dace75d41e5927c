"""The recipe of arXiv 2605.20177 for Qwen2.5-VL-7B and Qwen3-VL-8B.

  python -m jaxvlm.main --config=configs/paper.py:qwen2_5_vl_7b \
    --config.model.checkpoint=DIR \
    --config.stages.visual_perception.data.files.path=perception.parquet \
    --config.stages.textual_reasoning.data.files.path=textual.parquet \
    --config.stages.visual_reasoning.data.files.path=visual.parquet

512 questions x 5 completions a step at temperature 1, four updates of 128
groups each; prompts and completions of up to 2048 tokens; 90 steps of
perception, 375 of textual and 465 of visual reasoning, the order of the
released scripts; AdamW at 1e-6, constant, weight decay 0.01, gradient norm 1;
clip 0.2 | 0.3 | dual 3; k3 at 0.01 to the weights that a stage starts from;
reward 0.9 mathematics + 0.1 form. The arms take it as their base:

  python tools/compare_arms.py --arms=staged,merged --seeds=3 \
    --base=configs/paper.py:qwen3_vl_8b --print

Changed on purpose: the released merged arm freezes the vision tower while the
staged arm trains it in its stages with pictures, so their comparison mixes the
order with what is trained. Here no arm freezes anything; the released staged
arm's freeze in the textual stage, which shows no picture, goes with it. And
pictures are held to the 2048 visual tokens that the prompt limit can take,
where the released limit of 4,194,304 pixels lets larger ones in and then drops
their rows. As there, weights are in bfloat16; but in place of a compensation
in bfloat16, which does not hear of 1e-6 either, they keep the 16 bits that they
lack of a float32, and moments are in float32, since in bfloat16 a second moment that
moves by a thousandth at a time stands still. Nothing of this was run: no such
checkpoint was at hand.
"""

from ml_collections import ConfigDict

from configs import staged

SIZES = ("qwen2_5_vl_7b", "qwen3_vl_8b")
STEPS = {
  "visual_perception": 90,
  "textual_reasoning": 375,
  "visual_reasoning": 465,
}


def get_config(size: str = "") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"paper: no size {size!r}; there are {', '.join(SIZES)}.")
  config = staged.get_config(size)
  config.workdir = f"runs/paper_{size}"
  config.inputs.min_pixels = 262_144
  config.schedule = tuple(STEPS)
  for name, steps in STEPS.items():
    config.stages[name].steps = steps
  return config
