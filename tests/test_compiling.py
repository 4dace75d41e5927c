"""The cache of compiled programs, and the count of their shapes."""

import collections

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxvlm import compiling


@pytest.fixture
def told(monkeypatch):
  """What JAX is told, by name."""
  told = {}
  monkeypatch.setattr(jax.config, "update", told.__setitem__)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  return told


def test_programs_are_kept_in_the_directory(told, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  compiling.keep("~/programs")
  assert told["jax_compilation_cache_dir"] == str(tmp_path / "programs")


def test_without_a_directory_none_are_kept(told):
  compiling.keep("")
  assert not told


def test_the_environment_comes_first(told, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  compiling.keep("~/programs")
  assert not told


@pytest.fixture
def shapes(monkeypatch):
  found = collections.defaultdict(list)
  monkeypatch.setattr(compiling, "_shapes", found)
  return found


def test_programs_are_counted_and_their_seconds():
  before = compiling.tally()
  double = jax.jit(lambda x: 2 * x)
  double(np.ones(3)), double(np.ones(3)), double(np.ones(4))
  after = compiling.tally()
  assert after.programs == before.programs + 2
  assert after.seconds > before.seconds


@pytest.fixture
def cache(tmp_path):
  """An empty directory of programs, into which each is put."""
  options = {
    "jax_compilation_cache_dir": str(tmp_path),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: getattr(jax.config, name) for name in options}
  compilation_cache.reset_cache()
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_programs_that_are_read_are_told_from_those_compiled(cache):
  found = []
  for _ in range(2):
    before = compiling.tally()
    jax.jit(lambda x: 3 * x)(np.ones(5))
    after = compiling.tally()
    found.append(
      (after.programs - before.programs, after.cached - before.cached)
    )
  assert found == [(1, 0), (1, 1)]


def test_a_program_of_too_many_shapes_is_told_with_the_last_ones(shapes):
  double = jax.jit(lambda x: 2 * x)
  for size in (3, 3, 4, 4, 5):
    with compiling.program("update", columns=size, patches=0):
      double(np.ones(size))
  assert shapes["update"] == [f"columns {n}, patches 0" for n in (3, 4, 5)]
  assert compiling.excess(3) is None
  told = compiling.excess(2)
  assert "'update' was compiled for 3 shapes; limits.programs is 2" in told
  assert "columns 4, patches 0; columns 5, patches 0" in told
