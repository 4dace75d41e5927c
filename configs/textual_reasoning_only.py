"""Textual reasoning alone, with the updates of all three stages.

  python -m jaxvlm.main --config=configs/textual_reasoning_only.py

Against staged.py it says what the other stages add at equal budget: as many
questions and updates, all on this stage's rows and without rehearsal of
others. By design rows, pictures and rewards are this stage's. Sizes as in
configs/arms.py.
"""

from ml_collections import ConfigDict

from configs import arms


def get_config(base: str = "tiny") -> ConfigDict:
  return arms.alone(base, "textual_reasoning")
