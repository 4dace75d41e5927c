"""How the arms are made of staged.py: what they share and what each changes.

An arm takes the sizes of staged.py, or a config of your own that has its three
stages: configs/merged.py:tiny, configs/merged.py:my.py,
configs/merged.py:configs/paper.py:qwen3_vl_8b. Everything that an arm does not
change on purpose is that config's, so your rows are named there once.

tools/compare_arms.py runs arms over seeds and compares what they report. What
differs between them is an error there, unless the arm's `allows` names it.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from configs import common, staged

CAPABILITIES = staged.CAPABILITIES
ARMS = (
  "staged",
  "merged",
  "reversed",
  "released_order",
  *(f"{capability}_only" for capability in CAPABILITIES),
  "caption_sft",
  "difficulty",
  "staged_difficulty",
)
# What follows from what the policy says, and from which groups it has mastered.
OUTCOMES = ("generated_tokens", "trained_tokens", "model_flops")
# Of stages that roll out until there are enough groups to learn from.
RESAMPLED = ("questions", "draws", "patches", "prompt_tokens")
# When learning rate and optimizer start anew; --hold_schedule makes it equal.
RESTARTS = ("schedule",)


def load(base: str) -> ConfigDict:
  """The staged config that an arm is made of.

  Args:
    base: a size of staged.py, or FILE.py or FILE.py:ARGUMENT.

  Raises:
    ValueError: there is no such size or file, or it lacks one of the stages.
  """
  file, _, argument = base.partition(":")
  if not file.endswith(".py"):
    return staged.get_config(base)
  path = pathlib.Path(file).expanduser()
  if not path.is_file():
    raise ValueError(f"arms: no config file {file!r}.")
  spec = importlib.util.spec_from_file_location("arms_base", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([argument] if argument else []))
  missing = [name for name in CAPABILITIES if name not in config.schedule]
  if missing:
    raise ValueError(
      f"arms: the schedule of {base} has no stage {missing[0]!r}; an arm is "
      f"made of {', '.join(CAPABILITIES)}."
    )
  return config


def order(config: ConfigDict) -> tuple[str, ...]:
  """The three stages as the base has them in its schedule."""
  return tuple(name for name in config.schedule if name in CAPABILITIES)


def finish(
  config: ConfigDict,
  name: str,
  schedule: tuple[str, ...],
  *,
  allows: tuple[str, ...],
) -> ConfigDict:
  """Makes the config that of an arm.

  Args:
    config: with the stages of the schedule.
    name: of the arm.
    schedule: stages in the place of the base's three; what stands before them
      there (a warm start) stays.
    allows: names of what may differ from the other arms.
  """
  before = [stage for stage in config.schedule if stage not in CAPABILITIES]
  config.schedule = (*before, *schedule)
  for stage in set(config.stages) - set(config.schedule):
    del config.stages[stage]
  if any(config.stages[stage].max_rollouts > 1 for stage in schedule):
    allows = (*allows, *RESAMPLED)
  config.allows = tuple(dict.fromkeys(allows))
  path = pathlib.PurePath(config.workdir)
  if "staged" in path.name:
    config.workdir = str(path.with_name(path.name.replace("staged", name)))
  else:
    config.workdir = f"{path}_{name}"
  return config


def merge(config: ConfigDict, name: str) -> None:
  """Adds a stage of this name: the rows of all three mixed, knobs of the first.

  A source comes in by the share of all questions that its stage asks of it.
  """
  first = config.stages[CAPABILITIES[0]]
  data = {}
  for capability in CAPABILITIES:
    stage = config.stages[capability]
    total = sum(source.weight for source in stage.data.values())
    for key, source in stage.data.items():
      share = stage.steps * stage.rollout_questions * source.weight / total
      label = source.report_as or capability
      entry = source.to_dict() | {"weight": share, "report_as": label}
      if not source.rewards and stage.rewards != first.rewards:
        entry["rewards"] = stage.rewards
      data[f"{capability}_{key}"] = common.data(**entry)
  config.stages[name] = common.stage(
    **first.to_dict() | {"data": data, "steps": _steps(config, first)}
  )


def alone(base: str, capability: str) -> ConfigDict:
  """The arm that spends the whole budget on one stage's own rows."""
  config = load(base)
  stage = config.stages[capability]
  stage.steps = _steps(config, stage)
  for key in [key for key in stage.data if key.startswith("rehearse_")]:
    del stage.data[key]
  return finish(
    config,
    f"{capability}_only",
    (capability,),
    allows=(
      *("rows", "draws", "patches", "prompt_tokens", "rewards"),
      *RESTARTS,
      *OUTCOMES,
    ),
  )


def _steps(config: ConfigDict, stage: ConfigDict) -> int:
  """Steps of this stage that make as many updates as the three together."""
  stages = [config.stages[name] for name in CAPABILITIES]
  updates = sum(each.steps * each.updates_per_rollout for each in stages)
  return updates // stage.updates_per_rollout
