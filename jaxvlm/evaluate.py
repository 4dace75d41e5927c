"""Held-out accuracy: greedy, mean@k and pass@k for each capability."""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxvlm import sharding
from jaxvlm.rollout.sampler import Draws, Sampler, Weights
from jaxvlm.scoring import Scorer
from jaxvlm.types import Example, Params, Question, Rollout, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """One capability's questions, and the reward that says what is right."""

  capability: str
  examples: Sequence[Example]  # of all hosts
  # Of this host: every so many-th of them as there are hosts, or, where none is
  # left for it, one that fills its batches up.
  questions: Sequence[Question]
  scorer: Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """A batch of questions, and how they are answered."""

  questions: Sequence[Question]  # of this host
  own: int  # so many at the front count; the others fill the batch up
  key: Key[Array, ""]
  draws: Draws


class Answered(NamedTuple):
  """What came of a batch: the questions that count."""

  asked: Asked
  rollout: Rollout  # [own ...], on the host
  texts: list[list[str]]  # [own][G]
  scores: Scores | None  # None: nothing scores them


def answer(
  batches: Iterable[Asked],
  *,
  sampler: Sampler,
  weights: Weights,
  decode: Callable[[np.ndarray], str],
  scorer: Scorer | None,
) -> Iterator[Answered]:
  """Samples and scores batches, in their order.

  The device samples a batch, as far as `Sampler.start` does, while the host
  scores the one before it and prepares the one after it.

  Args:
    batches: taken one ahead of what is given.
    sampler: of the network.
    weights: of `Sampler.weights`.
    decode: text of a completion's ids.
    scorer: None: completions are not scored.
  """
  under_way = None
  for asked in batches:
    rollout = sampler.start(
      weights, asked.questions, key=asked.key, draws=asked.draws
    )
    if under_way is not None:
      yield _score(*under_way, decode, scorer)
    under_way = asked, rollout
  if under_way is not None:
    yield _score(*under_way, decode, scorer)


def _score(
  asked: Asked,
  rollout: Callable[[], Rollout],
  decode: Callable[[np.ndarray], str],
  scorer: Scorer | None,
) -> Answered:
  own = jax.tree.map(lambda x: x[: asked.own], rollout())
  texts = decode_rollout(own, decode)
  if scorer is None:
    return Answered(asked, own, texts, None)
  if not asked.own:  # the last batch may be another host's alone
    none = np.zeros((0, asked.draws.num_completions))
    scores = Scores(rewards=none, parts={}, failed=np.zeros(0, bool))
    return Answered(asked, own, texts, scores)
  examples = [q.example for q in asked.questions[: asked.own]]
  lengths = np.asarray(own.completion_mask).sum(-1)
  scores = scorer.score(texts, examples, lengths)
  return Answered(asked, own, texts, scores)


def majority(examples: Sequence[Example]) -> dict[str, float]:
  """By named task, the accuracy of its most frequent answer alone."""
  answers: dict[str, collections.Counter[str]] = collections.defaultdict(
    collections.Counter
  )
  for example in examples:
    if example.task:
      answers[example.task][example.answer] += 1
  return {
    task: counts.most_common(1)[0][1] / counts.total()
    for task, counts in sorted(answers.items())
  }


