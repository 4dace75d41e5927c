"""For tests of an update: what it minimises, and by what steps."""

from jaxvlm.learner import Objective, Optimizer

OBJECTIVE = Objective(
  kind="grpo",
  temperature=0.7,
  surrogate=(
    ("clip_dual", 3.0),
    ("clip_high", 0.3),
    ("clip_low", 0.2),
    ("name", "clip"),
  ),
  aggregation="token",
  max_completion_length=8,
  kl_coef=0.1,
  kl_estimator="k3",
  kl_limit=20.0,
  entropy_coef=0.0,
  importance=None,
  importance_cap=1.5,
  logprob_chunk=16,
)
# Without a first moment's memory, adam's mu is the clipped gradient itself.
ADAMW = Optimizer(
  name="adamw",
  b1=0.0,
  b2=0.9,
  weight_decay=0.01,
  clip_norm=1.0,
  compensated=False,
)
RATE = 1e-3
