"""What arms came to over seeds: table, picture and JSON, and what is unequal."""

import json
import math
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box, table
from rich.console import Console

from jaxvlm import forest, paired, paths
from jaxvlm.equality import LEDGER, Account, differences, read_account
from jaxvlm.forest import OVERALL
from jaxvlm.paths import Path

EFFECT = 1.5  # points, what the paper gains by its stages
_MEAN = re.compile(r"(?P<capability>[^/]+)/(?P<kind>mean@\d+)")
_LEDGER_WORDS = {
  "prompt_tokens": "prompt",
  "generated_tokens": "generated",
  "trained_tokens": "trained",
  "model_flops": "FLOPs",
}

Scores = dict[str, dict[str, float]]  # capability -> kind -> value
Runs = Mapping[str, Mapping[int, Path]]  # arm -> seed -> workdir


class Table(NamedTuple):
  """Text in rows and columns, for a terminal or a page."""

  title: str
  header: list[str]
  rows: list[list[str]]
  caption: str


def summarize(runs: Runs, *, allows: Sequence[str] = ()) -> dict[str, Any]:
  """Everything there is to say of finished runs, as JSON holds it.

  Args:
    runs: workdirs; the first arm is what the others are compared with, seed
      by seed.
    allows: names of differences that are no error (`equality.differences`).

  Returns:
    For each arm its runs (scores in shares of 1 and tokens, ledger in all and
    by stage, rewards, differences from the first arm), their mean and
    standard deviation, and the paired tests, in points. `errors` says what
    differs and is not allowed.

  Raises:
    ValueError: a run cannot be read.
  """
  accounts = {
    arm: {seed: read_account(workdir) for seed, workdir in seeds.items()}
    for arm, seeds in runs.items()
  }
  first, *_ = accounts
  found: dict[str, Any] = {"baseline": first, "effect": EFFECT, "errors": []}
  found["start"] = _spread([_scores(a, 0) for a in accounts[first].values()])
  found["arms"] = {
    arm: _arm(arm, each, accounts[first], runs[arm], found["errors"], allows)
    for arm, each in accounts.items()
  }
  _adjust([arm["tests"] for arm in found["arms"].values()])
  return found


def _arm(
  arm: str,
  accounts: Mapping[int, Account],
  baseline: Mapping[int, Account],
  workdirs: Mapping[int, Path],
  errors: list[str],
  allows: Sequence[str],
) -> dict[str, Any]:
  runs = {}
  for seed, account in accounts.items():
    differs = []
    if seed in baseline:
      differs = differences(baseline[seed], account, allows=allows)
      errors += [
        f"{arm}, seed {seed}: {one}" for one in differs if not one.allowed
      ]
    runs[seed] = {
      "workdir": str(workdirs[seed]),
      "scores": _scores(account, -1),
      "ledger": {name: account.total(name) for name in LEDGER},
      "stages": account.summary["stages"],
      "ledger_by_stage": account.summary["ledger"],
      "differences": {one.name: str(one) for one in differs if one.allowed},
      "seconds": account.summary["seconds"],
    }
  shared = [seed for seed in accounts if seed in baseline]
  return {
    "runs": runs,
    "scores": _spread([run["scores"] for run in runs.values()]),
    "ledger_ratio": {
      name: statistics.fmean(
        _ratio(accounts[seed].total(name), baseline[seed].total(name))
        for seed in shared
      )
      for name in LEDGER
      if shared
    },
    "tests": _tests(
      [
        (_scores(accounts[seed], -1), _scores(baseline[seed], -1))
        for seed in shared
        if accounts[seed] is not baseline[seed]
      ]
    ),
  }


def _ratio(value: float, expected: float) -> float:
  return value / expected if expected else float(value == expected)


