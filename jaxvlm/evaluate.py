"""Held-out accuracy: greedy, mean@k and pass@k for each capability."""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxvlm import sharding
from jaxvlm.rollout.sampler import Draws, Sampler
from jaxvlm.scoring import Scorer
from jaxvlm.types import Example, Params, Question, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """One capability's questions, and the reward that says what is right."""

  capability: str
  questions: Sequence[Question]
  scorer: Scorer


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
    return sum(2 * len(list(self._slices(h.questions))) for h in self._held_out)

  def _slices(
    self, questions: Sequence[Question]
  ) -> Iterator[tuple[list[Question], int]]:
    """Full batches of this host's share, and how many of each are its own."""
    hosts, host = jax.process_count(), jax.process_index()
    own = list(questions[host::hosts])
    for start in range(0, -(-len(questions) // hosts), self._batch):
      part = own[start : start + self._batch]
      padding = self._batch - len(part)
      yield part + [questions[0]] * padding, len(part)

  def _capability(
    self, weights: Params, held_out: HeldOut, advance: Callable[[], None]
  ) -> dict[str, float]:
    name = held_out.capability
    key = jax.random.fold_in(
      jax.random.key(self._seed), zlib.crc32(name.encode())
    )
    sums: dict[str, float] = collections.defaultdict(float)
    tasks = sorted({q.example.task for q in held_out.questions})
    # Every key exists on every host, so that sums can be added over hosts.
    for task in tasks:
      sums[f"right/{task}"] = sums[f"count/{task}"] = 0
    k = self._sampled.num_completions
    for questions, own in self._slices(held_out.questions):
      for draws in (self._greedy, self._sampled):
        rollout = self._sampler.sample(weights, questions, key=key, draws=draws)
        right = self._right(held_out, questions, rollout, own)
        if draws is self._sampled:
          sums[f"mean@{k}"] += right.mean(1).sum()
          sums[f"pass@{k}"] += right.max(1).sum()
        else:
          sums["greedy"] += right.sum()
          sums["length"] += rollout.completion_mask[:own].sum()
          sums["truncated"] += rollout.truncated[:own].sum()
          for question, score in zip(questions, right[:, 0], strict=False):
            sums[f"right/{question.example.task}"] += score
            sums[f"count/{question.example.task}"] += 1
        advance()
    names = sorted(sums)
    values = sharding.sum_over_hosts([float(sums[n]) for n in names])
    totals = dict(zip(names, values.tolist(), strict=True))
    examples = [q.example for q in held_out.questions]
    metrics = {
      f"{name}/{n}": total / len(examples)
      for n, total in totals.items()
      if "/" not in n
    }
    for task, share in majority(examples).items():
      accuracy = totals[f"right/{task}"] / totals[f"count/{task}"]
      metrics[f"{name}/task/{task}/greedy"] = accuracy
      metrics[f"{name}/task/{task}/majority"] = share
    return metrics

  def _right(
    self,
    held_out: HeldOut,
    questions: Sequence[Question],
    rollout: Rollout,
    own: int,
  ) -> np.ndarray:
    """Scores [own G]; a reward that failed counts as wrong."""
    if not own:  # the last batch may be another host's alone
      return np.zeros((0, rollout.truncated.shape[1]))
    texts = decode_rollout(rollout, self._decode)[:own]
    lengths = np.asarray(rollout.completion_mask).sum(-1)[:own]
    examples = [q.example for q in questions[:own]]
    scores = held_out.scorer.score(texts, examples, lengths)
    return np.where(scores.failed[:, None], 0.0, scores.rewards)


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
