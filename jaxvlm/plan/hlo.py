"""What a compiled program does on one chip, read from its HLO.

The compiler's own cost analysis counts the body of a loop once. Here a body
counts as often as its loop turns: scans and the loops that the partitioner
makes of a gather say how often, of others the caller does.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.\-]+)")
COLLECTIVES = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
MOVES = ("all-gather", "all-to-all", "collective-permute")
# These name what is there already, or are counted by what they call.
_FREE = {
  *("parameter", "get-tuple-element", "tuple", "bitcast", "constant"),
  *("while", "conditional", "call", "after-all", "partition-id", "iota"),
  *("copy-done", "slice-done", "opt-barrier", "domain", "async-done"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array of a program."""

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool  # not in HBM

  @property
  def bytes(self) -> int:
    return _SIZES.get(self.dtype, 4) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # of the output, a tuple's elements
  operands: tuple[str, ...]
  text: str  # attributes
  root: bool

  @property
  def called(self) -> tuple[str, ...]:
    return tuple(_CALLED.findall(self.text))

  def attribute(self, name: str) -> str:
    found = re.search(rf"{name}=\"?([^,\"\s]+)", self.text)
    return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
  """Chips that exchange something, and how much each receives a turn."""

  kind: str
  bytes: int
  shape: Shape
  group: tuple[int, ...]  # one of the groups, of places in the mesh
  windowed: bool  # a gather or reduction taken apart around a product
  op_name: str
  turns: float = 1.0


@dataclasses.dataclass
class Cost:
  """Sums over a computation, on a chip."""

  flops: float = 0.0
  bytes: float = 0.0  # read from HBM and written there
  collectives: list[Collective] = dataclasses.field(default_factory=list)

  def add(self, other: "Cost", turns: float = 1.0) -> None:
    self.flops += turns * other.flops
    self.bytes += turns * other.bytes
    self.collectives += [
      dataclasses.replace(one, turns=turns * one.turns)
      for one in other.collectives
    ]


