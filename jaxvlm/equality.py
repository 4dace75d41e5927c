"""Whether two runs differ in nothing but what they are to compare."""

import dataclasses
import gzip
import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxvlm.metrics import Path

TOLERANCE = 0.01  # of totals that need not be equal to the last one
# What is counted, by the names of `stages.Ledger`: decided by the config alone,
_EXACT = ("updates", "questions")
_BUDGET = ("patches", "prompt_tokens")
# and following from what the policy says.
_OUTCOMES = ("generated_tokens", "trained_tokens", "model_flops")
LEDGER = (*_EXACT, *_BUDGET, *_OUTCOMES)
# Fields of a stage that are compared otherwise, or decide no result.
_APART = {
  *("data", "steps", "rewards", "freeze", "reset_optimizer"),
  *("learning_rate", "lr_schedule", "lr_warmup", "lr_final"),
  *("microbatch_tokens", "logprob_chunk"),
}
# Fields of a run of which the same holds.
_ELSEWHERE = {
  *("stages", "schedule", "hold_schedule", "allows", "log", "checkpoint"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
  """What a finished run says that it was given and has used."""

  config: Mapping[str, Any]  # config.json
  summary: Mapping[str, Any]  # summary.json
  rows: Mapping[str, Any]  # rows.json.gz

  def total(self, name: str) -> float:
    """A figure of the ledger, over all stages."""
    return sum(stage[name] for stage in self.summary["ledger"].values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """Something in which a run is not as the one that it is compared with."""

  name: str  # as `allows` names it
  expected: str
  found: str
  allowed: bool = False

  def __str__(self) -> str:
    return f"{self.name}: {self.found}, not {self.expected}"


def read_account(workdir: Path) -> Account:
  """What a finished run left.

  Raises:
    ValueError: a file of it is missing or broken.
  """
  here = pathlib.Path(workdir)
  try:
    return Account(
      config=json.loads((here / "config.json").read_text()),
      summary=json.loads((here / "summary.json").read_text()),
      rows=json.loads(gzip.decompress((here / "rows.json.gz").read_bytes())),
    )
  except (OSError, EOFError, ValueError) as error:
    raise ValueError(f"{here}: no finished run can be read: {error}") from error


def differences(
  baseline: Account, other: Account, *, allows: Sequence[str] = ()
) -> list[Difference]:
  """All in which `other` differs from `baseline`.

  Updates and questions are to be the same number. The other totals of the
  ledger may be off by `TOLERANCE`. All else is to be equal: training rows,
  which of them were asked how often (up to `TOLERANCE`), held-out rows, freeze
  policy, reward formulas, the sequence of learning rates and optimizer
  restarts, and each further setting of the config; of a stage's settings, the
  values that occur in any stage.

  Args:
    baseline: what it is compared with.
    other: the run.
    allows: names of differences that are no error, besides those that the
      config of either run allows.

  Raises:
    ValueError: a name that is allowed is none of those that are compared.
  """
  allowed = {*baseline.config["allows"], *other.config["allows"], *allows}
  compared: set[str] = set()
  found: list[Difference] = []
  for name, expected, value, equal in _compare(baseline, other):
    compared.add(name)
    if not equal:
      found.append(
        Difference(
          name=name, expected=expected, found=value, allowed=name in allowed
        )
      )
  if unknown := sorted(allowed - compared):
    raise ValueError(
      f"allows: nothing called {unknown[0]!r} is compared; there are "
      f"{', '.join(sorted(compared))}."
    )
  return found


Comparison = tuple[str, str, str, bool]  # name, expected, found, equal


def _compare(baseline: Account, other: Account) -> Iterator[Comparison]:
  both = baseline, other
  for name in LEDGER:
    expected, value = baseline.total(name), other.total(name)
    room = 0.0 if name in _EXACT else TOLERANCE * expected
    equal = abs(value - expected) <= room
    yield name, f"{expected:,.0f}", f"{value:,.0f}", equal
  yield from _rows(baseline, other)
  for name, values in (
    ("freeze", [_values(a.summary["stages"], "freeze") for a in both]),
    ("rewards", [_rewards(a) for a in both]),
  ):
    yield _equality(name, values)
  schedules = [a.summary["schedule"] for a in both]
  told = [_rates(each) for each in schedules]
  yield "schedule", told[0], told[1], schedules[0] == schedules[1]
  stages = [
    {name: a.config["stages"][name] for name in a.config["schedule"]}
    for a in both
  ]
  fields = {
    field for each in stages for stage in each.values() for field in stage
  }
  for field in sorted(fields - _APART):
    yield _equality(field, [_values(each, field) for each in stages])
  settings = [
    dict(_flat({k: v for k, v in a.config.items() if k not in _ELSEWHERE}))
    for a in both
  ]
  for field in sorted(settings[0] | settings[1]):
    yield _equality(field, [each.get(field) for each in settings])


def _rows(baseline: Account, other: Account) -> Iterator[Comparison]:
  """Training rows as sets, what was asked as multisets, held-out rows."""
  asked = [_asked(account.rows["train"]) for account in (baseline, other)]
  known = [sorted(each) for each in asked]
  both = len(asked[0].keys() & asked[1].keys())
  expected, found = (f"{len(each):,} rows" for each in known)
  yield (
    "rows",
    expected,
    f"{found}, {both:,} of them the same",
    known[0] == known[1],
  )
  shared = sum((asked[0] & asked[1]).values())
  most = max(sum(each.values()) for each in asked)
  yield (
    "draws",
    f"{1:.1%} of the questions asked in both",
    f"{shared / most if most else 1:.1%}",
    shared >= (1 - TOLERANCE) * most,
  )
  held = [
    {
      name: (each["reward"], each["rows"], each["sha256"])
      for name, each in account.summary["held_out"].items()
    }
    for account in (baseline, other)
  ]
  yield _equality("held_out", held)


def _asked(train: Mapping[str, Any]) -> Counter[str]:
  """How often each row was asked; a row never drawn stands with 0."""
  asked: Counter[str] = Counter()
  for sources in train.values():
    for source in sources.values():
      for one, draws in zip(source["ids"], source["draws"], strict=True):
        asked[one] += draws
  return asked


def _rewards(account: Account) -> str:
  """The formulas by which some source is rewarded."""
  formulas = {
    source["reward"]
    for stage in account.summary["stages"].values()
    for source in stage["rows"].values()
  }
  return " | ".join(sorted(formulas))


def _rates(schedule: Mapping[str, Any]) -> str:
  return (
    f"{schedule['updates']:,} updates, {len(schedule['restarts'])} restarts, "
    f"learning rates that sum to {schedule['sum_of_rates']:.4g}"
  )


def _values(stages: Mapping[str, Mapping[str, Any]], field: str) -> str:
  """The values that a field has in some stage."""
  values = {json.dumps(stage.get(field)) for stage in stages.values()}
  return " | ".join(sorted(values))


def _equality(name: str, values: Sequence[Any]) -> Comparison:
  expected, found = values
  return name, str(expected), str(found), expected == found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  if not isinstance(value, dict):
    yield prefix, value
    return
  for key, inner in value.items():
    yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
