"""Which completions decode at once, and in what shapes, as others end."""

from collections.abc import Iterator

from jaxvlm import sharding
from jaxvlm.nn.kv_cache import KVCache
from jaxvlm.rollout.slots import Draws
from jaxvlm.types import Params

# Rows decode in fewer blocks when a quarter of them is left: with halves a step
# costs less still, but compiling twice as many programs costs more than that.
_SHRINK = 4
# Rows of a data shard that cost as much as one would.
_FEWEST = {"cpu": 8, "gpu": 64, "tpu": 64}
# Columns of a cache below which fewer are not worth another program.
_NARROWEST = {"cpu": 64, "gpu": 256, "tpu": 256}


def in_flight(
  slots: int, *, shards: int, each: int, group: int
) -> tuple[int, int]:
  """Blocks of a data shard that decode at once, and that are admitted at a time.

  Args:
    slots: completions that decode at once; 0: all.
    shards: data shards.
    each: questions of a shard.
    group: completions of a question.
  """
  at_once = slots // (shards * group) if slots else each
  at_once = min(max(at_once, 1), each)
  return at_once, max(at_once // _SHRINK, 1)


def refills(
  draws: Draws, weights: Params, prompt_caches: list[KVCache]
) -> bool:
  """Whether waiting questions take the place of ended ones, or begin after all.

  The former keeps all slots busy, so that fewer steps read the weights; but
  soon some row is old wherever others begin, and each step reads caches of all
  columns. So it is better where these are less than the weights.

  Args:
    draws: how many completions, and how long.
    weights: that decoding reads; arrays, or shapes that are placed.
    prompt_caches: of the questions that decode at once, likewise.
  """
  bytes_ = sharding.device_bytes
  columns = draws.num_completions * draws.max_completion_length
  caches = sum(
    bytes_(cache) * (1 + columns / cache.keys.shape[2])
    for cache in prompt_caches
  )
  return caches <= bytes_(weights)


def ladder(
  questions: int,
  shape: tuple[int, int],
  *,
  shrink: int = _SHRINK,
  fewest: int | None = None,
) -> Iterator[tuple[int, int]]:
  """Shapes (blocks, slots) of ever fewer rows of a data shard.

  Args:
    questions: of the shard.
    shape: that it begins with.
    shrink: how many times fewer rows the next shape has.
    fewest: rows below which it is not worth another shape; None: the backend's.
  """
  if fewest is None:
    fewest = _FEWEST[sharding.backend()]
  rows = shape[0] * shape[1]
  while rows > fewest:
    rows = -(-rows // shrink)
    width = max(rows // questions, 1)
    yield -(-rows // width), width


def cache_columns(
  length: int, *, narrowest: int | None = None
) -> Iterator[int]:
  """Columns that caches of completions have, one after the other.

  Each twice as many as before; the last, of the longest, up to three times.

  Args:
    length: the longest completion's, the last of them.
    narrowest: the first; None: the backend's.
  """
  columns = _NARROWEST[sharding.backend()] if narrowest is None else narrowest
  while 3 * columns <= 2 * length:  # one little below the longest saves little
    yield columns
    columns *= 2
  yield length