class Module:
  """The text of a compiled program, by computation."""

  def __init__(self, text: str, *, dynamic_turns: float = 1.0):
    """Parses it.

    Args:
      text: `compiled.as_text()`.
      dynamic_turns: of a loop whose end is data.
    """
    self._dynamic = dynamic_turns
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    for line in text.splitlines():
      if found := _COMPUTATION.match(line):
        own: list[Instruction] = []
        self.computations[found.group(2)] = own
        self.entry = found.group(2) if found.group(1) else self.entry
      elif found := _INSTRUCTION.match(line):
        own.append(_instruction(found))
    self._named = {
      name: {x.name: x for x in lines}
      for name, lines in self.computations.items()
    }

  def cost(self) -> Cost:
    """Of the whole program."""
    return self._cost(self.entry)

  def loops(self) -> Iterator[Instruction]:
    for lines in self.computations.values():
      yield from (x for x in lines if x.opcode == "while")

  def inside(self, name: str) -> Iterator[tuple[str, Instruction]]:
    """All lines of a computation and what it calls, with their computation."""
    for line in self.computations[name]:
      yield name, line
      for called in (*line.called, *_branches(line), *_condition(line)):
        yield from self.inside(called)

  def turns(self, loop: Instruction) -> float | None:
    """How often a loop turns; None: its data say."""
    lines = self.computations[loop.attribute("condition").lstrip("%")]
    named = {x.name: x for x in lines}
    root = next(x for x in lines if x.root)
    compares = root
    if root.opcode == "fusion":  # as CPUs wrap it, with the same operands
      compares = next(x for x in self.computations[root.called[0]] if x.root)
    if compares.opcode != "compare" or "direction=LT" not in compares.text:
      return None
    if len(root.operands) != 2:
      return None
    bound = named[root.operands[1]]
    if bound.opcode != "constant":
      return None
    bound_at = re.match(r"(\d+)\)", bound.text)
    counter = named[root.operands[0]].attribute("index")
    if bound_at is None or not counter:
      return None
    step = self._step(loop.attribute("body").lstrip("%"), int(counter))
    return float(bound_at.group(1)) / step

  def _step(self, body: str, counter: int) -> float:
    """What a turn adds to this element; the compiler unrolls some loops."""
    named = self._named[body]
    root = next(x for x in named.values() if x.root)
    line, step = named.get(root.operands[counter]), 0.0
    while line is not None and line.opcode == "add":
      added = named[line.operands[1]]
      value = re.match(r"(\d+)\)", added.text)
      step += float(value.group(1)) if value else 0.0
      line = named.get(line.operands[0])
    return step or 1.0

  def _cost(self, name: str) -> Cost:
    total = Cost()
    channels: set[str] = set()
    for line in self.computations[name]:
      kind = line.opcode.removesuffix("-start")
      if line.opcode == "while":
        turns = self.turns(line)
        body = self._cost(line.attribute("body").lstrip("%"))
        total.add(body, self._dynamic if turns is None else turns)
      elif branches := _branches(line):
        total.add(max(map(self._cost, branches), key=lambda c: c.bytes))
      elif kind in COLLECTIVES:
        total.collectives.append(collective(line, name))
      elif line.opcode in ("convolution", "dot"):
        total.flops += self._products(name, line)
      elif line.opcode in ("fusion", "call", "async-start"):
        for called in line.called:
          inner = self._cost(called)
          total.flops += inner.flops
          for one in inner.collectives:
            key = f"{one.op_name}{one.shape.dims}{one.kind}"
            if key not in channels or line.opcode != "fusion":
              total.collectives.append(one)
            channels.add(key)
          if line.opcode == "call":
            total.bytes += inner.bytes
      if not line.opcode.endswith("-done"):
        total.bytes += self._traffic(name, line)
    return total

  def _traffic(self, name: str, line: Instruction) -> float:
    """Bytes of HBM that a line reads and writes."""
    if line.opcode in _FREE or line.attribute("custom_call_target") in (
      "AllocateBuffer",
      "ConcatBitcast",
    ):
      return 0.0
    named = self._named[name]
    operands = [named[x] for x in line.operands if x in named]
    whole = [_hbm(x.shapes) for x in operands]
    written = _hbm(line.shapes)
    if line.opcode == "fusion":
      inner = self.computations[line.called[0]]
      for x in inner:
        if x.opcode == "parameter":
          place = int(x.text.split(")")[0])
          if place < len(whole):
            whole[place] = min(whole[place], self._read(inner, x, whole[place]))
      root = next(x for x in inner if x.root)
      written = min(written, self._written(inner, root, written))
    elif line.opcode == "dynamic-slice":
      whole = [written]
    elif line.opcode == "dynamic-update-slice":
      whole, written = [whole[1]], whole[1]
    elif line.opcode == "slice-start":  # (operand, slice, context)
      whole, written = [_hbm_size(line.shapes[1:2])], _hbm(line.shapes[1:2])
    elif line.opcode.endswith("-start") and len(line.shapes) > len(operands):
      written -= sum(whole)  # the tuple names its operands again
    return float(sum(whole) + written)

  def _read(
    self, inner: list[Instruction], parameter: Instruction, whole: float
  ) -> float:
    """Of a fusion's operand: slices where only slices are taken."""
    users = [x for x in inner if parameter.name in x.operands]
    read = 0.0
    for user in users:
      if user.opcode in ("bitcast", "reshape"):
        read += self._read(inner, user, whole)
      elif user.opcode in ("dynamic-slice", "slice", "gather"):
        read += _hbm_size(user.shapes)
      elif user.opcode == "dynamic-update-slice" and (
        user.operands[0] == parameter.name
      ):
        continue  # it is written in place
      else:
        return whole
    return read

  def _written(
    self, inner: list[Instruction], root: Instruction, whole: float
  ) -> float:
    named = {x.name: x for x in inner}
    while root.opcode == "bitcast":
      root = named[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
      return _hbm_size(named[root.operands[1]].shapes)
    return whole

  def _products(self, name: str, line: Instruction) -> float:
    left, right = (self._named[name][x].shapes[0] for x in line.operands[:2])
    out = line.shapes[0]
    if line.opcode == "dot":
      contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.text)
      dims = (
        [int(x) for x in contracted.group(1).split(",")] if contracted else []
      )
      return 2.0 * math.prod(out.dims) * math.prod(left.dims[i] for i in dims)
    return _convolution(line, left, right, out)


def _instruction(found: re.Match[str]) -> Instruction:
  operands, _, _ = found.group(5).partition(")")
  return Instruction(
    name=found.group(2),
    opcode=found.group(4),
    shapes=_shapes(found.group(3)),
    operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
    text=found.group(5),
    root=bool(found.group(1)),
  )


@functools.lru_cache(maxsize=1 << 16)
def _shapes(text: str) -> tuple[Shape, ...]:
  return tuple(
    Shape(
      dtype,
      tuple(int(x) for x in dims.split(",") if x),
      "S(" in (layout or ""),
    )
    for dtype, dims, layout in _SHAPE.findall(text)
  )


def _hbm(shapes: tuple[Shape, ...]) -> float:
  return float(sum(x.bytes for x in shapes if not x.on_chip))


def _hbm_size(shapes: tuple[Shape, ...]) -> float:
  return float(sum(x.bytes for x in shapes))


def _branches(line: Instruction) -> tuple[str, ...]:
  if line.opcode != "conditional":
    return ()
  listed = re.search(r"branch_computations=\{([^}]*)\}", line.text)
  if listed:
    return tuple(re.findall(r"%([\w.\-]+)", listed.group(1)))
  return tuple(re.findall(r"(?:true|false)_computation=%([\w.\-]+)", line.text))


