"""What a run was given: rows, rewards, freezes and learning rates by stage."""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxvlm import paths
from jaxvlm.job import Job
from jaxvlm.stages import Stage


def write(
  workdir: paths.Path, job: Job, ledgers: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
  """Writes the ids of all rows; returns what summary.json says of them.

  rows.json.gz is {"train": {stage: {source: {"ids": [N], "draws": [N]}}},
  "held_out": {capability: [N]}}, where draws says how often the stage asks a
  row. In what is returned a set of rows is its number and the SHA-256 of its
  sorted ids, beside rewards, freezes and learning rates.

  Args:
    workdir: of the run.
    job: what it was given.
    ledgers: what each stage has used (`stages.Ledger` as a dict).
  """
  train = {
    stage.name: _listed(job, i, int(ledgers[stage.name]["questions"]))
    for i, stage in enumerate(job.schedule)
  }
  held_out = {
    rows.capability: list(rows.source.row_ids) for rows in job.held_out
  }
  content = json.dumps({"train": train, "held_out": held_out})
  # No time of writing: runs of the same rows write the same bytes.
  paths.write(
    paths.path(workdir) / "rows.json.gz",
    gzip.compress(content.encode(), mtime=0),
  )
  return {
    "stages": {s.name: _stage(s, train[s.name]) for s in job.schedule},
    "held_out": {
      rows.capability: {"reward": rows.reward} | _set(held_out[rows.capability])
      for rows in job.held_out
    },
    "schedule": schedule(job.schedule),
    "allows": job.config["allows"],
  }


def _listed(job: Job, index: int, questions: int) -> dict[str, dict[str, Any]]:
  draws = job.make_loader(index).count(questions)
  sources = job.sources[job.schedule[index].name]
  return {
    name: {"ids": list(source.row_ids), "draws": draws[name].tolist()}
    for name, source in sources.items()
  }


def _stage(stage: Stage, rows: Mapping[str, Any]) -> dict[str, Any]:
  def formula(own: Sequence[tuple[str, float]]) -> str:
    if stage.kind == "sft":
      return "none"
    return " + ".join(
      f"{weight:g} {name}" for name, weight in own or stage.rewards
    )

  return {
    "kind": stage.kind,
    "steps": stage.steps,
    "reward": formula(()),
    "freeze": stage.freeze,
    "rows": {
      name: _set(source["ids"])
      | {
        "questions": sum(source["draws"]),
        "reward": formula(stage.data[name]["rewards"]),
      }
      for name, source in rows.items()
    },
  }


def _set(ids: Sequence[str]) -> dict[str, Any]:
  digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
  return {"rows": len(ids), "sha256": digest}


def schedule(stages: Sequence[Stage]) -> dict[str, Any]:
  """Learning rates of all updates in order, and where the optimizer restarts.

  Runs of the same rates and restarts, in stages of whatever number, have the
  same hash.
  """
  rates: list[float] = []
  restarts: list[int] = []
  for i, stage in enumerate(stages):
    if stage.reset_optimizer or i == 0:
      restarts.append(len(rates))
    rates += [stage.learning_rate_at(update) for update in range(stage.updates)]
  told = json.dumps([restarts, [f"{rate:.9e}" for rate in rates]])
  return {
    "updates": len(rates),
    "restarts": restarts,
    "sum_of_rates": float(f"{sum(rates):.9e}"),
    "sha256": hashlib.sha256(told.encode()).hexdigest(),
  }
