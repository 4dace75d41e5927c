"""The stream of questions of a stage: checked once, then mixed by Grain."""

import concurrent.futures
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from jaxvlm import hosts
from jaxvlm.data.options import shuffled
from jaxvlm.data.processor import Processor
from jaxvlm.data.rows import Watch, combined_seed, row_id
from jaxvlm.types import Example, Question


class Source(NamedTuple):
  """One data set of a stage's mixture."""

  weight: float  # share of the stream, relative to the other sources
  examples: Sequence[Example]
  kept: Int[np.ndarray, " N"]  # the rows that `inspect` kept
  row_ids: Sequence[str]  # of those
  sizes: Int[np.ndarray, "N 2"]  # tokens of their prompts, and patches
  # What the stage's draws are sorted by, for each of those; None: unordered.
  keys: Float[np.ndarray, " N"] | None = None
  shuffle_options: bool = False  # anew at each draw

  def draw(self, number: int, draw: int, seed: int) -> Example:
    """The kept row of this number, as a draw of this number shows it."""
    example = self.examples[self.kept[number]]
    if not self.shuffle_options:
      return example
    return shuffled(example, f"{seed} {self.row_ids[number]} {draw}")


class Draw(NamedTuple):
  """One of a mixture's stream."""

  source: str
  row: int  # among the source's kept rows
  number: int  # of the draw; an ordered stream keeps it


class Inspected(NamedTuple):
  """What the check of a data set found."""

  kept: Int[np.ndarray, " N"]  # indices, in order
  row_ids: list[str]  # of those
  sizes: Int[np.ndarray, "N 2"]  # tokens of their prompts, and patches
  dropped: dict[str, int]  # rows, by the limit they are over


def inspect(
  examples: Sequence[Example],
  rows: Int[np.ndarray, " N"],
  processor: Processor,
  *,
  name: str,
  max_prompt_length: int,
  max_response_length: int | None,
  watch: Watch,
) -> Inspected:
  """Checks these rows before any compute is spent; each host reads its share.

  Args:
    examples: the data set.
    rows: indices of those to check.
    processor: of the checkpoint; it measures the prompts.
    name: of the data set, for messages.
    max_prompt_length: tokens; rows with more are dropped, never cut.
    max_response_length: None: completions are sampled, so each row needs an
      answer. A number: written responses are learned, so each row needs one;
      those with more tokens (EOS included) are dropped.
    watch: as `Display.progress`.

  Raises:
    ValueError: an empty data set; a row that cannot be used (its markers,
      pictures or answer; names it); nothing kept (names the limit).
  """
  if not len(rows):
    raise ValueError(f"{name}: the data set is empty.")

  def measure(i: int) -> tuple[int, int, int, int]:
    example = examples[i]
    target = example.answer if max_response_length is None else example.response
    if not target:
      wanted = "answer" if max_response_length is None else "response"
      raise ValueError(
        f"{example.name or f'{name}[{i}]'}: no {wanted}; each row needs one."
      )
    response = processor.response_length(example)
    return *processor.measure(example), response, int(row_id(example), 16)

  def measured(own: range) -> Int[np.ndarray, "N 4"]:
    # Pillow decodes and the tokenizer encodes without the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      found = pool.map(measure, rows[own].tolist())
      told = list(watch(found, f"read {name}", total=len(own)))
    return np.array(told, np.uint64).reshape(-1, 4)

  told = hosts.share(len(rows), measured)
  sizes = told[:, :3].astype(np.int64)
  row_ids = [f"{one:016x}" for one in told[:, 3].tolist()]
  limits = {"max_prompt_length": max_prompt_length}
  if max_response_length is not None:
    limits["max_response_length"] = max_response_length
  fits, dropped = _within(sizes[:, [0, 2]], limits, name)
  row_ids = [row_ids[i] for i in fits]
  return Inspected(rows[fits], row_ids, sizes[fits, :2], dropped)


def _within(
  lengths: Int[np.ndarray, "N 2"], limits: dict[str, int], name: str
) -> tuple[Int[np.ndarray, " M"], dict[str, int]]:
  """Which fit, and how many do not, by limit."""
  fits = np.ones(len(lengths), bool)
  dropped: dict[str, int] = {}
  for column, (limit, most) in zip(lengths.T, limits.items(), strict=False):
    over = fits & (column > most)
    fits &= ~over
    if over.any():
      dropped[f"over {limit} {most}"] = int(over.sum())
    if not fits.any():
      raise ValueError(
        f"{name}: all {len(lengths)} rows are too long, {over.sum()} of "
        f"them by {limit} = {most} (the shortest has {column[over].min()} "
        "tokens). Raise that limit, or lower max_pixels if pictures fill it."
      )
  return np.flatnonzero(fits), dropped


def shown(source: Source, seed: int) -> list[Example]:
  """The kept rows in order, as evaluations show them."""
  return [
    source.draw(number, int(i), seed) for number, i in enumerate(source.kept)
  ]


def questions(
  source: Source,
  examples: Sequence[Example],
  processor: Processor,
  *,
  process_index: int,
  process_count: int,
) -> list[Question]:
  """Prepares what this host evaluates: every process_count-th of the rows.

  A host that none is left for prepares the first row, to fill its batches up.

  Args:
    source: of the rows; question_id is the index among all of them.
    examples: what `shown` gives.
    processor: prepares them.
    process_index: which host this is.
    process_count: how many hosts there are.
  """
  own = range(process_index, len(examples), process_count) or range(1)
  return [processor.question(examples[n], int(source.kept[n])) for n in own]