class Evaluator:
  """Answers held-out questions with a policy's weights and scores them.

  The draws depend on the seed and the capability alone, never on the step, so
  that two evaluations differ by their weights only.
  """

  def __init__(
    self,
    held_out: Sequence[HeldOut],
    *,
    sampler: Sampler,
    decode: Callable[[np.ndarray], str],
    seed: int,
    batch_questions: int,
    num_completions: int,
    max_completion_length: int,
    temperature: float,
    top_k: int,
    top_p: float,
  ):
    self._held_out = held_out
    self._sampler = sampler
    self._decode = decode
    self._seed = seed
    self._batch = batch_questions // jax.process_count()
    self._greedy = Draws(
      num_completions=1,
      max_completion_length=max_completion_length,
      temperature=0.0,
      top_k=0,
      top_p=1.0,
    )
    self._sampled = dataclasses.replace(
      self._greedy,
      num_completions=num_completions,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
    )

  def run(
    self, params: Params, advance: Callable[[], None] = lambda: None
  ) -> dict[str, float]:
    """Metrics by name, "capability/greedy" and so on; the same on all hosts.

    Args:
      params: the policy.
      advance: called after each of `batches()` batches.
    """
    weights = self._sampler.weights(params)
    metrics: dict[str, float] = {}
    for held_out in self._held_out:
      metrics |= self._capability(weights, held_out, advance)
    return metrics

  def batches(self) -> int:
    """Batches of one `run`."""
    return sum(2 * len(list(self._slices(h))) for h in self._held_out)

  def _slices(self, held_out: HeldOut) -> Iterator[tuple[list[Question], int]]:
    """Full batches of this host's questions, and how many of each count."""
    hosts, host = jax.process_count(), jax.process_index()
    total, questions = len(held_out.examples), held_out.questions
    own = questions[: len(range(host, total, hosts))]
    for start in range(0, -(-total // hosts), self._batch):
      part = list(own[start : start + self._batch])
      padding = self._batch - len(part)
      yield part + [questions[0]] * padding, len(part)

  def _capability(
    self, weights: Weights, held_out: HeldOut, advance: Callable[[], None]
  ) -> dict[str, float]:
    name = held_out.capability
    key = jax.random.fold_in(
      jax.random.key(self._seed), zlib.crc32(name.encode())
    )
    sums: dict[str, float] = collections.defaultdict(float)
    tasks = sorted({example.task for example in held_out.examples})
    # Every key exists on every host, so that sums can be added over hosts.
    for task in tasks:
      sums[f"right/{task}"] = sums[f"count/{task}"] = 0
    k = self._sampled.num_completions
    batches = [
      Asked(questions=questions, own=own, key=key, draws=draws)
      for questions, own in self._slices(held_out)
      for draws in (self._greedy, self._sampled)
    ]
    for asked, rollout, _, scores in answer(
      batches,
      sampler=self._sampler,
      weights=weights,
      decode=self._decode,
      scorer=held_out.scorer,
    ):
      assert scores is not None
      # A reward that failed counts as wrong.
      right = np.where(scores.failed[:, None], 0.0, scores.rewards)
      if asked.draws is self._sampled:
        sums[f"mean@{k}"] += right.mean(1).sum()
        sums[f"pass@{k}"] += right.max(1).sum()
      else:
        sums["greedy"] += right.sum()
        sums["length"] += rollout.completion_mask.sum()
        sums["truncated"] += rollout.truncated.sum()
        for question, score in zip(asked.questions, right[:, 0], strict=False):
          sums[f"right/{question.example.task}"] += score
          sums[f"count/{question.example.task}"] += 1
      advance()
    names = sorted(sums)
    values = sharding.sum_over_hosts([float(sums[n]) for n in names])
    totals = dict(zip(names, values.tolist(), strict=True))
    metrics = {
      f"{name}/{n}": total / len(held_out.examples)
      for n, total in totals.items()
      if "/" not in n
    }
    for task, share in majority(held_out.examples).items():
      accuracy = totals[f"right/{task}"] / totals[f"count/{task}"]
      metrics[f"{name}/task/{task}/greedy"] = accuracy
      metrics[f"{name}/task/{task}/majority"] = share
    return metrics


def decode_rollout(
  rollout: Rollout, decode: Callable[[np.ndarray], str]
) -> list[list[str]]:
  """Texts [Q][G] of a rollout's completions."""
  return [
    [decode(ids[mask]) for ids, mask in zip(*group, strict=True)]
    for group in zip(
      np.asarray(rollout.completion_ids),
      np.asarray(rollout.completion_mask),
      strict=True,
    )
  ]
