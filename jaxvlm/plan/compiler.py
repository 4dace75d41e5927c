"""Programs compiled for a mesh: what each holds on a chip, and does."""

import dataclasses
import hashlib
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxvlm import sharding
from jaxvlm.plan.hlo import Cost, Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes on a chip."""

  arguments: int
  outputs: int
  aliased: int  # of the outputs, those that take an argument's place
  temporaries: int
  code: int
  beside: Mapping[str, int]  # what else lives while the program runs

  @property
  def peak(self) -> int:
    """Of the program alone."""
    own = self.arguments + self.outputs - self.aliased
    return own + self.temporaries + self.code

  @property
  def live(self) -> int:
    return self.peak + sum(self.beside.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A program that was compiled for the mesh; of one chip."""

  name: str
  memory: Memory
  cost: Cost  # loops counted as often as they turn
  flops: float  # as the compiler tells, each loop's body once
  bytes: float
  optimal_seconds: float | None  # None: it does not tell
  seconds: float  # that compiling took
  module: Module
  # Bytes of its largest argument that is whole on every chip, and which.
  replicated: tuple[int, str]
  held: Mapping[str, Any]  # arrays, by name, that its structure is checked by
  tokens: int  # of a chip; 0: it has no such thing


class TooLarge(Exception):
  """The compiler found no room for a program: bytes it would take."""

  def __init__(self, name: str, needed: int):
    super().__init__(name)
    self.name, self.needed = name, needed


@dataclasses.dataclass
class Compiler:
  """Compiles programs in the order of a step."""

  mesh: Mesh
  done: Callable[[Compiled], None]
  # What was compiled for this mesh, by its text; a later plan may share it.
  known: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __call__(
    self,
    name: str,
    call: Any,
    *arguments: Any,
    beside: Mapping[str, Any] | None = None,
    turns: float = 1.0,
    held: Mapping[str, Any] | None = None,
    tokens: int = 0,
  ) -> Any:
    """The program's outputs, as shapes that are placed on the mesh.

    Args:
      name: of the program.
      call: jitted.
      *arguments: shapes, and what is static.
      beside: by name, arrays that live meanwhile and are no arguments.
      turns: of a loop whose end is data.
      held: as in Compiled.
      tokens: likewise.

    Raises:
      TooLarge: it does not fit alone.
    """
    started = time.monotonic()
    lowered = call.lower(*arguments)
    compiled, own = self._compile(name, lowered)
    told = compiled.cost_analysis() or {}
    module = Module(compiled.as_text(), dynamic_turns=turns)
    optimal = float(told.get("optimal_seconds", -1.0))
    self.done(
      Compiled(
        name=name,
        memory=dataclasses.replace(
          own,
          # Those that it does not read are left out, but lie there too.
          arguments=max(own.arguments, size(arguments)),
          beside={k: size(x) for k, x in (beside or {}).items()},
        ),
        cost=module.cost(),
        flops=float(told.get("flops", 0.0)),
        bytes=float(told.get("bytes accessed", 0.0)),
        optimal_seconds=optimal if optimal >= 0 else None,
        seconds=time.monotonic() - started,
        module=module,
        replicated=_replicated(arguments),
        held=held or {},
        tokens=tokens,
      )
    )
    return jax.tree.map(
      lambda out, placed: jax.ShapeDtypeStruct(
        out.shape, out.dtype, sharding=placed
      ),
      lowered.out_info,
      compiled.output_shardings,
    )

  def _compile(self, name: str, lowered: Any) -> tuple[Any, Memory]:
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    if text not in self.known:
      with tempfile.TemporaryDirectory() as reports:
        try:
          compiled = lowered.compile(compiler_options={"xla_dump_to": reports})
        except jax.errors.JaxRuntimeError as error:
          if found := re.search(
            r"(?:Used |required for[\w ]*\()([\d.]+)([KMGT])", str(error)
          ):
            power = "KMGT".index(found.group(2)) + 1
            needed = int(float(found.group(1)) * 1024**power)
            raise TooLarge(name, needed) from error
          raise
        self.known[text] = compiled, memory(compiled, pathlib.Path(reports))
    return self.known[text]


def memory(compiled: Any, reports: pathlib.Path) -> Memory:
  """What a program takes by itself.

  Args:
    compiled: the program.
    reports: where the compiler said more of it, if it did.
  """
  # A TPU's memory_analysis says temporaries that are not laid out in HBM (of a
  # tower 8.2 GB where 6.6 are; it compiles programs that could not run with as
  # many), and its peak leaves out gaps between arrays and counts those on the
  # chip. What is laid out stands in the report alone.
  stats = compiled.memory_analysis()
  own = stats.argument_size_in_bytes + stats.output_size_in_bytes
  own -= stats.alias_size_in_bytes
  temporaries = stats.temp_size_in_bytes
  for report in reports.glob("*memory-usage-report.txt"):
    if found := re.search(
      r"^Memory Space: default .*\nTotal bytes: (\d+)", report.read_text(), re.M
    ):
      temporaries = int(found.group(1)) - own
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    temporaries=temporaries,
    code=stats.generated_code_size_in_bytes,
    beside={},
  )


def size(tree: Any) -> int:
  """Bytes of arrays on one chip; what is no array counts nothing."""
  return sharding.device_bytes(
    [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
  )


def _replicated(arguments: Any) -> tuple[int, str]:
  found = [(0, "")]
  for path, x in jax.tree_util.tree_leaves_with_path(arguments):
    if (
      isinstance(x, jax.ShapeDtypeStruct)
      and sharding.device_shape(x) == x.shape
    ):
      found.append((size(x), jax.tree_util.keystr(path)))
  return max(found)
