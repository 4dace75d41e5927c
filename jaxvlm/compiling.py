"""Compiled programs, kept between starts."""

import os

import jax


def keep(directory: str) -> None:
  """Programs are read from here and left here; "": they are not.

  JAX_COMPILATION_CACHE_DIR of the environment comes first.
  """
  if not directory or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
  # Small models have many programs that compile in less than JAX's second.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
