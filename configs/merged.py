"""The merged arm: the rows of all stages mixed from the first step to the last.

  python -m jaxvlm.main --config=configs/merged.py          # the same as :tiny

Against staged.py it says what the order of capabilities is worth. Each stage's
rows are mixed in by its share of the questions, and all knobs are those of
visual perception but for the number of steps, so both arms ask the same
questions as often and make as many updates. By design it differs in order;
learning rate and optimizer also start once instead of three times, unless they
are held (tools/compare_arms.py --hold_schedule). Sizes as in configs/arms.py.
"""

from ml_collections import ConfigDict

from configs import arms


def get_config(base: str = "tiny") -> ConfigDict:
  config = arms.load(base)
  arms.merge(config, "merged")
  return arms.finish(
    config, "merged", ("merged",), allows=(*arms.RESTARTS, *arms.OUTCOMES)
  )