class Loader:
  """An endless iterator over batches: this host's questions of each step.

  The stream is a pure function of the sources' rows and weights and the seed,
  whatever the sources are called: each is shuffled anew each epoch, repeated,
  and mixed by weight; question_id is the place in the mixture. Of each batch,
  host h takes the h-th of the equal slices, so that the batch is the same
  whatever the number of hosts. Threads prepare up to one batch ahead;
  `get_state` knows what was handed out, not what was prepared.
  """

  def __init__(
    self,
    sources: Mapping[str, Source],
    processor: Processor,
    *,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    shuffle: bool,
    total: int | None,
  ):
    """Starts the stream.

    Args:
      sources: the mixture, by name.
      processor: prepares the rows.
      batch_size: questions of all hosts together.
      seed: of the order.
      process_index: which host this is.
      process_count: how many hosts there are.
      shuffle: False: the rows of each source in order.
      total: so many draws, which the stream would begin with, are sorted by
        the sources' keys, the least first, and come again after that; those
        of equal keys keep their order. None: the stream as it is.

    Raises:
      ValueError: no source, one without rows or with a weight that is not
        positive, or hosts that do not divide the batch.
    """
    _check(sources, batch_size, process_count)
    own = batch_size // process_count

    def prepare(place: int, at: Draw) -> Question:
      example = sources[at.source].draw(at.row, at.number, seed)
      return processor.question(example, place)

    draws = _mix(sources, seed, shuffle)
    if total is not None:
      draws = _sorted(draws, sources, total)
    self._draws, self._sources = draws, sources
    self._stream = draws.map_with_index(prepare)
    slices = _HostSlice(self._stream, own, batch_size, process_index * own)
    threads = min(own, os.cpu_count() or 1)
    reading = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=max(own, threads)
    )
    dataset = grain.MapDataset.source(slices).to_iter_dataset(reading)
    self._batches = iter(dataset.batch(own, batch_fn=list))

  def __iter__(self) -> Iterator[list[Question]]:
    return self

  def __next__(self) -> list[Question]:
    return next(self._batches)

  def question(self, question_id: int) -> Question:
    """One of the stream, of any host, wherever the iterator is."""
    return self._stream[question_id]

  def count(self, asked: int) -> dict[str, Int[np.ndarray, " N"]]:
    """How often the first `asked` draws take each kept row of each source."""
    counts = {
      name: np.zeros(len(source.kept), np.int64)
      for name, source in self._sources.items()
    }
    for i in range(asked):
      draw = self._draws[i]
      counts[draw.source][draw.row] += 1
    return counts

  def get_state(self) -> dict[str, Any]:
    """Where the stream is, as JSON can hold it."""
    return self._batches.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on after the last batch handed out before `get_state`."""
    self._batches.set_state(state)


def _check(
  sources: Mapping[str, Source], batch_size: int, process_count: int
) -> None:
  if not sources:
    raise ValueError("data: a stage needs at least one source.")
  for name, source in sources.items():
    if not len(source.kept):
      raise ValueError(f"data {name}: no rows.")
    if not source.weight > 0:
      raise ValueError(
        f"data {name}: weight {source.weight}; it must be positive, leave the "
        "source out instead."
      )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"{batch_size} questions a step do not divide among {process_count} "
      "hosts; choose a multiple."
    )


def _mix(
  sources: Mapping[str, Source], seed: int, shuffle: bool
) -> grain.MapDataset:
  """The endless stream of draws."""
  seeds = {
    name: combined_seed(seed, source.row_ids)
    for name, source in sources.items()
  }
  # Not by name: an arm may call them otherwise.
  names = sorted(sources, key=lambda n: (seeds[n], sources[n].weight))
  parts = []
  for name in names:
    numbers = range(len(sources[name].kept))
    rows = grain.MapDataset.source([(name, i) for i in numbers])
    if shuffle:
      rows = rows.shuffle(seed=seeds[name])
    parts.append(rows.repeat())
  mixture = grain.MapDataset.mix(parts, [sources[n].weight for n in names])
  return mixture.map_with_index(lambda number, at: Draw(at[0], at[1], number))


def _sorted(
  draws: grain.MapDataset, sources: Mapping[str, Source], total: int
) -> grain.MapDataset:
  """The first `total` draws by their keys, again and again."""
  first = [draws[i] for i in range(total)]
  keys = []
  for draw in first:
    found = sources[draw.source].keys
    assert found is not None
    keys.append(found[draw.row])
  order = np.argsort(keys, kind="stable")
  return grain.MapDataset.source([first[i] for i in order]).repeat()


class _HostSlice:
  """One host's questions: `own` out of each `batch`, from `start`."""

  def __init__(
    self, stream: grain.MapDataset, own: int, batch: int, start: int
  ):
    self._stream = stream
    self._own, self._batch, self._start = own, batch, start

  def __len__(self) -> int:
    return len(self._stream) // self._batch * self._own

  def __getitem__(self, i: int) -> Question:
    step, place = divmod(i, self._own)
    return self._stream[step * self._batch + self._start + place]
