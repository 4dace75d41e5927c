"""The merged arm with easy rows first: a curriculum of difficulty alone.

  python tools/compare_arms.py --arms=merged,difficulty

Against merged.py it says what easy-first is worth without stages. The rows
drawn are merged.py's, sorted by falling pass rate. Every source needs the pass
rates of its rows, which tools/annotate.py measures and compare_arms.py hands
over; for a run by hand name the files:

  --config.stages.merged.data.SOURCE.annotations=FILE.parquet

By design it differs in order. Sizes as in configs/arms.py.
"""

from ml_collections import ConfigDict

from configs import arms


def get_config(base: str = "tiny") -> ConfigDict:
  config = arms.load(base)
  arms.merge(config, "merged")
  config.stages.merged.order = "-pass_rate"
  return arms.finish(
    config,
    "difficulty",
    ("merged",),
    allows=("order", *arms.RESTARTS, *arms.OUTCOMES),
  )
