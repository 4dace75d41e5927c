"""Supervised captions in the place of reinforced perception, then as staged.py.

  python -m jaxvlm.main --config=configs/caption_sft.py     # the same as :tiny

Against staged.py it says what RL on questions about pictures is worth over SFT
on captions of the same pictures. The first stage asks for a description of
each picture and learns the written one, in as many updates over as many
questions and with the same optimizer; the other stages are staged.py's. A row
of your own has its caption in the column `caption`; inputs.prompt_suffix ends
its prompt as it ends every other. By design that stage's prompts, targets and
tokens differ. Sizes as in configs/arms.py.
"""

from ml_collections import ConfigDict

from configs import arms

PROBLEM = "Describe the picture in detail."


def get_config(base: str = "tiny") -> ConfigDict:
  config = arms.load(base)
  perception = arms.CAPABILITIES[0]
  stage = config.stages[perception].copy_and_resolve_references()
  stage.kind = "sft"
  stage.update_questions = stage.rollout_questions
  for key, source in stage.data.items():
    if source.source == "worlds":
      source.captions = source.size
    elif source.source == "files":
      source.response_key, source.problem = "caption", PROBLEM
    else:
      raise ValueError(
        f"caption_sft: source {key!r} is {source.source!r}; captions are known "
        "of files and worlds."
      )
  config.stages.captions = stage
  return arms.finish(
    config,
    "caption_sft",
    tuple(
      "captions" if name == perception else name for name in arms.order(config)
    ),
    allows=(
      *("rows", "draws", "kind", "rewards", "update_questions"),
      "prompt_tokens",
      *arms.RESTARTS,
      *arms.OUTCOMES,
    ),
  )
