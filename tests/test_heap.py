"""What a CPU's programs give back is there for their next call."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxvlm import heap

# Twelve calls with a temporary of 64 MiB, 16384 pages; prints faults of the last
# six.
CALLS = """
import resource
import sys

import jax
import jax.numpy as jnp

from jaxvlm import heap

if sys.argv[1] == "keep":
  heap.keep()
narrow, vector = jnp.ones((4096, 8)), jnp.ones(4096)
call = jax.jit(lambda x, y: (x @ x.T) @ y)
for i in range(12):
  if i == 6:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  call(narrow, vector).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 6 * 16384


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's")
def test_temporaries_are_mapped_once_and_not_for_each_call():
  faults = {}
  for how in ("keep", "map"):
    done = subprocess.run(
      [sys.executable, "-c", CALLS, how],
      capture_output=True,
      check=True,
      text=True,
    )
    faults[how] = int(done.stdout)
  assert faults["map"] > 0.9 * PAGES
  assert faults["keep"] < 0.7 * PAGES  # some fit no gap


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's")
@pytest.mark.parametrize(
  ("platforms", "installed", "expected"),
  [
    ("cpu", ["libtpu"], True),
    ("cuda,cpu", [], False),
    (None, [], True),
    (None, ["jax_plugins"], False),
    (None, ["libtpu"], False),
  ],
)
def test_the_heap_of_a_host_of_accelerators_stays_as_it_is(
  monkeypatch, platforms, installed, expected
):
  found = []
  config = SimpleNamespace(values={"jax_platforms": platforms})
  monkeypatch.setattr(heap, "jax", SimpleNamespace(config=config))
  monkeypatch.setattr(
    *(importlib.util, "find_spec"), lambda name: name in installed or None
  )
  monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Library(found))
  heap.keep()
  assert bool(found) == expected


class Library:
  """glibc, which notes what is set."""

  def __init__(self, found):
    self.mallopt = lambda *setting: found.append(setting)

  def gnu_get_libc_version(self):
    return b"2.36"
