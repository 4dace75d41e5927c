"""The recipes of papers and of other trainers, each a set of a stage's fields.

  python -m jaxvlm.main --config=configs/staged.py:tiny,gspo

`--config=configs/staged.py:SIZE,PRESET` trains with one. On the tiny sizes only
its method is taken (`METHOD`), since batches, lengths and learning rates of
large models make no sense there.

Where a trainer computes a thing otherwise, the preset says so; what none of
them can do otherwise here: rollouts are drawn at temperature 1 without top_p,
and the reference and the gap between sampler and learner are exact.
"""

from collections.abc import Mapping
from typing import Any

Fields = dict[str, Any]

# The fields that say what is learned from a rollout, not how much at a time.
METHOD = (
  "advantage",
  "surrogate",
  "aggregation",
  "mask_truncated",
  "importance",
  "importance_cap",
  "entropy_coef",
  "kl_coef",
  "kl_estimator",
  "kl_limit",
  "kl_target",
  "reference",
  "max_rollouts",
)


def easyr1() -> Fields:
  """The paper's (EasyR1's): 512 questions x 5, four updates of 128 groups.

  Learning rate 1e-6 without warm-up, weight decay 1e-2, gradient norm 1, clip
  0.2 | 0.3 | dual 3, k3 to the stage's start with coefficient 1e-2, token mean
  over the update.
  """
  return {
    "rollout_questions": 512,
    "max_rollouts": 1,
    "update_questions": 512,
    "updates_per_rollout": 4,
    "num_completions": 5,
    "max_completion_length": 2048,
    "temperature": 1.0,
    "advantage": {"name": "grpo", "eps": 1e-6},
    "surrogate": clip(0.2, 0.3, 3.0),
    "aggregation": "token",  # token | sequence | sequence_sum | fixed
    "mask_truncated": False,
    "importance": None,  # token_truncate | token_mask | sequence_...
    "importance_cap": 2.0,
    "entropy_coef": 0.0,
    "kl_coef": 1e-2,
    "kl_estimator": "k3",  # k1 | k2 | k3
    "kl_limit": 20.0,
    "kl_target": "loss",  # loss | reward
    "reference": "stage_start",  # stage_start | base | none
    "optimizer": {
      "name": "adamw",
      "b1": 0.9,
      "b2": 0.999,
      "weight_decay": 1e-2,
      "clip_norm": 1.0,
      # For weights in bfloat16: the bits that these lack of a float32 are kept.
      "compensated": False,
    },
    "learning_rate": 1e-6,
    "lr_schedule": "constant",  # constant | linear | cosine
    "lr_warmup": 0.0,  # updates; below 1: share of the stage's
    "lr_final": 0.0,
  }


def damped() -> Fields:
  """The paper's for a base whose entropy explodes (InternVL3, textual stage).

  Learning rate 3e-7 with 5 % warm-up, KL 5e-2, clip 0.15 | 0.15, gradient
  norm 0.5.
  """
  fields = easyr1() | {
    "surrogate": clip(0.15, 0.15, 3.0),
    "kl_coef": 5e-2,
    "learning_rate": 3e-7,
    "lr_warmup": 0.05,
  }
  fields["optimizer"]["clip_norm"] = 0.5
  return fields


def verl() -> Fields:
  """verl's GRPO scripts for vision-language models: easyr1 but clip 0.2 | 0.2."""
  return easyr1() | {"surrogate": clip(0.2, 0.2, 3.0)}


def trl() -> Fields:
  """TRL's GRPOConfig: groups of 8, no KL, no dual bound, eps 1e-4.

  The mean is over the tokens of the whole update (its loss_type "dapo"), and
  completions that the sampler found e**1.1 times less likely than the learner
  are left out, as its sequence mask with bound 3 does. Learning rate 1e-6
  falling to 0, no weight decay, completions of 512 tokens. A rollout feeds one
  update of 32 questions: TRL leaves that to batch sizes.
  """
  fields = easyr1() | {
    "rollout_questions": 32,
    "update_questions": 32,
    "updates_per_rollout": 1,
    "num_completions": 8,
    "max_completion_length": 512,
    "advantage": {"name": "grpo", "eps": 1e-4},
    "surrogate": clip(0.2, 0.2, None),
    "importance": "sequence_mask",
    "importance_cap": 3.0,
    "kl_coef": 0.0,
    "reference": "none",
    "lr_schedule": "linear",
  }
  fields["optimizer"]["weight_decay"] = 0.0
  return fields


def dapo() -> Fields:
  """DAPO (Yu et al. 2025, arXiv 2503.14476): clip higher, online filtering.

  Groups of one reward are replaced by fresh ones, for up to ten rollouts a
  step; 512 questions x 16, sixteen updates, clip 0.2 | 0.28 and no KL, weight
  decay 0.1, twenty rollouts of warm-up. Its overlong shaping is the reward
  `length(longest=..., buffer=...)`.
  """
  fields = easyr1() | {
    "max_rollouts": 10,
    "updates_per_rollout": 16,
    "num_completions": 16,
    "surrogate": clip(0.2, 0.28, None),
    "kl_coef": 0.0,
    "reference": "none",
    "lr_warmup": 320.0,
  }
  fields["optimizer"]["weight_decay"] = 0.1
  return fields


def dr_grpo() -> Fields:
  """Dr.GRPO (Liu et al. 2025, arXiv 2503.20783): no division but by a constant.

  Advantages are rewards minus their mean; a completion's sum is divided by
  max_completion_length; no KL; 128 questions x 8 and one update a rollout.
  """
  return easyr1() | {
    "rollout_questions": 128,
    "update_questions": 128,
    "updates_per_rollout": 1,
    "num_completions": 8,
    "advantage": {"name": "dr_grpo"},
    "surrogate": clip(0.2, 0.2, None),
    "aggregation": "fixed",
    "kl_coef": 0.0,
    "reference": "none",
  }


def gspo() -> Fields:
  """GSPO (Zheng et al. 2025, arXiv 2507.18071): one ratio for a completion.

  Clip 3e-4 | 4e-4, mean over sequences, no KL, four updates a rollout.
  """
  return easyr1() | {
    "surrogate": {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "aggregation": "sequence",
    "kl_coef": 0.0,
    "reference": "none",
  }


PRESETS = {
  "easyr1": easyr1,
  "damped": damped,
  "verl": verl,
  "trl": trl,
  "dapo": dapo,
  "dr_grpo": dr_grpo,
  "gspo": gspo,
}


def load(name: str) -> Fields:
  """The fields of a preset.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in PRESETS:
    raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
  return PRESETS[name]()


def method(name: str) -> Fields:
  """Those of its fields that are of use at any size."""
  fields: Mapping[str, Any] = load(name)
  return {field: fields[field] for field in METHOD}


def clip(low: float, high: float, dual: float | None) -> Fields:
  """PPO's surrogate with these bounds."""
  return {
    "name": "clip",
    "clip_low": low,
    "clip_high": high,
    "clip_dual": dual,
  }
