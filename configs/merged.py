"""The comparison arm of staged.py: the same data and budget as one stage.

  python -m jaxvlm.main --config=configs/merged.py          # the same as :tiny

Takes the sizes of staged.py. Each stage's data is mixed in by its share of
the steps, and all knobs are those of visual perception but for the number of
steps, so both arms see as many questions of each kind and make as many
updates.
"""

from ml_collections import ConfigDict

from configs import common, staged


def get_config(size: str = "tiny") -> ConfigDict:
  config = staged.get_config(size)
  stages = [config.stages[name] for name in staged.CAPABILITIES]
  data = {}
  for name, stage in zip(staged.CAPABILITIES, stages, strict=True):
    total = sum(source.weight for source in stage.data.values())
    for key, source in stage.data.items():
      share = stage.steps * source.weight / total
      entry = source.to_dict() | {"weight": share}
      data[f"{name}_{key}"] = common.data(**entry)
  merged = stages[0].to_dict() | {
    "data": data,
    "steps": sum(stage.steps for stage in stages),
  }
  before = tuple(n for n in config.schedule if n not in staged.CAPABILITIES)
  for name in staged.CAPABILITIES:
    del config.stages[name]
  config.stages.merged = common.stage(**merged)
  config.schedule = (*before, "merged")
  config.workdir = config.workdir.replace("staged", "merged")
  return config
