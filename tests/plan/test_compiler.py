"""What a program holds is what the compiler lays out in HBM."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm.plan import chips, compiler
from jaxvlm.plan.compiler import Compiler

MIB = 1 << 20


def compiled(topology, call, *shapes):
  """The one program, and what the compiler's own analysis says of it."""
  devices = np.array(chips.devices(topology)).reshape(-1, 1, 1)
  mesh = Mesh(devices, ("data", "fsdp", "tensor"))
  placed = NamedSharding(mesh, PartitionSpec())
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed)
    for shape in shapes
  ]
  done = []
  compile = Compiler(mesh=mesh, done=done.append)
  compile("program", jax.jit(call), *arguments)
  ((program, _),) = compile.known.values()
  return done[0].memory, program.memory_analysis()


def chain(x, unread):
  """Two products, between which the first is held."""
  return jnp.tanh(x @ x) @ x


REPORT = """Memory Space: default (color=0)
Total bytes: 1000 (1000B)
Memory Space: vmem (color=1)
Total bytes: 70 (70B)
"""


def test_temporaries_are_what_the_report_lays_out_beside_the_rest(tmp_path):
  """Whatever the analysis says of them, and however much is on the chip."""
  stats = types.SimpleNamespace(
    argument_size_in_bytes=300,
    output_size_in_bytes=250,
    alias_size_in_bytes=50,
    temp_size_in_bytes=640,
    generated_code_size_in_bytes=5,
  )
  program = types.SimpleNamespace(memory_analysis=lambda: stats)
  assert compiler.memory(program, tmp_path).temporaries == 640
  (tmp_path / "module.after-memory-usage-report.txt").write_text(REPORT)
  found = compiler.memory(program, tmp_path)
  assert (found.temporaries, found.peak) == (500, 1005)


def test_a_tpus_compiler_writes_such_a_report(monkeypatch):
  pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
  found, memory = [], compiler.memory

  def read(program, reports):
    found.extend(x.read_text() for x in reports.glob("*usage-report.txt"))
    return memory(program, reports)

  monkeypatch.setattr(compiler, "memory", read)
  own, _ = compiled("v5e:2x2", chain, (8192, 8192), (4, MIB))
  (report,) = found
  total = own.outputs + own.temporaries + 2 * 8192**2
  assert report.startswith(
    f"Memory Space: default (color=0)\nTotal bytes: {total} "
  )
  assert own.temporaries >= 128 * MIB


@pytest.mark.parametrize("topology", ["local", "v5e:2x2"])
def test_an_argument_that_is_not_read_is_held(topology):
  if topology != "local":
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
  memory, told = compiled(topology, chain, (256, 256), (4, MIB))
  assert told.argument_size_in_bytes < MIB
  assert memory.arguments == 8 * MIB + 2 * 256**2
