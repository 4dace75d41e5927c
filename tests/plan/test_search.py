"""What a search tries, in which order, and what it leaves out."""

import dataclasses
import types

from jaxvlm import sharding
from jaxvlm.plan import chips, compiler, planning, programs, search
from tests import plans
from tests.plans import STAGE, config

CHIP = chips.KINDS["TPU v5 lite"]


def test_slots_change_fastest_then_what_an_update_takes_then_the_mesh():
  found = list(search.candidates(config(), 16, STAGE))
  tensors = [one["mesh.tensor"] for one in found]
  assert tensors == sorted(tensors) and set(tensors) == {1, 2, 4, 8}
  first = [one for one in found if one["mesh.tensor"] == 1]
  assert first[0]["sampler.slots"] == 0
  assert first[1]["sampler.slots"] == 16 * 16 * 5
  smaller = f"stages.{STAGE}.microbatch_tokens"
  assert [smaller in one for one in first] == [False] * 6 + [True] * 6
  assert first[-1][smaller] == 2048 + 5 * 2048


def test_rematerialisation_is_tried_before_smaller_microbatches():
  fields = config()
  fields["model"]["remat"] = "dots"
  found = list(search.candidates(fields, 16, STAGE))[:18]
  assert [one.get("model.remat") for one in found] == [None] * 6 + ["full"] * 12


def test_batches_of_an_evaluation_grow_to_the_data_shards():
  first = next(search.candidates(config(), 128, STAGE))
  assert first["evaluation.batch_questions"] == 128
  assert "evaluation.batch_questions" not in next(
    search.candidates(config(), 16, STAGE)
  )


def make_run(slots, *, fsdp, tensor):
  fields = config()
  fields["sampler"]["slots"] = slots
  return plans.make_run(fields, fsdp=fsdp, tensor=tensor)


def test_what_a_chip_holds_at_least_is_counted_by_hand():
  """36 layers, 2 heads of keys and of values with 128 numbers each."""
  whole, part = (make_run(slots, fsdp=4, tensor=2) for slots in (0, 20))
  columns = 2048 + 5 * 2048
  block = 36 * 2 * (2 // 2) * 128 * 2 * columns
  assert search.least(whole) - search.least(part) == (512 // 4 - 1) * block
  weights = compiler.size(programs.gathered(part.network, part.mesh))
  params = sharding.abstract(
    part.mesh, part.network.shapes(), part.network.axes()
  )
  # Weights and reference in bfloat16; two moments and what rounding left out.
  state = compiler.size(params) // 2 * (2 + 2 + 4 + 4 + 2)
  assert search.least(part) == state + weights + block


def test_more_at_once_is_faster_and_so_are_more_chips_for_the_weights():
  """Each step of decoding reads all weights, however few rows it has."""
  times = [
    search.seconds(make_run(slots, fsdp=4, tensor=2), CHIP)
    for slots in (0, 640, 160)
  ]
  assert times == sorted(times)
  split = search.seconds(make_run(160, fsdp=4, tensor=2), CHIP)
  assert split < search.seconds(make_run(160, fsdp=8, tensor=1), CHIP)


def searched(monkeypatch, largest, budget=60.0, order=(0, 1, 2, 3, 4)):
  """What a search over five tries planned, given each try's largest program.

  Args:
    monkeypatch: of pytest.
    largest: of each try the program that is too large; "": it fits.
    budget: seconds.
    order: of the tries by their seconds.
  """
  runs = [
    types.SimpleNamespace(
      mesh=mesh, slots=slots, network="network", stage="stage"
    )
    for mesh in ("one", "two")
    for slots in (80, 40, 20)
  ][:5]
  shared, planned = [], []

  def make(run, chip, *, efficiency, known, brief):
    known[len(known)] = run
    shared.append(len(known))
    name = largest[runs.index(run)]
    return types.SimpleNamespace(fits=not name, largest=(name, 0))

  monkeypatch.setattr(planning, "make", make)
  monkeypatch.setattr(search, "least", lambda run: 0)
  monkeypatch.setattr(
    search, "seconds", lambda run, chip: order.index(runs.index(run))
  )
  monkeypatch.setattr(search.estimate, "in_flight", lambda run: (run.slots, 1))
  found = search.search(
    [((run.mesh, run.slots), run) for run in runs],
    CHIP,
    efficiency=0.5,
    budget=budget,
    told=lambda overrides, plan: planned.append(overrides),
  )
  return found and found[0], planned, shared


def test_a_search_ends_at_the_first_run_that_fits(monkeypatch):
  found, planned, shared = searched(
    monkeypatch, ["decode", "prefill", "", "", ""]
  )
  assert found == ("one", 20)
  assert planned == [("one", 80), ("one", 40), ("one", 20)]
  assert shared == [1, 2, 3]  # programs of one mesh are compiled once


def test_what_is_fastest_is_tried_first(monkeypatch):
  found, planned, _ = searched(
    monkeypatch, ["", "", "", "decode", ""], order=(3, 2, 0, 1, 4)
  )
  assert found == ("one", 20)
  assert planned == [("two", 80), ("one", 20)]


def test_other_slots_are_not_tried_where_the_update_is_too_large(monkeypatch):
  found, planned, shared = searched(
    monkeypatch, ["gradient", "?", "?", "decode", ""]
  )
  assert found == ("two", 40)
  assert planned == [("one", 80), ("two", 80), ("two", 40)]
  assert shared == [1, 1, 2]  # another mesh begins anew


def test_more_slots_are_not_tried_where_decoding_is_too_large(monkeypatch):
  _, planned, _ = searched(
    monkeypatch, ["?", "decode", "", "", ""], order=(1, 0, 2, 3, 4)
  )
  assert planned == [("one", 40), ("one", 20)]


def test_what_arithmetic_refuses_is_not_compiled(monkeypatch):
  monkeypatch.setattr(planning, "make", None)
  run = make_run(0, fsdp=8, tensor=1)
  small = dataclasses.replace(CHIP, hbm=search.least(run) - 1)
  assert not search.search(
    [({}, run)], small, efficiency=0.5, budget=60.0, told=print
  )


def test_a_search_out_of_time_begins_no_other(monkeypatch):
  assert searched(monkeypatch, [""] * 5, budget=-1.0) == (None, [], [])
