"""The cache of compiled programs: where it is, and who decides."""

import jax
import pytest

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
