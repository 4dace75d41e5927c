"""Compiled programs: kept between starts, counted, and never too many."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHED = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Tally:
  """What was compiled, or read from the cache, since the process began."""

  programs: int = 0
  cached: int = 0  # of them, those that were read
  seconds: float = 0.0


_tally = Tally()
_shapes: dict[str, list[str]] = collections.defaultdict(list)


def _count(event: str, duration_secs: float, **_: str | int) -> None:
  if event == _EVENT:
    _tally.programs += 1
    _tally.seconds += duration_secs


def _count_cached(event: str, **_: str | int) -> None:
  _tally.cached += event == _CACHED


jax.monitoring.register_event_duration_secs_listener(_count)
jax.monitoring.register_event_listener(_count_cached)


def keep(directory: str) -> None:
  """Programs are read from here and left here; "": they are not.

  JAX_COMPILATION_CACHE_DIR of the environment comes first.
  """
  if not directory or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
  # Small models have many programs that compile in less than JAX's second.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def tally() -> Tally:
  """A copy of the count so far."""
  return dataclasses.replace(_tally)


@contextlib.contextmanager
def program(name: str, **sizes: int) -> Iterator[None]:
  """Notes the sizes for which a call within compiles something."""
  before = _tally.programs
  yield
  if _tally.programs > before:
    _shapes[name].append(", ".join(f"{n} {size}" for n, size in sizes.items()))


def forget() -> None:
  """Shapes count from here: another stage's programs are others."""
  _shapes.clear()


def excess(most: int) -> str | None:
  """What program has more shapes than that, and which; None: none has."""
  for name, shapes in _shapes.items():
    if len(shapes) > most:
      return (
        f"{name!r} was compiled for {len(shapes)} shapes; limits.programs is "
        f"{most}. The last ones: {'; '.join(shapes[-3:])}. Lengths that differ "
        "so much want a lower max_prompt_length or max_completion_length, "
        "pictures a lower inputs.max_pixels."
      )
  return None
