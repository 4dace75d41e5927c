"""The chips that a plan is for: what they hold, and how fast they are.

TPUs: the system architecture pages of Cloud TPU's documentation (v5e, v6e,
v5p). Bytes a second of ICI are given there for all ports and both directions:
400e9 on 4 ports (v5e), 800e9 on 4 (v6e), 1200e9 on 6 (v5p). HBM is what their
compiler calls available. GPUs: NVIDIA's data sheets of A100 80GB, H100 and
H200, all SXM; products of dense matrices, half of NVLink's both directions.
"""

import dataclasses
import os
from typing import Any

import jax
from jax.experimental import topologies

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device of the mesh."""

  name: str
  hbm: int  # bytes that a program can have
  flops: float  # a second, of bfloat16 products
  bandwidth: float  # bytes a second, of HBM
  # Bytes a second that a chip receives along one axis of the torus, both ways
  # round; between GPUs, of NVLink.
  links: float


# HBM of GPUs: the share that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION
# says otherwise. Rings of v5e and v6e close at 16 chips, of v5p at 4: along a
# shorter axis a chip at its end receives half.
KINDS = {
  "TPU v5 lite": Chip(
    name="v5e",
    hbm=int(15.75 * GIB),
    flops=197e12,
    bandwidth=819e9,
    links=100e9,
  ),
  "TPU v6 lite": Chip(
    name="v6e",
    hbm=int(31.25 * GIB),
    flops=918e12,
    bandwidth=1640e9,
    links=200e9,
  ),
  "TPU v5": Chip(
    name="v5p",
    hbm=int(95.74 * GIB),
    flops=459e12,
    bandwidth=2765e9,
    links=200e9,
  ),
  "NVIDIA A100": Chip(
    name="A100", hbm=60 * GIB, flops=312e12, bandwidth=2039e9, links=300e9
  ),
  "NVIDIA H100": Chip(
    name="H100", hbm=59 * GIB, flops=989e12, bandwidth=3350e9, links=450e9
  ),
  "NVIDIA H200": Chip(
    name="H200", hbm=105 * GIB, flops=989e12, bandwidth=4800e9, links=450e9
  ),
  # No accelerator: for tests of the tool itself.
  "cpu": Chip(name="cpu", hbm=8 * GIB, flops=1e11, bandwidth=2e10, links=1e10),
}


def find(device: Any) -> Chip:
  """The chip of a device; a GPU, which is there, says itself what it leaves.

  Raises:
    ValueError: none of KINDS.
  """
  if device.device_kind in KINDS:
    return KINDS[device.device_kind]
  for kind, chip in KINDS.items():
    if kind.startswith("NVIDIA") and device.device_kind.startswith(kind):
      stats = device.memory_stats() or {}
      return dataclasses.replace(chip, hbm=stats.get("bytes_limit", chip.hbm))
  raise ValueError(
    f"plan: no figures of {device.device_kind!r}; there are {', '.join(KINDS)}."
  )


def devices(topology: str) -> list[Any]:
  """Those of a topology, "v5e:4x4", which need not be there; or "local".

  Raises:
    ValueError: libtpu is missing, or knows no such topology.
  """
  if topology == "local":
    return list(jax.devices())
  # Chips of this machine are not asked for: its CPU traces the programs.
  if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
  # libtpu looks for a machine's metadata otherwise, waits for it, and lets no
  # other process load it, for a TPU has one owner.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # jaxlib's own, of several kinds
    raise ValueError(
      f"topology: got {topology!r}: {str(error).splitlines()[0]} Expected "
      "'local', or one as v5e:4x4, v6e:8x8, v5p:4x4x4 (chips) with libtpu "
      "installed: pip install -e '.[tpu]'."
    ) from error
  return list(found.devices)
