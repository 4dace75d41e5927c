"""A step's groups on the host: joined, chosen among, and kept for the next."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxvlm.metrics import Metrics
from jaxvlm.types import Question, Rollout, Scores

_PART = "part "  # and its name, in a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """This host's questions of a step with what was answered and earned."""

  questions: Sequence[Question]  # Q
  rollout: Rollout
  scores: Scores
  advantages: Float[np.ndarray, "Q G"]
  # Whether there is more to a group's advantages than a KL penalty.
  unequal: Bool[np.ndarray, " Q"]
  # Of the policy that sampled; None: the update's own are the same.
  old_logprobs: Float[np.ndarray, "Q G C"] | None
  ref_logprobs: Float[np.ndarray, "Q G C"] | None  # None: no KL term

  def take(self, rows: np.ndarray) -> "Batch":
    """The batch of these questions alone."""
    return _rebuilt(
      [self.questions[q] for q in rows],
      jax.tree.map(lambda x: x[rows], _arrays(self)),
    )

  @property
  def live(self) -> Bool[np.ndarray, " Q"]:
    """Whether each group's rewards teach anything."""
    return self.unequal & ~self.scores.failed

  def trained(self, mask_truncated: bool) -> Bool[np.ndarray, "Q G C"]:
    """The tokens that are learned from: those of no failed group."""
    left_out = self.scores.failed[:, None]
    if mask_truncated:
      left_out = left_out | self.rollout.truncated
    return self.rollout.completion_mask & ~left_out[..., None]


def join(batches: Sequence[Batch]) -> Batch:
  """One batch of all questions, in their order; without the messages."""
  if len(batches) == 1:
    return batches[0]
  questions = [question for batch in batches for question in batch.questions]
  return _rebuilt(
    questions,
    jax.tree.map(
      lambda *parts: np.concatenate(parts), *(_arrays(b) for b in batches)
    ),
  )


def to_npz(batch: Batch) -> bytes:
  """A file of all that is known of a batch but what its data say.

  Questions are there by their ids; those with features have them, for encoded
  in other company they need not have the same bits.
  """
  scores = batch.scores
  arrays = vars(batch.rollout) | {
    "question_id": np.array([q.question_id for q in batch.questions]),
    "rewards": scores.rewards,
    "failed": scores.failed,
    "accuracy": scores.accuracy,
    "advantages": batch.advantages,
    "unequal": batch.unequal,
    "old_logprobs": batch.old_logprobs,
    "ref_logprobs": batch.ref_logprobs,
  }
  arrays |= {_PART + name: part for name, part in scores.parts.items()}
  arrays |= {f"features {i}": q.features for i, q in enumerate(batch.questions)}
  known = {name: x for name, x in arrays.items() if x is not None}
  content = io.BytesIO()
  np.savez_compressed(content, **known)
  return content.getvalue()


def from_npz(content: bytes, question: Callable[[int], Question]) -> Batch:
  """The batch that `to_npz` wrote, without the messages.

  Args:
    content: of the file.
    question: makes the question of an id.
  """
  with np.load(io.BytesIO(content)) as file:
    # What numpy does not know by name is there as two bytes.
    arrays = {
      name: x.view(jnp.bfloat16) if x.dtype.kind == "V" else x
      for name, x in file.items()
    }
  scores = Scores(
    rewards=arrays["rewards"],
    parts={
      name.removeprefix(_PART): x
      for name, x in arrays.items()
      if name.startswith(_PART)
    },
    failed=arrays["failed"],
    accuracy=arrays.get("accuracy"),
  )
  return Batch(
    questions=[
      dataclasses.replace(question(q), features=arrays.get(f"features {i}"))
      for i, q in enumerate(arrays["question_id"].tolist())
    ],
    rollout=Rollout(
      **{f.name: arrays[f.name] for f in dataclasses.fields(Rollout)}
    ),
    scores=scores,
    advantages=arrays["advantages"],
    unequal=arrays["unequal"],
    old_logprobs=arrays.get("old_logprobs"),
    ref_logprobs=arrays.get("ref_logprobs"),
  )


def best_first(batch: Batch, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The questions to learn from, and what is left.

  Groups with unequal rewards first, for the others have no gradient, or that
  of a KL penalty alone; then those of equal rewards; failed ones last.

  Args:
    batch: Q questions.
    count: how many to learn from, at most Q.

  Returns:
    Indices in their order: [count] that were chosen, and those of the others
    that would teach something.
  """
  rank = np.where(batch.live, 0, np.where(batch.scores.failed, 2, 1))
  order = np.argsort(rank, kind="stable")
  rest = order[count:]
  return np.sort(order[:count]), np.sort(rest[batch.live[rest]])


def membership(
  questions: Sequence[Question], labels: Sequence[str]
) -> Bool[np.ndarray, "Q K"]:
  """Which questions each figure of a step is the mean of.

  Columns: all questions, those reported under each label, those with pictures
  and those of text alone. `named` calls them.
  """
  columns = [[True] * len(questions)]
  columns += [
    [q.example.report_as == label for q in questions] for label in labels
  ]
  seen = [len(q.pixel_values) > 0 for q in questions]
  columns += [seen, [not s for s in seen]]
  return np.array(columns).T


def named(
  name: str, sums: np.ndarray, counts: np.ndarray, labels: Sequence[str]
) -> Metrics:
  """The pairs of one figure by name: NAME, LABEL/NAME, images/NAME, text/NAME.

  Label "" is the stage's own data, called `own`. A part that is the whole is
  not said twice.

  Args:
    name: of the figure.
    sums: [K], over the columns of `membership`.
    counts: likewise.
    labels: those that `membership` was given.
  """
  own = [label or "own" for label in labels]
  prefixes = ("", *(f"{prefix}/" for prefix in (*own, "images", "text")))
  return {
    prefix + name: (float(total), float(count))
    for prefix, total, count in zip(prefixes, sums, counts, strict=True)
    if not prefix or 0 < count < counts[0]
  }


def _arrays(batch: Batch) -> Any:
  scores = batch.scores
  return (
    batch.rollout,
    {
      "rewards": scores.rewards,
      "parts": scores.parts,
      "failed": scores.failed,
      "accuracy": scores.accuracy,
    },
    {
      "advantages": batch.advantages,
      "unequal": batch.unequal,
      "old_logprobs": batch.old_logprobs,
      "ref_logprobs": batch.ref_logprobs,
    },
  )


def _rebuilt(questions: Sequence[Question], arrays: Any) -> Batch:
  rollout, scores, rest = arrays
  return Batch(
    questions=questions, rollout=rollout, scores=Scores(**scores), **rest
  )
