"""The loop: for each stage, for each step: roll out, score, learn."""

import contextlib
import time
import zlib
from typing import Any

import jax

from jaxvlm import compiling, hosts, watch
from jaxvlm.batch import Batch, join
from jaxvlm.books import Books, Interrupted, Stopped
from jaxvlm.display import Display
from jaxvlm.job import Job
from jaxvlm.learner import TrainState
from jaxvlm.metrics import Timers, add, means
from jaxvlm.rollout.sampler import Weights
from jaxvlm.scoring import briefly
from jaxvlm.stages import Ledger, Stage
from jaxvlm.step import (
  advantages_of,
  choose,
  encode_frozen,
  enough,
  grade,
  learn,
  policy_logprobs,
  roll_out,
  sampling_weights,
)


def run(job: Job, display: Display) -> None:
  """Runs the schedule, from the newest checkpoint if there is one.

  Raises:
    Stopped: a limit of the config was reached, or a file cannot be read.
    Interrupted: the run got a SIGTERM; the step at hand was done and saved.
    OSError: a file cannot be written, as on a full disk.
  """
  sampler, timers = job.make_sampler(), Timers()
  every = job.config["checkpoint"]["every"]
  evaluate_every = job.config["evaluation"]["every"]
  with (
    Books(job, display, sampler) as books,
    hosts.ending(OSError, Stopped, spared=(Interrupted,)),
    books.recording(),
  ):
    state, progress, position = books.restore()
    if state is None:
      params = books.base()
      books.evaluate("start", params, progress, None)
      state = job.make_learner(job.schedule[0]).init(params)
      position = job.make_loader(0).get_state()
      books.save(state, progress, position, None)
    else:
      display.print(f"Resumed after {progress.global_step} steps.")

    for stage in job.schedule[progress.stage :]:
      compiling.forget()
      learner = job.make_learner(stage)
      loader = job.make_loader(progress.stage)
      loader.set_state(position)
      reference = books.reference(stage, state.params, progress)
      ledger = Ledger(**progress.ledgers.get(stage.name, {}))
      waiting = books.waiting(loader)  # groups that a step did not need
      if progress.owed:
        books.evaluate(stage.name, state.params, progress, stage)
      with (
        contextlib.nullcontext()
        if stage.kind == "sft"
        else job.make_scorer(stage.rewards, stage.row_rewards) as scorer,
        display.stage(stage.name, steps=stage.steps, done=progress.step),
      ):
        while progress.step < stage.steps:
          started, compiled = time.monotonic(), compiling.tally()
          padded = sampler.padding
          found: list[Batch] = []
          weights: Weights | None = None  # that sampling reads
          key = step_key(job, stage, progress.step)
          while not enough(stage, waiting, found):
            with timers("data"):
              questions = next(loader)
            with timers("encode"):
              questions = encode_frozen(
                stage, sampler.encoder, state.params, questions
              )
            with timers("rollout"):
              if weights is None:
                weights = sampling_weights(stage, sampler, state.params)
              rollout = roll_out(stage, sampler, weights, questions, key)
            if len(found) + 1 == stage.max_rollouts:
              weights = None  # a copy, which makes room
            grades = grade(job, scorer, questions, rollout)
            with timers("logprobs"):
              logprobs = policy_logprobs(
                job, stage, learner, state.params, reference, questions, rollout
              )
            with timers("score"):
              scores = grades()
            found.append(
              advantages_of(stage, questions, rollout, scores, *logprobs)
            )
            for message in briefly(scores.messages, progress.failed_groups):
              display.print(message)
          weights = None
          batch = join(found)
          chosen, waiting = choose(stage, batch, waiting)
          with timers("update"):
            state, metrics = learn(
              job, stage, learner, state, chosen, progress.step
            )

          progress.step += 1
          progress.global_step += 1
          metrics = add(metrics, watch.rollout_metrics(stage, batch))
          metrics = add(metrics, watch.supply(stage, found, chosen))
          metrics = add(metrics, watch.padding_since(padded, sampler.padding))
          books.warn(stage, watch.shortage(stage, progress.step, metrics))
          progress.skipped_updates += int(metrics["update_skipped"][0])
          progress.failed_groups += int(metrics["failed_groups"][0])
          spent = watch.cost(job, stage, batch, chosen)
          ledger.add(**spent)
          progress.ledgers[stage.name] = vars(ledger).copy()
          seconds = time.monotonic() - started
          timing = timers.take() | watch.compiled(compiled)
          timing |= watch.stall(timing, seconds)
          timing |= watch.speed(batch, spent, seconds)
          averages = means(metrics)
          with timers("record"):
            books.step(stage, progress, batch, averages, timing)
          books.check_limits(stage, progress, averages, chosen)
          at_end = progress.step == stage.steps
          due = evaluate_every and progress.step % evaluate_every == 0
          progress.owed = bool(job.held_out and due and not at_end)
          books.heed(state, progress, loader.get_state(), waiting)
          if at_end:
            books.written()  # its bar is full
            break  # the end of a stage is written down below
          if due:
            books.evaluate(stage.name, state.params, progress, stage)
          if progress.step % every == 0:
            with timers("record"):
              books.save(state, progress, loader.get_state(), waiting)

      books.evaluate(stage.name, state.params, progress, stage)
      params = books.promoted(stage, state.params)
      books.export(stage, params)
      progress.next_stage()
      if progress.stage < len(job.schedule):
        following = job.schedule[progress.stage]
        if following.reset_optimizer:
          state = job.make_learner(following).init(params)
        else:
          state = TrainState(params=params, opt_state=state.opt_state)
        position = job.make_loader(progress.stage).get_state()
      else:
        state = TrainState(params=params, opt_state=state.opt_state)
        position = loader.get_state()
      books.save(state, progress, position, None)
    books.finish(state.params, progress)


def step_key(job: Job, stage: Stage, step: int) -> Any:
  """The randomness of one step; question, completion and position come in later.

  It goes by the stage's name, not its place: a stage draws the same numbers
  wherever in a schedule it stands, and whatever was run before.
  """
  key = jax.random.key(job.config["seed"])
  key = jax.random.fold_in(key, zlib.crc32(stage.name.encode()))
  return jax.random.fold_in(key, step)
