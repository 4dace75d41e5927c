"""Both curricula: the stages of staged.py, and easy rows first in each.

  python tools/compare_arms.py --arms=staged,merged,difficulty,staged_difficulty

With these four arms it says whether what stages and easy-first are worth adds
up. The rows drawn in a stage are staged.py's, sorted by falling pass rate; see
difficulty.py for where that comes from. By design it differs in order. Sizes as
in configs/arms.py.
"""

from ml_collections import ConfigDict

from configs import arms


def get_config(base: str = "tiny") -> ConfigDict:
  config = arms.load(base)
  for capability in arms.CAPABILITIES:
    config.stages[capability].order = "-pass_rate"
  return arms.finish(
    config,
    "staged_difficulty",
    arms.order(config),
    allows=("order", *arms.RESTARTS, *arms.OUTCOMES),
  )
