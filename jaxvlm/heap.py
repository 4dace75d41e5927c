"""Memory that programs give back, kept for their next call on a CPU.

XLA asks malloc for the temporaries of each call, on threads of its own. There
glibc maps anew what is above 64 MiB and most of what is below, and each page of
it is a fault when it is first written: a tenth of an update's time.
"""

import ctypes
import importlib.util
import sys

import jax

# malloc.h's names for what mallopt sets.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_KEPT = 1 << 28  # bytes free at the heap's end, above which it shrinks


def keep() -> None:
  """One heap for all threads, that shrinks late; to be called before jax runs.

  Where there are accelerators, or a C library other than glibc, nothing changes.
  """
  if _cpu_alone() and sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
      libc.mallopt(_ARENA_MAX, 1)
      libc.mallopt(_MMAP_MAX, 0)
      libc.mallopt(_TRIM_THRESHOLD, _KEPT)


def _cpu_alone() -> bool:
  """Whether jax can find nothing but a CPU, told without asking it.

  JAX_PLATFORMS says so, or no plugin for another device is installed.
  """
  if platforms := jax.config.values["jax_platforms"]:
    return platforms == "cpu"
  return not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
