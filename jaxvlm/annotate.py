"""Pass rates of a source's rows: from the picture, a caption, or neither.

A batch that is done is a file in a directory beside the output, so that a
command that was killed goes on there. What a completion is depends on the
seed, the row and the completion's number alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import pyarrow

from jaxvlm import annotations, compiling, paths, workdir
from jaxvlm.annotations import (
  COMPLETIONS,
  GENERATED,
  LENGTH,
  RATE,
  TRUNCATED,
  VIEWS,
)
from jaxvlm.data.rows import combined_seed
from jaxvlm.display import Display
from jaxvlm.evaluate import Answered, Asked, answer
from jaxvlm.job import Job
from jaxvlm.rollout.sampler import Draws, Weights
from jaxvlm.scoring import Scorer
from jaxvlm.types import Example, Question
from jaxvlm.views import Views

Record = dict[str, Any]  # what is known of one row in one view

CAPTIONS = "captions"  # beside the views
_PIECES, _PIECE = 64, 2**16  # of a file that are hashed, and bytes of each
_TOLD = 5  # failures of rewards that are told one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is asked of each row of one source of a stage."""

  stage: str
  source: str
  views: tuple[str, ...]  # of annotations.VIEWS
  completions: int
  temperature: float | None  # 0: the likeliest tokens; None: the stage's
  caption_key: str  # column of the captions; "": the checkpoint makes them
  caption_prompt: str  # that it is asked beside a picture; "": not asked

  def __post_init__(self) -> None:
    unknown = [view for view in self.views if view not in VIEWS]
    if unknown or not self.views or len(set(self.views)) < len(self.views):
      raise ValueError(
        f"views: got {self.views}; expected some of {', '.join(VIEWS)}, each "
        "once."
      )
    if self.completions < 1 or (self.temperature or 0) < 0:
      raise ValueError(
        f"completions: got {self.completions} at temperature "
        f"{self.temperature}; expected at least 1, at 0 or more."
      )
    captions = bool(self.caption_key) + bool(self.caption_prompt)
    if captions != ("caption" in self.views):
      raise ValueError(
        "caption_key, caption_prompt: the view caption needs one of them, a "
        "column of the rows or what the checkpoint is asked; the other views "
        f"none. Got {self.caption_key!r} and {self.caption_prompt!r}."
      )


