"""What a run writes down: checkpoints, metrics, evaluations, results."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxvlm import (
  account,
  checkpoint,
  compiling,
  curves,
  hosts,
  models,
  paths,
  results,
)
from jaxvlm.batch import Batch, from_npz, to_npz
from jaxvlm.data.loader import Loader
from jaxvlm.display import Display
from jaxvlm.evaluate import Evaluator, HeldOut
from jaxvlm.job import Job
from jaxvlm.learner import TrainState
from jaxvlm.metrics import Logger, Sample
from jaxvlm.rollout.sampler import Sampler
from jaxvlm.stages import Stage
from jaxvlm.types import Params

_LAST_WORDS = 10.0  # seconds


class Stopped(RuntimeError):
  """The run cannot go on, for a limit or a file; what it saved is whole."""


class Interrupted(RuntimeError):
  """The run was asked to stop; says how it goes on."""


@dataclasses.dataclass(kw_only=True)
class Progress:
  """Where a run is; stands in every checkpoint."""

  stage: int = 0  # place in the schedule; its length: finished
  step: int = 0  # steps done in the stage
  global_step: int = 0
  best: float | None = None  # the stage's best held-out score
  skipped_updates: int = 0  # in the stage
  failed_groups: int = 0  # in the stage
  seconds: float = 0.0  # of all processes, up to this checkpoint
  ledgers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  owed: bool = False  # an evaluation that the run was stopped before
  # Devices along each axis, and processes; {}: of before this was written down.
  mesh: dict[str, int] = dataclasses.field(default_factory=dict)

  def next_stage(self) -> None:
    self.stage, self.step, self.best = self.stage + 1, 0, None
    self.skipped_updates = self.failed_groups = 0


class Books:
  """Keeps a run's records, so that it can be read and taken up again."""

  def __init__(self, job: Job, display: Display, sampler: Sampler):
    self._job = job
    self._display = display
    self._sampler = sampler
    self._stack = contextlib.ExitStack()
    self._checkpoints = checkpoint.Checkpointer(
      job.workdir / "checkpoints",
      keep_last=job.config["checkpoint"]["keep_last"],
      keep_best=job.config["checkpoint"]["keep_best"],
    )
    self._stack.callback(self._checkpoints.close)
    self._clock = time.monotonic()
    self._evaluator: Evaluator | None = None
    self._score: float | None = None
    self._saved = -1  # global step of the last checkpoint
    # What an evaluation that is interrupted leaves to be saved.
    self._held: Callable[[], None] | None = None
    self._waiting = b""  # groups of the checkpoint that was taken up
    self._warned: set[str] = set()
    self._writing: concurrent.futures.Future[None] | None = None

  def __enter__(self) -> "Books":
    return self

  def __exit__(self, *error: Any) -> None:
    self._stack.close()

  # -- taking up -------------------------------------------------------------

  def restore(self) -> tuple[TrainState | None, Progress, dict[str, Any]]:
    """State, progress and loader position of the newest good checkpoint.

    Raises:
      Stopped: there are checkpoints, and none can be read.
    """
    with _files_read():
      saved = self._checkpoints.restore(self._like)
    if saved is None:
      progress, position, state = Progress(), {}, None
    else:
      state, position = saved.state, saved.loader
      self._saved, self._waiting = saved.step, saved.host
      progress = Progress(**saved.progress)
    before, now = progress.mesh, self._job.devices
    if before and before != now:
      told = ", ".join(
        f"{name}: {before[name]} -> {now[name]}"
        for name in now
        if before[name] != now[name]
      )
      self._display.print(
        f"Another mesh, so not bit for bit from here on: {told}."
      )
    progress.mesh = dict(now)
    log = self._job.config["log"]
    with _files_read():
      self._logger = Logger(
        self._job.workdir,
        resume_step=progress.global_step if saved else -1,
        tensorboard=log["tensorboard"],
        wandb_project=log["wandb_project"],
        primary=self._job.primary,
        show=self._display.show,
      )
    self._stack.callback(self._logger.close)
    # Records are written beside the device's work on the next step.
    self._writer = self._stack.enter_context(
      concurrent.futures.ThreadPoolExecutor(1, "records")
    )
    self._clock = time.monotonic() - progress.seconds
    return state, progress, position

  def waiting(self, loader: Loader) -> Batch | None:
    """The groups that waited for the next step where the run was taken up.

    Asked again, there are none: a stage begins without.
    """
    content, self._waiting = self._waiting, b""
    return from_npz(content, loader.question) if content else None

  def _like(self, progress: Mapping[str, Any]) -> TrainState:
    """Shapes and places of the state saved at this progress."""
    job = self._job
    stage = job.schedule[min(progress["stage"], len(job.schedule) - 1)]
    return job.make_learner(stage).abstract(job.abstract_params())

  def base(self) -> Params:
    """The weights that the run starts from.

    Raises:
      Stopped: they are no weights of this network; says which are not.
    """
    with _files_read():
      return self._job.load_params(self._display)

  def reference(
    self, stage: Stage, params: Params, progress: Progress
  ) -> Params | None:
    """Weights that the KL term of a stage refers to; None: no such term."""
    if not stage.kl_coef or stage.kind == "sft":
      return None
    job = self._job
    if stage.reference == "base":
      return self.base()
    path = job.workdir / "stage_starts" / stage.name
    if progress.step:
      with _files_read():
        return checkpoint.load_params(path, job.abstract_params())
    # A copy, for updates reuse the memory of the weights they replace.
    start = jax.tree.map(jnp.copy, params)
    checkpoint.save_params(path, start)
    return start

  # -- writing down ----------------------------------------------------------

  def step(
    self,
    stage: Stage,
    progress: Progress,
    batch: Batch,
    metrics: Mapping[str, float],
    timing: Mapping[str, float],
  ) -> None:
    """Records one step, and some of its samples, in the background.

    Raises:
      OSError: what was recorded before could not be written.
    """
    self.written()
    place: dict[str, Any] = {
      "stage": stage.name,
      "step": progress.step,
      "global_step": progress.global_step,
    }
    log = self._job.config["log"]
    every = log["samples_every"]
    shown = (
      log["samples"] if every and progress.step % every == 1 % every else 0
    )

    def write() -> None:
      self._logger.step(**place, metrics=metrics, timing=timing)
      if shown:
        self._logger.samples(**place, samples=_samples(self._job, batch, shown))

    self._writing = self._writer.submit(write)

  @contextlib.contextmanager
  def recording(self) -> Iterator[None]:
    """Where the run fails within, what was recorded is written first.

    It is waited for a little: hosts that fail end at once.
    """
    try:
      yield
    except BaseException:
      if self._writing is not None:
        concurrent.futures.wait([self._writing], timeout=_LAST_WORDS)
      raise

  def written(self) -> None:
    """Returns when what was recorded is written down."""
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()

  def warn(self, stage: Stage, message: str | None) -> None:
    """Tells something once in a stage, however often it is so."""
    if message and stage.name not in self._warned:
      self._warned.add(stage.name)
      self._display.print(message)

  def save(
    self,
    state: TrainState,
    progress: Progress,
    position: dict[str, Any],
    waiting: Batch | None,
  ) -> None:
    """Writes a checkpoint, in the background.

    Where a run that was stopped at the end of a stage goes on, the one that it
    goes on from does for that of the hand-off too.

    Args:
      state: of the policy.
      progress: where the run is.
      position: in the data.
      waiting: this host's groups that the next step begins with; None: none.
    """
    self.written()
    if progress.global_step == self._saved:
      return
    self._saved, self._held = progress.global_step, None
    progress.seconds = time.monotonic() - self._clock
    self._checkpoints.save(
      progress.global_step,
      state,
      loader=position,
      progress=dataclasses.asdict(progress),
      host=to_npz(waiting) if waiting else b"",
      score=self._score,
    )
    self._score = None

  def heed(
    self,
    state: TrainState,
    progress: Progress,
    position: dict[str, Any],
    waiting: Batch | None,
  ) -> None:
    """Ends the run where it was asked to stop, all of it saved.

    Raises:
      Interrupted: it was.
    """
    self._held = functools.partial(
      self.save, state, progress, position, waiting
    )
    if hosts.asked_to_stop():
      raise self._interrupted()

  def _interrupted(self) -> Interrupted:
    """What to raise when a step is done, or within an evaluation."""
    if self._held is not None:
      self._held()
      self._checkpoints.wait()
    if self._saved < 0:
      return Interrupted(
        "Stopped by SIGTERM before the first step; the same command begins anew."
      )
    return Interrupted(
      f"Stopped by SIGTERM after {self._saved} steps, which are saved; the "
      "same command goes on."
    )

  def evaluate(
    self, name: str, params: Params, progress: Progress, stage: Stage | None
  ) -> None:
    """Scores the policy on held-out data; keeps a stage's best weights.

    Raises:
      Interrupted: the run was asked to stop meanwhile.
      Stopped: a program was compiled for too many shapes.
    """
    if not self._job.held_out:
      return
    if self._evaluator is None:
      self._evaluator = self._make_evaluator()
    started = time.monotonic()
    with self._display.task(
      "evaluate", total=self._evaluator.batches()
    ) as advance:

      def answered() -> None:
        advance(1)
        if hosts.asked_to_stop():
          raise self._interrupted()

      metrics = self._evaluator.run(params, answered)
    progress.owed = False
    self.written()
    self._logger.evaluation(
      stage=name,
      global_step=progress.global_step,
      metrics=metrics,
      timing={"seconds": time.monotonic() - started},
    )
    self._check_programs(f"evaluation of {name}")
    if stage is None or not stage.metric:
      return
    self._score = metrics[stage.metric]
    if progress.best is None or self._score > progress.best:
      progress.best = self._score
      if stage.promote == "best":
        path = self._job.workdir / "best" / stage.name
        checkpoint.save_params(path, params)

  def promoted(self, stage: Stage, params: Params) -> Params:
    """The weights that the next stage starts from."""
    if stage.promote == "latest":
      return params
    path = self._job.workdir / "best" / stage.name
    with _files_read():
      return checkpoint.load_params(path, self._job.abstract_params())

  def export(self, stage: Stage, params: Params) -> None:
    """Writes what a stage hands over for transformers, where that is asked."""
    job = self._job
    if job.config["checkpoint"]["export_stages"]:
      place = job.workdir / f"hf_{stage.name}"
      models.save_hf(job.network, params, job.checkpoint, place)

  def check_limits(
    self,
    stage: Stage,
    progress: Progress,
    metrics: Mapping[str, float],
    batch: Batch,
  ) -> None:
    """Raises Stopped where too much went wrong; the batch learned from dumped."""
    limits = self._job.config["limits"]
    if metrics.get("picture_effect") == 0:
      raise Stopped(
        f"stage {stage.name}: the model is blind. Its completions are exactly "
        "as likely when questions are shown each other's pictures "
        "(picture_effect is 0). Look for vision weights that are zero or "
        "missing, and at the prompts in samples.jsonl; "
        "--config.limits.blind_every=0 goes on without this check."
      )
    if progress.skipped_updates > limits["skipped_updates"]:
      step, host = progress.global_step, jax.process_index()
      of = f"_host{host}" if jax.process_count() > 1 else ""
      file = self._job.workdir / f"not_finite_{step}{of}.npz"
      paths.write(file, to_npz(batch))
      raise Stopped(
        f"stage {stage.name}: {progress.skipped_updates} updates had a "
        f"gradient that is not finite; limits.skipped_updates is "
        f"{limits['skipped_updates']}. The last batch is in {file}. Look for "
        "huge ratios or KL there; a smaller learning rate or kl_limit helps."
      )
    if progress.failed_groups > limits["failed_groups"]:
      raise Stopped(
        f"stage {stage.name}: the rewards of {progress.failed_groups} groups "
        f"failed; limits.failed_groups is {limits['failed_groups']}. Mend the "
        "reward named above, or raise rewards.timeout."
      )
    self._check_programs(f"stage {stage.name}")

  def _check_programs(self, where: str) -> None:
    """Raises Stopped where a program was compiled for too many shapes."""
    most = self._job.config["limits"]["programs"]
    if too_many := compiling.excess(most):
      raise Stopped(f"{where}: {too_many}")

  def finish(self, params: Params, progress: Progress) -> None:
    """Exports the policy, draws the curves and prints the results."""
    job = self._job
    self._checkpoints.wait()
    if job.primary:
      curves.draw_curves(job.workdir)
      results.write_summary(
        job.workdir,
        seconds=time.monotonic() - self._clock,
        given=account.write(job.workdir, job, progress.ledgers),
        ledger=progress.ledgers,
        dropped=job.dropped,
      )
    # Last, for with it the run is finished.
    export = export_of(job.workdir)
    models.save_hf(job.network, params, job.checkpoint, export)
    if job.primary:
      results.print_results(
        job.workdir,
        self._display.console,
        artefacts={"trained model": export},
      )

  def _make_evaluator(self) -> Evaluator:
    job = self._job
    knobs = dict(job.config["evaluation"])
    for name in ("every", "capabilities", "sets"):
      del knobs[name]
    scorers: dict[str, Any] = {}
    for rows in job.held_out:
      if rows.reward not in scorers:
        scorers[rows.reward] = self._stack.enter_context(
          job.make_scorer(((rows.reward, 1.0),))
        )
    return Evaluator(
      [
        HeldOut(
          capability=rows.capability,
          examples=rows.examples,
          questions=rows.questions,
          scorer=scorers[rows.reward],
        )
        for rows in job.held_out
      ],
      sampler=self._sampler,
      decode=job.processor.decode,
      seed=job.config["seed"],
      **knobs,
    )


def export_of(workdir: Any) -> Any:
  """The trained model; with the last of its files the run is finished."""
  return workdir / "hf"


def finished(workdir: Any) -> bool:
  """Whether the run of a workdir has come to its end."""
  return (export_of(workdir) / "config.json").exists()


@contextlib.contextmanager
def _files_read() -> Iterator[None]:
  """Lets what is wrong with a file end the run as a limit does: in a line."""
  try:
    yield
  except ValueError as error:
    raise Stopped(str(error)) from error


def _samples(job: Job, batch: Batch, count: int) -> list[Sample]:
  """The first completion of the first questions."""
  rollout, scores = batch.rollout, batch.scores
  return [
    Sample(
      question_id=question.question_id,
      problem=question.example.problem,
      answer=question.example.answer,
      completion=job.processor.decode(
        rollout.completion_ids[q, 0][rollout.completion_mask[q, 0]]
      ),
      reward=float(scores.rewards[q, 0]),
      parts={name: float(part[q, 0]) for name, part in scores.parts.items()},
      images=question.example.images,
    )
    for q, question in enumerate(batch.questions[:count])
  ]
