"""What must be true of the programs' HLO, whatever their sizes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxvlm.plan import hlo
from jaxvlm.plan.compiler import Compiled
from jaxvlm.plan.programs import FIRST_COLUMNS, READS, Run

MIB = 1 << 20
LARGE = 64 * MIB  # a parameter that no chip should hold whole
SMALL = MIB  # what may be exchanged in each turn of a loop


def faults(run: Run, compiled: Sequence[Compiled]) -> list[str]:
  """What the programs do that they should not; []: nothing."""
  found: list[str] = []
  for one in compiled:
    if one.name.endswith(("decode", FIRST_COLUMNS)):
      found += _decode(one)
    if one.name in READS:
      found += _update(run, one)
      found += _logits(run, one)
    if one.name in ("optimizer step", *READS):
      whole, which = one.replicated
      if run.mesh.size > 1 and whole > LARGE:
        found.append(
          f"{one.name}: {which} is whole on every chip, {whole / MIB:.0f} MiB."
        )
  return found


def _decode(one: Compiled) -> Iterator[str]:
  """No weights are gathered in the loop, and no cache is copied or moved."""
  weights, caches = _counts(one.held["weights"]), _counts(one.held["caches"])
  arrays = weights | caches
  own = {
    x.sharding.shard_shape(x.shape)
    for x in jax.tree.leaves(one.held["weights"])
  }
  module = one.module
  for loop in module.loops():
    if module.turns(loop) is not None:
      continue
    for where, line in module.inside(loop.attribute("body").lstrip("%")):
      kind = line.opcode.removesuffix("-start")
      for shape in line.shapes:
        many = math.prod(shape.dims)
        if kind in hlo.MOVES and many in arrays and shape.bytes >= SMALL:
          yield f"{one.name}: {line.name} exchanges {shape} in each step."
          break
        # A copy to the chip is how it is read, and back how it is written.
        here = not any(x.on_chip for x in line.shapes[:2] if x.dims)
        copied = kind in ("copy", "transpose") and many in caches
        copied &= shape.dims not in own  # a weight may have as many numbers
        if copied and here and shape.bytes >= SMALL:
          yield f"{one.name}: {line.name} copies a cache, {shape}, in {where}."
          break


def _counts(tree: Any) -> set[int]:
  """Numbers of its arrays, whole and as a chip holds them."""
  return {
    math.prod(shape)
    for x in jax.tree.leaves(tree)
    if x.ndim > 1
    for shape in (x.shape, x.sharding.shard_shape(x.shape))
  }


def _update(run: Run, one: Compiled) -> Iterator[str]:
  """Nothing large is exchanged in a loop over chunks of logits."""
  sizes = dict(run.mesh.shape)
  for item in one.cost.collectives:
    axes = hlo.mesh_axes(item.group, sizes).split("+")
    split = {"data", "fsdp"} & set(axes)
    if split and item.kind == "all-to-all" and item.bytes >= 64 * MIB:
      yield f"{one.name}: {item.op_name} is an all-to-all of {item.shape}."
  module = one.module
  for loop in module.loops():
    if module.turns(loop) is not None:
      continue
    for where, line in module.inside(loop.attribute("body").lstrip("%")):
      if line.opcode.removesuffix("-start") not in hlo.COLLECTIVES:
        continue
      found = hlo.collective(line, where)
      over = hlo.mesh_axes(found.group, sizes)
      if {"data", "fsdp"} & set(
        over.split("+")
      ) and found.shape.bytes >= 16 * MIB:
        yield (
          f"{one.name}: {line.name} exchanges {found.shape} over "
          f"{over} for every chunk of logits."
        )


def _logits(run: Run, one: Compiled) -> Iterator[str]:
  """No array holds the logits of half of a chip's tokens.

  The head and its gradient, which the compiler may pad, have as many rows as
  the model is wide; logits of no more tokens cannot be told from them.
  """
  vocabulary = run.network.config.vocab_size
  hidden = run.network.config.text_config.hidden_size
  tensor = run.mesh.shape["tensor"]
  widths = {vocabulary, -(-vocabulary // tensor)}
  least = max(one.tokens / 2, 1.25 * hidden)
  for lines in one.module.computations.values():
    for line in lines:
      for shape in line.shapes:
        for wide in widths & set(shape.dims):
          rows = math.prod(shape.dims) / wide
          if rows >= least and hidden not in shape.dims:
            yield f"{one.name}: {line.name} holds logits, {shape}."
