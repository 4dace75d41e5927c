"""What a search tries, in which order, and what it leaves out."""

import types

import jax
import numpy as np
import pytest

from configs import staged
from jaxvlm import models, sharding
from jaxvlm.plan import chips, compiler, planning
from jaxvlm.plan.batch import Lengths

STAGE = "visual_perception"
CHIP = chips.KINDS["TPU v5 lite"]


def config():
  return staged.get_config("qwen2_5_vl_3b").to_dict()


def test_slots_change_fastest_then_what_an_update_takes_then_the_mesh():
  found = list(planning.candidates(config(), 16, STAGE))
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
  found = list(planning.candidates(fields, 16, STAGE))[:18]
  assert [one.get("model.remat") for one in found] == [None] * 6 + ["full"] * 12


def test_batches_of_an_evaluation_grow_to_the_data_shards():
  first = next(planning.candidates(config(), 128, STAGE))
  assert first["evaluation.batch_questions"] == 128
  assert "evaluation.batch_questions" not in next(
    planning.candidates(config(), 16, STAGE)
  )


def test_a_plan_refuses_batches_of_an_evaluation_that_do_not_divide():
  fields = config()
  fields["evaluation"]["batch_questions"] = 12
  mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1, slices=-1)
  with (
    sharding.use(mesh),
    pytest.raises(ValueError, match=r"batch_questions: got 12.*8 data shards"),
  ):
    planning.make_run(
      fields,
      mesh=mesh,
      architecture=models.find_size("qwen2_5_vl_3b"),
      stage=STAGE,
      lengths=Lengths(
        prompt=512,
        longest_prompt=2048,
        visual=256,
        most_visual=1984,
        completion=512,
        longest_completion=2048,
      ),
    )


def searched(monkeypatch, largest, budget=60.0):
  """What a search over five tries planned, given each try's largest program."""
  meshes = [object(), object()]
  tries = [
    ({"mesh.tensor": tensor, "sampler.slots": slots}, mesh)
    for tensor, mesh in zip((1, 2), meshes, strict=True)
    for slots in (0, 80, 40)
  ][:5]
  shared, planned = [], []

  def make(run, chip, *, efficiency, known, brief):
    known[len(known)] = run
    shared.append(len(known))
    at = tries.index(
      next(t for t in tries if t[1] is run.mesh and t[0] == run.overrides)
    )
    name = largest[at]
    return types.SimpleNamespace(
      fits=not name, largest=(name, 0), overrides=run.overrides
    )

  monkeypatch.setattr(planning, "make", make)
  monkeypatch.setattr(planning, "least", lambda run: 0)
  found = planning.search(
    (
      (overrides, types.SimpleNamespace(mesh=mesh, overrides=overrides))
      for overrides, mesh in tries
    ),
    CHIP,
    efficiency=0.5,
    budget=budget,
    told=lambda overrides, plan: planned.append(tuple(overrides.values())),
  )
  return found and tuple(found[0].values()), planned, shared


def test_a_search_ends_at_the_first_run_that_fits(monkeypatch):
  found, planned, shared = searched(
    monkeypatch, ["decode", "prefill", "", "", ""]
  )
  assert found == (1, 40)
  assert planned == [(1, 0), (1, 80), (1, 40)]
  assert shared == [1, 2, 3]  # programs of one mesh are compiled once


def test_fewer_slots_are_not_tried_where_the_update_is_too_large(monkeypatch):
  found, planned, shared = searched(
    monkeypatch, ["gradient", "?", "?", "decode", ""]
  )
  assert found == (2, 80)
  assert planned == [(1, 0), (2, 0), (2, 80)]
  assert shared == [1, 1, 2]  # another mesh begins anew


def test_a_search_out_of_time_begins_no_other(monkeypatch):
  assert searched(monkeypatch, [""] * 5, budget=-1.0) == (None, [], [])


def test_a_program_that_is_known_is_not_compiled_again():
  done = []
  known = {}
  x = jax.ShapeDtypeStruct(
    (4,),
    np.float32,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, slices=-1)
  for _ in range(2):
    compile = compiler.Compiler(mesh=mesh, done=done.append, known=known)
    compile("double", jax.jit(lambda x: 2 * x), x)
  assert len(known) == 1 and len(done) == 2
  compile("triple", jax.jit(lambda x: 3 * x), x)
  assert len(known) == 2
