"""The schedule: what a stage is, its learning rate, and what it has cost."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxvlm.data.expressions import Expression
from jaxvlm.learner import Objective, Optimizer
from jaxvlm.rl import advantages, kl, losses, surrogates
from jaxvlm.rollout.sampler import Draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A run of steps with one set of knobs, as configs/common.py writes them.

  A step rolls `rollout_questions` out, up to `max_rollouts` times until
  `update_questions` of them have unequal rewards, keeps so many (those first)
  and makes `updates_per_rollout` updates of equal shares of them, each in as
  many microbatches as its tokens fill. Groups that are left over with unequal
  rewards wait for the next step. A stage of kind "sft" reads its completions
  from the data instead.
  """

  name: str
  kind: Literal["grpo", "sft"]
  data: Mapping[str, Mapping[str, Any]]  # sources by a name of your own
  shuffle: bool
  # A column expression: the stage's draws are sorted by it, the least first
  # ("-pass_rate": easy first); "": as they come.
  order: str
  rewards: tuple[tuple[str, float], ...]  # (name, weight); first: accuracy
  steps: int
  rollout_questions: int
  max_rollouts: int
  update_questions: int
  updates_per_rollout: int
  microbatch_tokens: int  # of a data shard at once, prompts counted once
  num_completions: int
  max_completion_length: int
  temperature: float
  advantage: Mapping[str, Any]  # name of rl.advantages, and what it takes
  surrogate: Mapping[str, Any]  # name of rl.surrogates, and its bounds
  aggregation: str  # of rl.losses
  mask_truncated: bool  # completions that were cut off teach nothing
  importance: str | None  # mode of rl.surrogates.importance_weights
  importance_cap: float
  entropy_coef: float
  kl_coef: float
  kl_estimator: str
  kl_limit: float
  kl_target: Literal["loss", "reward"]
  reference: Literal["stage_start", "base", "none"]
  freeze: tuple[str, ...]
  optimizer: Mapping[str, Any]
  reset_optimizer: bool
  learning_rate: float
  lr_schedule: Literal["constant", "linear", "cosine"]
  lr_warmup: float  # updates; below 1: share of the stage's
  lr_final: float  # share of the learning rate that is left at the end
  promote: Literal["latest", "best"]
  metric: str  # of evaluations, that says which checkpoint is best; "": none
  logprob_chunk: int
  # (updates before the stage, updates in all) of the schedule that
  # `hold_schedule` makes over several stages; None: the stage's own.
  lr_span: tuple[int, int] | None = None

  def __post_init__(self) -> None:
    self._one_of("kind", ("grpo", "sft"))
    self._one_of("reference", ("stage_start", "base", "none"))
    self._one_of("lr_schedule", ("constant", "linear", "cosine"))
    self._one_of("promote", ("latest", "best"))
    self._one_of("kl_target", ("loss", "reward"))
    self._one_of("kl_estimator", tuple(kl.ESTIMATORS))
    self._one_of("aggregation", losses.AGGREGATIONS)
    self._one_of("importance", (None, *surrogates.IMPORTANCE))
    self._known("advantage", advantages.ESTIMATORS)
    self._known("surrogate", surrogates.SURROGATES)
    for field in (
      "steps",
      "rollout_questions",
      "max_rollouts",
      "update_questions",
      "updates_per_rollout",
      "microbatch_tokens",
      "max_completion_length",
      "logprob_chunk",
    ):
      if getattr(self, field) < 1:
        raise self._wrong(field, "expected at least 1")
    for field in ("learning_rate", "lr_warmup", "lr_final", "kl_coef"):
      if not getattr(self, field) >= 0:
        raise self._wrong(field, "expected 0 or more")
    if self.order:
      try:
        Expression(self.order)
      except ValueError as error:
        raise self._wrong("order", str(error)) from error
    if not self.data:
      raise self._wrong("data", "expected at least one source")
    if self.kind == "grpo":
      self._check_groups()
    elif self.rollout_questions != self.update_questions:
      raise self._wrong("update_questions", "sft trains on all it reads")
    elif self.max_rollouts > 1:
      raise self._wrong("max_rollouts", "sft has no groups to replace")
    if self.update_questions % self.updates_per_rollout:
      raise self._wrong(
        "update_questions",
        "expected a multiple of updates_per_rollout = "
        f"{self.updates_per_rollout}",
      )

  def _check_groups(self) -> None:
    if self.num_completions < 2:
      raise self._wrong(
        "num_completions",
        "a group of fewer than 2 has no advantage; expected 2 or more",
      )
    if self.temperature <= 0:
      raise self._wrong("temperature", "rollouts are sampled; expected > 0")
    if self.update_questions > self.rollout_questions:
      raise self._wrong(
        "update_questions",
        f"expected at most rollout_questions = {self.rollout_questions}",
      )
    if self.max_rollouts > 1 and self.update_questions < self.rollout_questions:
      raise self._wrong(
        "max_rollouts",
        "groups are replaced where rollout_questions = update_questions; "
        "expected 1",
      )
    if not self.rewards and not all(
      entry.get("rewards") for entry in self.data.values()
    ):
      raise self._wrong(
        "rewards",
        "expected at least one (name, weight), unless each data entry has its own",
      )
    if self.kl_target == "reward" and self.advantage["name"] == "gdpo":
      raise self._wrong(
        "kl_target", "gdpo normalises each reward by itself; expected loss"
      )
    if self.kl_coef and self.reference == "none":
      raise self._wrong("kl_coef", "reference is none; expected 0")

  def _one_of(self, field: str, known: tuple[str | None, ...]) -> None:
    if getattr(self, field) not in known:
      raise self._wrong(field, f"expected one of {', '.join(map(str, known))}")

  def _known(
    self, field: str, functions: Mapping[str, Callable[..., Any]]
  ) -> None:
    """Checks a name and its options against the function's own arguments."""
    options = dict(getattr(self, field))
    name = options.pop("name", None)
    if name not in functions:
      raise self._wrong(
        field, f"expected a name, one of {', '.join(functions)}"
      )
    taken = {
      parameter.name
      for parameter in inspect.signature(functions[name]).parameters.values()
      if parameter.kind is parameter.KEYWORD_ONLY
    }
    if set(options) != taken:
      takes = ", ".join(sorted(taken)) or "nothing else"
      raise self._wrong(field, f"{name} takes {takes}")

  def _wrong(self, field: str, expected: str) -> ValueError:
    return ValueError(
      f"stages.{self.name}.{field}: got {getattr(self, field)!r}; {expected}."
    )

  def check_shards(self, shards: int, hosts: int) -> None:
    """Raises ValueError where mesh or hosts do not divide the questions."""
    for field, parts, what in (
      ("rollout_questions", shards, f"{shards} data shards"),
      (
        "update_questions",
        hosts * self.updates_per_rollout,
        f"{hosts} hosts, {self.updates_per_rollout} updates",
      ),
    ):
      if getattr(self, field) % parts:
        raise self._wrong(field, f"expected a multiple of {parts} ({what})")

  @property
  def row_rewards(self) -> list[str]:
    """Names of the rewards that its data entries have of their own."""
    return [
      name
      for entry in self.data.values()
      for name, _ in entry.get("rewards", ())
    ]

  @property
  def asks_old_logprobs(self) -> bool:
    """Whether a step asks for the logprobs of the policy that sampled.

    Not where a rollout is learned from at once and in one update, whose own
    logprobs are the same.
    """
    return self.kind == "grpo" and (
      self.updates_per_rollout > 1
      or self.max_rollouts > 1
      or (self.kl_coef != 0 and self.kl_target == "reward")
    )

  @property
  def labels(self) -> tuple[str, ...]:
    """What the metrics of a step are kept apart by: names of its sources.

    "" is the stage itself; (): there is one kind.
    """
    names = {entry["report_as"] for entry in self.data.values()}
    return tuple(sorted(names)) if len(names) > 1 else ()

  def make_optimizer(self) -> Optimizer:
    return Optimizer(**self.optimizer)

  def make_objective(self) -> Objective:
    return Objective(
      kind=self.kind,
      temperature=self.temperature if self.kind == "grpo" else 1.0,
      surrogate=tuple(sorted(self.surrogate.items())),
      aggregation="token" if self.kind == "sft" else self.aggregation,
      max_completion_length=self.max_completion_length,
      kl_coef=self.kl_coef if self.kl_target == "loss" else 0.0,
      kl_estimator=self.kl_estimator,
      kl_limit=self.kl_limit,
      entropy_coef=0.0 if self.kind == "sft" else self.entropy_coef,
      importance=self.importance,
      importance_cap=self.importance_cap,
      logprob_chunk=self.logprob_chunk,
    )

  def make_draws(self) -> Draws:
    """Training rollouts: the whole distribution, which is what is trained."""
    return Draws(
      num_completions=self.num_completions,
      max_completion_length=self.max_completion_length,
      temperature=self.temperature,
      top_k=0,
      top_p=1.0,
    )

  @property
  def updates(self) -> int:
    """Optimizer steps of the whole stage."""
    return self.steps * self.updates_per_rollout

  def learning_rate_at(self, update: int) -> float:
    """Learning rate of the stage's update with this number, from 0."""
    before, total = self.lr_span or (0, self.updates)
    update += before
    warmup = self.lr_warmup * (total if self.lr_warmup < 1 else 1)
    if update < warmup:
      return self.learning_rate * min((update + 1) / warmup, 1.0)
    done = (update - warmup) / max(total - warmup, 1)
    left = {
      "constant": 1.0,
      "linear": 1.0 - done,
      "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[self.lr_schedule]
    if self.lr_schedule == "constant":
      return self.learning_rate
    return self.learning_rate * (self.lr_final + (1 - self.lr_final) * left)


# What stages that share a learning-rate schedule must agree on.
_SHARED = ("learning_rate", "lr_schedule", "lr_warmup", "lr_final")


def hold_schedule(
  stages: Sequence[Stage], names: Sequence[str]
) -> tuple[Stage, ...]:
  """One learning-rate schedule and one optimizer state over these stages.

  Warm-up and decay then go over the updates of all of them together, and the
  optimizer's state is handed on, as in a single stage of that length.

  Args:
    stages: the schedule.
    names: of stages that follow one another in it.

  Raises:
    ValueError: they do not follow one another, or their learning rates differ.
  """
  order = [stage.name for stage in stages]
  first = order.index(names[0]) if names and names[0] in order else 0
  if tuple(order[first : first + len(names)]) != tuple(names):
    raise ValueError(
      f"hold_schedule: got {tuple(names)}; expected stages that follow one "
      f"another in the schedule {tuple(order)}."
    )
  held = list(stages)
  total = sum(stage.updates for stage in stages if stage.name in names)
  before = 0
  for i in range(first, first + len(names)):
    for field in _SHARED:
      one, other = getattr(stages[first], field), getattr(stages[i], field)
      if one != other:
        raise ValueError(
          f"hold_schedule: stages.{stages[first].name}.{field} is {one!r}, "
          f"that of {stages[i].name} {other!r}; make them equal."
        )
    held[i] = dataclasses.replace(
      stages[i],
      lr_span=(before, total),
      reset_optimizer=stages[i].reset_optimizer and i == first,
    )
    before += stages[i].updates
  return tuple(held)


def base_sees_otherwise(schedule: Sequence[Stage], stage: Stage) -> bool:
  """Whether what the stage has frozen of tower and merger is not the base's.

  A stage before it may have trained that.
  """
  if "vision_tower" not in stage.freeze:
    return False  # nothing is known before it is read
  seen = {"vision_tower", "merger"} & set(stage.freeze)
  before = schedule[: [s.name for s in schedule].index(stage.name)]
  return any(not seen <= set(s.freeze) for s in before)


@dataclasses.dataclass(kw_only=True)
class Ledger:
  """What a stage has cost; equal budgets of two arms are equal ledgers."""

  questions: float = 0
  patches: float = 0  # vision patches encoded
  prompt_tokens: float = 0
  generated_tokens: float = 0
  trained_tokens: float = 0  # completion tokens in the loss
  updates: float = 0
  model_flops: float = 0.0  # of the model's matrices, forward and backward

  def add(self, **counts: float) -> None:
    for name, count in counts.items():
      setattr(self, name, getattr(self, name) + count)