def _scores(account: Account, place: int) -> Scores:
  """Scores of one of a run's evaluations, and their mean over capabilities."""
  evaluations = account.summary["evaluations"]
  metrics = evaluations[place]["metrics"] if evaluations else {}
  scores: Scores = {}
  for name in metrics:
    if match := _MEAN.fullmatch(name):
      capability = match["capability"]
      scores[capability] = {
        kind: metrics[f"{capability}/{kind}"]
        for kind in (match["kind"], "greedy", "length")
      }
  if scores:
    kinds = next(iter(scores.values()))
    scores[OVERALL] = {
      kind: statistics.fmean(each[kind] for each in scores.values())
      for kind in kinds
    }
  return scores


def _spread(scores: Sequence[Scores]) -> dict[str, dict[str, Any]]:
  """Mean and standard deviation over seeds; None: one seed has none."""

  def spread(values: Sequence[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": values}

  return {
    capability: {
      kind: spread([each[capability][kind] for each in scores])
      for kind in kinds
    }
    for capability, kinds in (scores[0] if scores else {}).items()
  }


def _tests(pairs: Sequence[tuple[Scores, Scores]]) -> dict[str, Any]:
  """Paired tests of each accuracy, in points."""
  return {
    capability: {
      kind: vars(
        paired.compare(
          [100 * (a[capability][kind] - b[capability][kind]) for a, b in pairs],
          effect=EFFECT,
        )
      ).copy()
      for kind in kinds
      if kind != "length"
    }
    for capability, kinds in (pairs[0][0] if pairs else {}).items()
  }


def _adjust(tests: Sequence[dict[str, Any]]) -> None:
  """Adds p_holm: p for as many arms as are compared in one column."""
  told = [each for each in tests if each]
  for capability, kinds in (told[0] if told else {}).items():
    for kind in kinds:
      family = [each[capability][kind] for each in told]
      adjusted = paired.holm([test["p"] for test in family])
      for test, p in zip(family, adjusted, strict=True):
        test["p_holm"] = p


# Tables.


def tables(found: Mapping[str, Any]) -> list[Table]:
  """Accuracy and length, ledger, and the tests of each kind of accuracy."""
  capabilities = list(found["start"])
  kinds = list(found["start"][OVERALL]) if capabilities else []
  return [
    *([_score_table(found, capabilities, kinds)] if kinds else []),
    _ledger_table(found),
    *(
      _test_table(found, capabilities, kind)
      for kind in kinds
      if kind != "length" and len(found["arms"]) > 1
    ),
  ]


def _score_table(
  found: Mapping[str, Any], capabilities: list[str], kinds: list[str]
) -> Table:
  rows = []
  scores = {"start": found["start"]}
  scores |= {arm: each["scores"] for arm, each in found["arms"].items()}
  for arm, each in scores.items():
    for kind in kinds:
      cells = [
        _cell(each[capability][kind], kind) for capability in capabilities
      ]
      rows.append([arm if kind == kinds[0] else "", kind, *cells])
  seeds = sorted(
    {seed for each in found["arms"].values() for seed in each["runs"]}
  )
  return Table(
    "Held-out accuracy in percent, and completion length in tokens",
    ["arm", "", *map(_words, capabilities)],
    rows,
    f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; "
    "start: before the first stage that is compared",
  )


def _words(name: str) -> str:
  return name.replace("_", " ")


def _cell(spread: Mapping[str, Any], kind: str) -> str:
  scale = 1 if kind == "length" else 100
  mean = f"{scale * spread['mean']:.1f}"
  return (
    mean if spread["sd"] is None else f"{mean} ± {scale * spread['sd']:.1f}"
  )


def _ledger_table(found: Mapping[str, Any]) -> Table:
  """Totals of the first arm, of the others as multiples; minutes of a run."""
  rows, allowed = [], []
  for arm, each in found["arms"].items():
    runs = each["runs"].values()
    if arm == found["baseline"]:
      cells = [
        _short(statistics.fmean(run["ledger"][name] for run in runs))
        for name in LEDGER
      ]
    else:
      cells = [f"{each['ledger_ratio'].get(n, math.nan):.3f}" for n in LEDGER]
    minutes = statistics.fmean(run["seconds"] for run in runs) / 60
    rows.append([arm, *cells, f"{minutes:.1f}"])
    names = dict.fromkeys(name for run in runs for name in run["differences"])
    if names:
      allowed.append(f"{arm} in {', '.join(names)}")
  return Table(
    "Ledger of the stages that are compared",
    ["arm", *(_LEDGER_WORDS.get(n, n) for n in LEDGER), "minutes"],
    rows,
    f"{found['baseline']} in full, the others as multiples of it; prompt, "
    "generated and trained in tokens; minutes of one run. Differs, as its config "
    f"allows: {'; '.join(allowed) or 'none'}",
  )


def _short(value: float) -> str:
  """Three digits and a unit: 421k, 1.52T."""
  for unit in ("", "k", "M", "G", "T", "P", "E"):
    if value < 999.5:
      return f"{value:.3g}{unit}"
    value /= 1000
  return f"{value:.3g}Z"


def _test_table(
  found: Mapping[str, Any], capabilities: list[str], kind: str
) -> Table:
  rows = []
  for arm, each in found["arms"].items():
    if not each["tests"]:
      continue
    tests = {name: each["tests"][name][kind] for name in capabilities}
    overall = tests[OVERALL]
    rows.append(
      [
        arm,
        *map(_test_cell, tests.values()),
        "–" if math.isnan(overall["p"]) else f"{overall['p']:.2g}",
        _count(overall["needed"]),
      ]
    )
  return Table(
    f"Points of {kind} above {found['baseline']}, paired by seed",
    ["arm", *map(_words, capabilities), "p", f"seeds for {EFFECT:g}"],
    rows,
    "mean ± half of the 95 % interval, * where p of the paired t-test is below "
    "0.05 after Holm's correction for the number of arms; p and seeds are "
    f"overall's: so many would see {EFFECT:g} points with 80 % power",
  )


def _test_cell(test: Mapping[str, Any]) -> str:
  if math.isnan(test["p"]):
    return f"{test['mean']:+.1f}"
  star = "*" if test["p_holm"] < paired.LEVEL else ""
  return f"{test['mean']:+.1f} ± {test['high'] - test['mean']:.1f}{star}"


def _count(needed: float) -> str:
  if math.isnan(needed):
    return "–"
  return "> 100,000" if math.isinf(needed) else f"{needed:,.0f}"


def print_tables(found: Mapping[str, Any], console: Console) -> None:
  for each in tables(found):
    shown = table.Table(
      title=each.title,
      caption=each.caption,
      title_justify="left",
      caption_justify="left",
      box=box.SIMPLE_HEAD,
      pad_edge=False,
    )
    for i, word in enumerate(each.header):
      shown.add_column(word, no_wrap=i == 0)
    for row in each.rows:
      shown.add_row(*row)
    console.print(shown)


def to_markdown(found: Mapping[str, Any]) -> str:
  """The tables as a page, what is unequal at its top."""
  parts = [f"**Unequal:** {error}\n" for error in found["errors"]]
  for each in tables(found):
    lines = [each.header, ["---"] * len(each.header), *each.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts.append(f"{each.title}:\n\n{body}\n\n({each.caption})\n")
  return "\n".join(parts)


def write(directory: Path, found: Mapping[str, Any]) -> None:
  """Writes comparison.json, comparison.md and comparison.png."""
  here = pathlib.Path(directory)
  text = json.dumps(_finite(found), indent=2, allow_nan=False) + "\n"
  paths.write(here / "comparison.json", text.encode())
  paths.write(here / "comparison.md", to_markdown(found).encode())
  if found["start"]:
    paths.write(here / "comparison.png", forest.draw(found))


def _finite(value: Any) -> Any:
  """JSON knows neither NaN nor infinity."""
  if isinstance(value, Mapping):
    return {str(key): _finite(inner) for key, inner in value.items()}
  if isinstance(value, list):
    return [_finite(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
