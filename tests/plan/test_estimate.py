"""How long a step takes, from what its programs need."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm import sharding
from jaxvlm.plan import estimate, programs
from jaxvlm.plan.chips import Chip
from jaxvlm.plan.programs import FIRST_COLUMNS
from jaxvlm.rollout import schedule
from tests.plans import config, make_run

CHIP = Chip(name="", hbm=1, flops=1e3, bandwidth=10.0, links=1.0)


def test_caches_grow_within_a_shape_and_from_one_to_the_next(monkeypatch):
  monkeypatch.setitem(schedule._NARROWEST, "cpu", 256)
  steps = [(8, 5, 600), (8, 1, 0), (2, 1, 1500)]
  assert list(estimate.with_columns(steps, 2048)) == [
    *[(8, 5, 256, 256), (8, 5, 512, 256), (8, 5, 1024, 88)],
    *[(2, 1, 1024, 424), (2, 1, 2048, 1076)],
  ]
  assert list(estimate.with_columns(steps, 300)) == [
    *[(8, 5, 300, 600), (2, 1, 300, 1500)]
  ]


@pytest.fixture
def compiled():
  """compiled(name, bytes): of a program that reads 40 bytes of weights."""
  weights = {"layers": jax.ShapeDtypeStruct((10,), jnp.float32)}

  def make(name, bytes):
    cost = SimpleNamespace(flops=0.0, bytes=bytes, collectives=())
    return SimpleNamespace(
      name=name, cost=cost, held={"weights": weights, "caches": ()}
    )

  return make


def test_a_step_of_decoding_reads_as_many_columns_as_its_caches_have(
  monkeypatch, compiled
):
  """Between the first and all columns in a line; the weights always."""
  run = make_run(config())
  tied = dataclasses.replace(run.network.config, tie_word_embeddings=True)
  network = dataclasses.replace(run.network, config=tied)
  run = dataclasses.replace(run, network=network)
  at_once, _ = estimate.in_flight(run)
  blocks, group = at_once, run.stage.num_completions
  assert run.stage.max_completion_length == 2048
  monkeypatch.setitem(schedule._NARROWEST, "cpu", 256)
  shapes = [
    (blocks, group, 256, 10),  # 140 bytes each
    (blocks, group, 1152, 7),  # half way: 590 + 140 over two
    (blocks, group, 2048, 3),
    (blocks // 2, group, 2048, 20),  # 40, and half of the other 1000
  ]
  monkeypatch.setattr(estimate, "decoded", lambda run, refills: shapes)
  found = estimate.estimate(
    run,
    [compiled(FIRST_COLUMNS, 140.0), compiled("decode", 1040.0)],
    CHIP,
    1.0,
  )
  (one,) = found.programs
  assert one.name == "decode" and one.calls == 40 and one.bound == "hbm"
  expected = 10 * 140 + 7 * (140 + 1040) / 2 + 3 * 1040 + 20 * 540
  assert one.seconds == pytest.approx(expected / CHIP.bandwidth)
  assert found.seconds == one.seconds


def test_prompts_are_read_by_each_wave_and_their_attention_counted_once(
  monkeypatch,
):
  """32 of a shard's 64 questions at once: two waves."""
  run = dataclasses.replace(make_run(config()), slots=32 * 5 * 8)
  assert estimate.in_flight(run)[0] == 32
  waves = estimate.calls(run, refills=False)
  refill = estimate.calls(run, refills=True)
  assert (waves["prefill"], refill["prefill"]) == (2, 1)
  assert refill["admit: prefill"] == 4
  monkeypatch.setattr(sharding, "backend", lambda: "tpu")
  fused = dataclasses.replace(run.network, attention="fused")
  run = dataclasses.replace(run, network=fused)
  once, half = (
    estimate.attention_flops(run, prefills=n)["prefill"] for n in (1, 2)
  )
  assert once == 2 * half > 0


def test_rows_that_fit_the_next_shape_at_once_decode_in_no_other():
  lengths = np.array([[30, 7]])
  steps = estimate.decode_steps(lengths, 4, 1, [(2, 1), (1, 1)])
  assert steps == [(4, 2, 0), (2, 1, 7), (1, 1, 23)]


@pytest.mark.parametrize("refills", [True, False])
def test_a_plan_admits_only_where_the_sampler_does(monkeypatch, refills):
  monkeypatch.setattr(schedule, "refills", lambda *_: refills)
  run = dataclasses.replace(make_run(config()), slots=32 * 5 * 8)
  names = []

  def compile(name, call, *arguments, **_):
    names.append(name)
    return call.eval_shape(*arguments)

  with sharding.use(run.mesh):
    programs.compile_run(run, compile, ("rollout",))
  assert ("admit" in names) == ("admit: prefill" in names) == refills