def narrowed(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
  """The config of a run on that source alone, without evaluations.

  Raises:
    ValueError: there are several hosts, it has no such stage or source, names
      no checkpoint, or all completions of a row would be the same.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"annotate: got {jax.process_count()} hosts; expected one. Give each a "
      "share of the rows instead (filter, or files of their own)."
    )
  stages = config["stages"]
  if plan.stage not in stages:
    raise ValueError(
      f"stage: no stage {plan.stage!r}; there are {', '.join(stages)}."
    )
  stage = stages[plan.stage]
  if plan.source not in stage["data"]:
    raise ValueError(
      f"source: no {plan.source!r} in stages.{plan.stage}.data; there are "
      f"{', '.join(stage['data'])}."
    )
  if not config["model"]["checkpoint"]:
    raise ValueError(
      "model.checkpoint: got ''; expected the directory of the checkpoint that "
      "answers."
    )
  entry = stage["data"][plan.source]
  shuffled = entry.get("shuffle_options")
  if plan.temperature == 0 and plan.completions > 1 and not shuffled:
    raise ValueError(
      f"completions: got {plan.completions} at temperature 0, where all are the "
      "same; expected 1, or a source with shuffle_options."
    )
  alone = {"data": {plan.source: entry}, "order": "", "promote": "latest"}
  nothing: dict[str, Any] = {"capabilities": (), "sets": {}}
  return dict(config) | {
    "schedule": (plan.stage,),
    "hold_schedule": (),
    "stages": {plan.stage: stage | alone},
    "evaluation": config["evaluation"] | nothing,
  }


def parts_of(output: Any) -> Any:
  """Where the batches are kept until all are done."""
  return output.with_name(f"{output.name}.parts")


def run(job: Job, plan: Plan, output: Any, display: Display) -> None:
  """Annotates the plan's source and writes the output, or goes on with it.

  Args:
    job: of the `narrowed` config.
    plan: what is asked.
    output: the parquet file.
    display: shows the progress, and a summary.

  Raises:
    ValueError: no reward, rows without a caption, an output or parts of other
      settings, or a program compiled for too many shapes.
    OSError: a file cannot be written.
  """
  source = job.sources[plan.stage][plan.source]
  settings: dict[str, Any] = {
    "config": job.config,
    "plan": dataclasses.asdict(plan),
    "checkpoint": _fingerprint(paths.path(job.config["model"]["checkpoint"])),
    "rows": combined_seed(0, source.row_ids),
  }
  parts = parts_of(output)
  if output.exists():
    _check_same(output, annotations.read_settings(output), settings)
    display.print("All rows were annotated before.")
  else:
    own = annotations.own_columns(source)
    with contextlib.ExitStack() as stack:
      asker = _Asker(job, plan, parts, display, stack)
      asker.check_captions()
      stack.enter_context(workdir.lock(parts))
      file = parts / "settings.json"
      if file.exists():
        _check_same(parts, json.loads(file.read_text()), settings)
      paths.write(file, json.dumps(settings).encode())
      annotations.write(output, source, own, asker.columns(), settings)
  annotations.print_summary(output, display.console)
  paths.remove(parts)


class _Asker:
  """Asks the rows of a source in every view."""

  def __init__(
    self,
    job: Job,
    plan: Plan,
    parts: Any,
    display: Display,
    stack: contextlib.ExitStack,
  ):
    self._job = job
    self._plan = plan
    self._parts = parts
    self._display = display
    self._stack = stack
    self._sampler = job.make_sampler()
    self._batch = job.config["evaluation"]["batch_questions"]
    self._failures = 0
    (self._stage,) = job.schedule
    source = job.sources[plan.stage][plan.source]
    self._row_ids = source.row_ids
    self._views = Views(
      source,
      seed=job.config["seed"],
      completions=plan.completions,
      caption_key=plan.caption_key,
      caption_prompt=plan.caption_prompt,
    )
    rewards = source.examples[source.kept[0]].rewards or self._stage.rewards
    if not rewards:
      raise ValueError(
        f"stages.{plan.stage}.rewards: has none; the first of them is what "
        "says whether an answer is right."
      )
    self._reward = rewards[0][0]

  def check_captions(self) -> None:
    """Raises ValueError for a row without caption, or with one too long."""
    if not self._plan.caption_key:
      return
    longest = self._job.config["inputs"]["max_prompt_length"]
    for prompt, *_ in self._views.prompts.values():
      example = self._views.example("caption", prompt, {})
      length = self._job.processor.length(example)
      if length > longest:
        raise ValueError(
          f"{example.name}: {length} tokens with its caption; "
          f"inputs.max_prompt_length is {longest}."
        )

  def columns(self) -> dict[str, pyarrow.Array]:
    """The new columns, for each kept row of the source."""
    plan, views = self._plan, self._views
    greedy = Draws(
      num_completions=1,
      max_completion_length=self._stage.max_completion_length,
      temperature=0.0,
      top_k=0,
      top_p=1.0,
    )
    temperature = plan.temperature
    if temperature is None:
      temperature = self._stage.temperature
    draws = dataclasses.replace(
      greedy, num_completions=views.completions, temperature=temperature
    )
    columns: dict[str, pyarrow.Array] = {}
    captions: dict[str, str] = {}
    if plan.caption_prompt:
      found = self._ask(
        CAPTIONS, views.pictures(), views.picture, greedy, scored=False
      )
      captions = {name: record["caption"] for name, record in found.items()}
      columns[GENERATED] = pyarrow.array(
        "\n".join(views.captions(row, captions)) for row in self._row_ids
      )
    prompts = [name for names in views.prompts.values() for name in names]
    for view in plan.views:
      show = functools.partial(views.example, view, captions=captions)
      found = self._ask(view, prompts, show, draws, scored=True)
      for name in (RATE, LENGTH, TRUNCATED):
        columns[f"{name}{VIEWS[view]}"] = pyarrow.array(
          [
            _mean([found[prompt][name] for prompt in views.prompts[row]])
            for row in self._row_ids
          ],
          pyarrow.float64(),
        )
    counts = [plan.completions] * len(self._row_ids)
    columns[COMPLETIONS] = pyarrow.array(counts)
    return columns

  # -- asking ----------------------------------------------------------------

  @functools.cached_property
  def _weights(self) -> Weights:
    return self._sampler.weights(self._job.load_params(self._display))

  @functools.cached_property
  def _scorer(self) -> Scorer:
    made = self._job.make_scorer(((self._reward, 1.0),))
    return self._stack.enter_context(made)

  def _ask(
    self,
    view: str,
    names: Sequence[str],
    example: Callable[[str], Example],
    draws: Draws,
    *,
    scored: bool,
  ) -> dict[str, Record]:
    """A record of each name, from the parts where they have it."""
    batches = [
      names[start : start + self._batch]
      for start in range(0, len(names), self._batch)
    ]
    files = [
      self._parts / f"{view}.{number:06}.json" for number in range(len(batches))
    ]
    done = [file.exists() for file in files]
    todo = [i for i in range(len(batches)) if not done[i]]
    answered = self._answered(
      view, [batches[i] for i in todo], example, draws, scored=scored
    )
    with self._display.task(
      f"answer: {view}" if scored else view,
      total=len(names),
      done=sum(len(batches[i]) for i in range(len(batches)) if done[i]),
    ) as advance:
      for i, found in zip(todo, answered, strict=True):
        records = self._captions_of(found) if not scored else self._rates(found)
        paths.write(files[i], json.dumps(records).encode())
        advance(len(batches[i]))
        most = self._job.config["limits"]["programs"]
        if too_many := compiling.excess(most):
          raise ValueError(f"{view}: {too_many}")
    return {
      name: record
      for batch, file in zip(batches, files, strict=True)
      for name, record in zip(batch, json.loads(file.read_text()), strict=True)
    }

  def _answered(
    self,
    view: str,
    batches: Sequence[Sequence[str]],
    example: Callable[[str], Example],
    draws: Draws,
    *,
    scored: bool,
  ) -> Iterator[Answered]:
    if not batches:
      return iter(())
    processor = self._job.processor
    if not scored:  # how to answer is not said where a caption is wanted
      processor = dataclasses.replace(processor, prompt_suffix="")
    key = jax.random.fold_in(
      jax.random.key(self._job.config["seed"]), zlib.crc32(view.encode())
    )

    def prepare(name: str) -> Question:
      return processor.question(example(name), zlib.crc32(name.encode()))

    def asked() -> Iterator[Asked]:
      with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches:
          questions = list(pool.map(prepare, batch))
          questions += questions[:1] * (self._batch - len(batch))
          yield Asked(questions=questions, own=len(batch), key=key, draws=draws)

    return answer(
      asked(),
      sampler=self._sampler,
      weights=self._weights,
      decode=processor.decode,
      scorer=self._scorer if scored else None,
    )

  def _captions_of(self, found: Answered) -> list[Record]:
    return [{"caption": text.strip()} for (text,) in found.texts]

  def _rates(self, found: Answered) -> list[Record]:
    assert found.scores is not None
    for message in found.scores.messages:
      self._failures += 1
      if self._failures <= _TOLD:
        self._display.print(message)
      elif self._failures == _TOLD + 1:
        self._display.print("Further rewards that fail are counted below.")
    rates = found.scores.rewards.mean(1)
    lengths = found.rollout.completion_mask.sum(-1).mean(-1)
    return [
      {
        RATE: None if failed else float(rate),
        LENGTH: float(length),
        TRUNCATED: float(truncated),
      }
      for rate, failed, length, truncated in zip(
        rates,
        found.scores.failed,
        lengths,
        found.rollout.truncated.mean(-1),
        strict=True,
      )
    ]


def _mean(values: Sequence[float | None]) -> float | None:
  """None where a part is unknown."""
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if len(known) == len(values) else None


def _check_same(
  path: Any, before: dict[str, Any] | None, after: dict[str, Any]
) -> None:
  if before is None:
    raise ValueError(f"{path}: exists; choose another output.")
  if changed := workdir.changes(before, after):
    raise ValueError(
      f"{path}: was made with other settings. Choose another output, or the "
      "old values of\n" + "\n".join(changed)
    )


def _fingerprint(directory: Any) -> str:
  """Of a checkpoint: its files' names, sizes, and pieces all over them.

  Of one in a bucket its times in place of the pieces.
  """
  digest = hashlib.sha256()
  for file in paths.files(directory):
    if paths.remote(file):
      found = file.stat()
      said = f"{file.relative_to(directory)} {found.length} {found.mtime}\0"
      digest.update(said.encode())
      continue
    size = file.stat().st_size
    digest.update(f"{file.relative_to(directory)} {size}\0".encode())
    with open(file, "rb") as stream:
      for start in range(0, size, max(_PIECE, size // _PIECES)):
        stream.seek(start)
        digest.update(stream.read(_PIECE))
  return digest.hexdigest()[:16]