def _condition(line: Instruction) -> tuple[str, ...]:
  return (line.attribute("condition").lstrip("%"),) * (line.opcode == "while")


def collective(line: Instruction, computation: str) -> Collective:
  kind = line.opcode.removesuffix("-start")
  shapes = [x for x in line.shapes if x.dims]
  shape = max(shapes or line.shapes, key=lambda x: x.bytes)
  windowed = "windowed_dot_general_body" in computation
  if windowed:
    ag = "windowed_dot_general_body_ag" in computation
    kind = "all-gather" if ag else "reduce-scatter"
  group = replica_group(line.text)
  # No groups: all chips, of which a share of 1 is left but for rounding.
  size, share = shape.bytes, 1 - 1 / len(group) if group else 1.0
  if windowed or kind == "collective-permute":
    received = float(size)
  elif kind == "all-reduce":
    received = 2 * share * sum(x.bytes for x in shapes)
  elif kind == "reduce-scatter":
    received = size * max(len(group) - 1, 1)
  else:
    received = size * share
  op_name = re.search(r'op_name="([^"]*)"', line.text)
  return Collective(
    kind=kind,
    bytes=int(received),
    shape=shape,
    group=group,
    windowed=windowed,
    op_name=op_name.group(1) if op_name else "",
  )


def replica_group(text: str) -> tuple[int, ...]:
  """The first of a collective's groups; a pair of a permutation."""
  if found := re.search(r"(?:replica_groups|pairs)=\{\{([\d,]+)\}", text):
    return tuple(int(x) for x in found.group(1).split(","))
  if found := re.search(
    r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  ):
    sizes = [int(x) for x in found.group(3).split(",")]
    places = np.arange(math.prod(sizes)).reshape(sizes)
    if found.group(4):
      places = places.transpose([int(x) for x in found.group(4).split(",")])
    return tuple(places.reshape(-1, int(found.group(2)))[0].tolist())
  if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", text):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    over = re.findall(r"'(\w+)'", found.group(2))
    places = np.arange(math.prod(map(int, axes.values())))
    places = places.reshape([int(x) for x in axes.values()])
    first = tuple(slice(None) if axis in over else 0 for axis in axes)
    return tuple(np.ravel(places[first]).tolist())
  return ()


def mesh_axes(group: tuple[int, ...], sizes: Mapping[str, int]) -> str:
  """The axes of a mesh along which a group's chips differ, "fsdp+tensor"."""
  if not group:
    return "+".join(name for name, size in sizes.items() if size > 1)
  places = np.array(np.unravel_index(group, tuple(sizes.values())))
  differ = (places != places[:, :1]).any(1)
  return "+".join(
    name for name, differs in zip(sizes, differ, strict=True) if differs
  )


def by_kind(
  collectives: list[Collective], sizes: Mapping[str, int]
) -> dict[str, float]:
  """Bytes that a chip receives, by kind and mesh axes."""
  found: dict[str, float] = collections.defaultdict(float)
  for one in collectives:
    axes = mesh_axes(one.group, sizes)
    found[f"{one.kind} {axes}"] += one.turns * one.bytes
  return dict(found)


def _convolution(
  line: Instruction, left: Shape, right: Shape, out: Shape
) -> float:
  """2 for each product; padding multiplies nothing."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.text)
  assert labels is not None, line.text
  inputs, kernel, outputs = labels.groups()
  pairs = 1.0
  window = _window(line.text)
  for i, label in enumerate(sorted(x for x in kernel if x.isdigit())):
    size = right.dims[kernel.index(label)]
    taken = left.dims[inputs.index(label)]
    count = out.dims[outputs.index(label)]
    pairs *= _pairs(size, taken, count, window, i)
  features = right.dims[kernel.index("i")] * right.dims[kernel.index("o")]
  return 2.0 * out.dims[outputs.index("b")] * features * pairs


def _window(text: str) -> dict[str, list[list[int]]]:
  found = re.search(r"window=\{([^}]*)\}", text)
  fields = re.findall(r"(\w+)=([\d_x\-]+)", found.group(1)) if found else []
  return {
    name: [[int(n) for n in part.split("_")] for part in value.split("x")]
    for name, value in fields
  }


def _pairs(
  size: int, taken: int, count: int, window: dict[str, list[list[int]]], i: int
) -> float:
  """(output, kernel) places of a window that meet an input."""

  def field(name: str, default: int) -> int:
    return window[name][i][0] if name in window else default

  at = np.arange(count)[:, None] * field("stride", 1) - field("pad", 0)
  at = at + np.arange(size)[None, :] * field("rhs_dilate", 1)
  spread = field("lhs_dilate", 1)
  meets = (at >= 0) & (at < (taken - 1) * spread + 1) & (at % spread == 0)
  return float(meets.sum())
