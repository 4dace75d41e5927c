"""How fast this machine multiplies and reads memory, asked through jax.

The limit that bench.py compares with: the best of a few short calls, so that
what others do in between does not make the machine look slow. What fits into a
cache may be read faster than memory.
"""

import collections
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from tools.operations import Need, Product

SHAPES = 6  # of products that are timed
SECONDS = 0.03  # of a call
CALLS = 6  # of which the fastest counts
ARRAY = 1 << 28  # bytes, more than caches hold
_MOST = 100  # products there and back of a call: numbers must stay finite

Shape = tuple[int, int, int]  # rows, and the weights' sides, the shorter first


def main_shapes(products: Iterable[Product]) -> dict[Shape, float]:
  """Operations of the shapes that have most; a matrix is as its transpose."""
  found: collections.Counter[Shape] = collections.Counter()
  for one in products:
    short, long = sorted((one.inner, one.outer))
    found[one.rows, short, long] += one.flops
  return dict(found.most_common(SHAPES))


def matmul_rate(products: Iterable[Product], dtype: Any) -> float:
  """Operations a second of these products, each shape by its share of them."""
  shapes = main_shapes(products)
  seconds = sum(n / shape_rate(shape, dtype) for shape, n in shapes.items())
  return sum(shapes.values()) / seconds


def shape_rate(shape: Shape, dtype: Any) -> float:
  """Operations a second of [rows inner] @ [inner outer], there and back."""
  rows, inner, outer = shape
  keys = jax.random.split(jax.random.key(0), 3)
  x, there, back = (
    jax.random.normal(key, sides, dtype) / math.sqrt(sides[0])
    for key, sides in zip(
      keys, ((rows, inner), (inner, outer), (outer, inner)), strict=True
    )
  )
  seconds = fastest(lambda count: _multiply(x, there, back, count), _MOST)
  return 4 * rows * inner * outer / seconds


def bandwidth(size: int | None = None) -> float:
  """Bytes a second of x <- x / 2 + y: two arrays read, one written."""
  count = (size or ARRAY) // 4
  held = [jnp.ones(count, jnp.float32)]
  y = jnp.ones(count, jnp.float32)

  def add(times: int) -> jax.Array:
    held[0] = _add(held[0], y, times)
    return held[0]

  return 3 * 4 * count / fastest(add, _MOST)


def limit(need: Need, rate: float, bytes_a_second: float) -> float:
  """Seconds below which no run can be: operations or bytes, whichever more."""
  return max(need.flops / rate, need.bytes / bytes_a_second)


def fastest(run: Callable[[int], jax.Array], most: int) -> float:
  """Seconds of one of the times that a call is told to do its work."""
  jax.block_until_ready(run(1))  # compiles

  def spent(times: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run(times))
    return (time.perf_counter() - started) / times

  times = min(most, max(1, math.ceil(SECONDS / spent(1))))
  return min(spent(times) for _ in range(CALLS))


@jax.jit
def _multiply(
  x: jax.Array, there: jax.Array, back: jax.Array, times: int
) -> jax.Array:
  """In a loop, as layers are, and each product needs the one before."""
  return jax.lax.fori_loop(0, times, lambda i, x: x @ there @ back, x)


@functools.partial(jax.jit, donate_argnums=0)
def _add(x: jax.Array, y: jax.Array, times: int) -> jax.Array:
  return jax.lax.fori_loop(0, times, lambda i, x: 0.5 * x + y, x)
