"""The stages of staged.py back to front: textual reasoning first.

  python -m jaxvlm.main --config=configs/reversed.py        # the same as :tiny

Against staged.py it says what putting perception first is worth. Each stage
keeps its rows, knobs and name, and with the name its random numbers; in :tiny
it also keeps the rows that it rehearses, so that the rows are the same, and
the stages that rehearse come first. By design it differs in order. Sizes as in
configs/arms.py.
"""

from ml_collections import ConfigDict

from configs import arms


def get_config(base: str = "tiny") -> ConfigDict:
  config = arms.load(base)
  return arms.finish(
    config,
    "reversed",
    arms.order(config)[::-1],
    allows=(*arms.RESTARTS, *arms.OUTCOMES),
  )
