"""The order of the paper's released scripts: textual before visual reasoning.

  python -m jaxvlm.main --config=configs/released_order.py  # the same as :tiny

The paper's abstract lists perception, visual and textual reasoning, which is
staged.py; its scripts run perception, textual, visual. Each stage keeps its
rows, knobs and name. By design it differs in order. Sizes as in
configs/arms.py.
"""

from ml_collections import ConfigDict

from configs import arms


def get_config(base: str = "tiny") -> ConfigDict:
  perception, visual, textual = arms.CAPABILITIES
  return arms.finish(
    arms.load(base),
    "released_order",
    (perception, textual, visual),
    allows=(*arms.RESTARTS, *arms.OUTCOMES),
  )
