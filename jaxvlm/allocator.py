"""How this process takes memory from the system."""

import ctypes
import sys

# glibc's names for what mallopt sets (malloc.h).
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1


def keep_freed() -> None:
  """Has glibc use again what was freed; elsewhere it does nothing.

  On a CPU a program's temporaries come from malloc, which maps large ones anew
  at every call: a page fault for each 4 KiB, up to a tenth of an update's
  time. And each thread keeps what it freed for itself, such as those that
  compile: 100 MB. To be called before there are threads.
  """
  libc = ctypes.CDLL(None) if sys.platform == "linux" else None
  mallopt = getattr(libc, "mallopt", None)
  if mallopt is None:
    return
  mallopt(_ARENA_MAX, 1)
  mallopt(_MMAP_THRESHOLD, 1 << 30)
  mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
