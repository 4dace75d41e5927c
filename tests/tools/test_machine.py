"""Rates are of the work that is said, and weighted by their share of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import machine
from tools.operations import Need, Product


def product(rows, inner, outer, flops):
  return Product(rows=rows, inner=inner, outer=outer, flops=flops)


def test_shapes_with_most_operations_are_timed_each_once(monkeypatch):
  monkeypatch.setattr(machine, "SHAPES", 2)
  products = (
    product(8, 4, 2, 10.0),
    product(8, 9, 9, 11.0),
    product(8, 2, 4, 5.0),  # the same weights, turned
    product(16, 2, 4, 12.0),
  )
  assert machine.main_shapes(products) == {(8, 2, 4): 15.0, (16, 2, 4): 12.0}


def test_a_rate_is_all_operations_over_their_time(monkeypatch):
  rates = {(1, 2, 2): 10.0, (1, 3, 3): 40.0}
  monkeypatch.setattr(machine, "shape_rate", lambda shape, _: rates[shape])
  products = (product(1, 2, 2, 100.0), product(1, 3, 3, 300.0))
  seconds = 100 / 10 + 300 / 40
  assert machine.matmul_rate(products, "float32") == 400 / seconds


def test_the_timed_products_are_as_many_as_is_said():
  """XLA counts the body of a loop once."""
  x, there, back = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((16, 32), (32, 64), (64, 32))
  )
  program = machine._multiply.lower(x, there, back, 7).compile()
  found = program.cost_analysis()["flops"]
  assert found == pytest.approx(4 * 16 * 32 * 64, rel=0.01)


def test_the_longest_call_stays_finite(monkeypatch):
  seen = []
  monkeypatch.setattr(
    machine, "fastest", lambda run, most: seen.append(run(most)) or 1.0
  )
  for shape in ((8, 64, 64), (8, 2, 200), (8, 200, 200)):
    machine.shape_rate(shape, "float32")
  assert all(np.isfinite(x).all() for x in seen)
  assert all(np.abs(x).max() > 1e-30 for x in seen)


def test_a_call_is_as_long_as_is_asked_and_the_fastest_counts(monkeypatch):
  clock, told = [0.0], []
  pauses = iter([9.0, 0.0, 5.0, 1.0, 3.0, 2.0, 2.0, 2.0])  # of others

  def run(times):
    told.append(times)
    clock[0] += times * 0.5 + next(pauses)
    return jnp.zeros(())

  monkeypatch.setattr(machine, "SECONDS", 2.0)
  monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
  assert machine.fastest(run, most=100) == (4 * 0.5 + 1.0) / 4
  assert told == [1, 1, *[4] * machine.CALLS]
  pauses = iter([0.0] * 8)
  told.clear()
  machine.fastest(run, most=3)
  assert told == [1, 1, *[3] * machine.CALLS]


def test_three_arrays_go_by_each_time(monkeypatch):
  monkeypatch.setattr(machine, "SECONDS", 0.001)
  seen = []
  fastest = machine.fastest

  def spy(run, most):
    seen.append(np.asarray(run(2)))
    return 0.5 if fastest(run, most) > 0 else 0.0

  monkeypatch.setattr(machine, "fastest", spy)
  assert machine.bandwidth(4000) == 3 * 4000 / 0.5
  np.testing.assert_array_equal(seen[0], np.full(1000, (0.5 + 1) * 0.5 + 1))


def test_the_limit_is_whichever_takes_longer():
  need = Need(products=(product(1, 1, 1, 60.0),), attention=40.0, bytes=30.0)
  assert machine.limit(need, 50.0, 30.0) == 2.0
  assert machine.limit(need, 50.0, 5.0) == 6.0
