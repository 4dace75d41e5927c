"""What was freed is used again, whichever thread asks."""

import subprocess
import sys

SCRIPT = """
import ctypes, resource, sys, threading
from jaxvlm import allocator

if sys.argv[1] == "keep":
  allocator.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 80 << 20

def use():
  place = libc.malloc(size)
  libc.memset(place, 1, size)
  libc.free(place)

for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def faults(how: str) -> int:
  """Page faults of 80 MB that are taken, written and freed a second time."""
  out = subprocess.check_output([sys.executable, "-c", SCRIPT, how], text=True)
  return int(out)


def test_memory_that_was_freed_is_not_mapped_anew():
  assert faults("keep") < 1000


def test_by_default_it_is():
  if sys.platform == "linux":
    assert faults("default") > 10000
