"""What a plan refuses, and what it compiles once."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxvlm import sharding
from jaxvlm.plan import compiler, estimate, planning, programs
from tests.plans import STAGE, config, make_run


def test_a_plan_refuses_batches_of_an_evaluation_that_do_not_divide():
  fields = config()
  fields["evaluation"]["batch_questions"] = 12
  with pytest.raises(ValueError, match=r"batch_questions: got 12.*8 data sha"):
    make_run(fields)


def test_a_plan_refuses_updates_that_the_pods_hosts_do_not_divide(monkeypatch):
  pod = [SimpleNamespace(process_index=i // 4) for i in range(256)]
  assert planning.count_hosts(np.array(pod).reshape(1, 64, 4)) == 64
  fields = config()
  fields["stages"][STAGE]["updates_per_rollout"] = 16
  make_run(fields)  # of one host
  monkeypatch.setattr(planning, "count_hosts", lambda devices: 64)
  with pytest.raises(ValueError, match=r"got 512.*1024 .64 hosts, 16 updates"):
    make_run(fields)


def test_a_stage_that_is_not_there_is_named():
  with pytest.raises(
    ValueError, match=r"no 'dreaming'; there are .*perception"
  ):
    make_run(config(), stage="dreaming")


@pytest.mark.parametrize(
  ("freeze", "names", "seen"),
  [
    ((), ["tower"], "Vision"),
    (("merger",), ["tower"], "Vision"),
    (("vision_tower",), ["tower", "merger"], "Unmerged"),
    (("vision_tower", "merger"), ["tower"], "Features"),
  ],
)
def test_a_plan_updates_from_what_a_frozen_tower_has_seen(freeze, names, seen):
  fields = config()
  fields["stages"][STAGE]["freeze"] = freeze
  run = make_run(fields)
  run = dataclasses.replace(
    run, evaluation=run.stage.make_draws(), evaluation_questions=64
  )
  found = {}

  def compile(name, call, *arguments, **_):
    found[name] = arguments
    return call.eval_shape(*arguments)

  with sharding.use(run.mesh):
    programs.compile_run(run, compile)
  for prefix, expected in (("", names), ("evaluation: ", ["tower"])):
    towers = [f"{prefix}{name}" for name in ("tower", "merger")]
    own = [name for name in towers if name in found]
    assert own == [f"{prefix}{name}" for name in expected]
  vision = found["gradient"][-1].tree.vision
  assert type(vision).__name__ == seen
  tower = run.network.config.vision_config
  if seen == "Unmerged":
    assert vision.tokens.shape[2:] == (4, tower.hidden_size)
    (merged,) = found["merger"][2:]
    assert type(merged) is type(vision)


@pytest.mark.parametrize(
  ("reference", "kl_coef", "times", "seen"),
  [
    ("base", 0.01, [1, 1], ["Features", "Vision"]),
    ("stage_start", 0.01, [2, 0], ["Features"]),
    ("base", 0.0, [1, 0], ["Features"]),
  ],
)
def test_a_plan_has_a_reference_look_where_another_stage_trained_the_tower(
  reference, kl_coef, times, seen
):
  fields = config()
  later = fields["schedule"][1]
  fields["stages"][later] |= {"freeze": ("vision_tower", "merger")}
  fields["stages"][later] |= {"reference": reference, "kl_coef": kl_coef}
  run = make_run(fields, later)
  assert run.stage.asks_old_logprobs
  found = {}

  def compile(name, call, *arguments, **_):
    found[name] = arguments
    return call.eval_shape(*arguments)

  with sharding.use(run.mesh):
    programs.compile_run(run, compile, ("update",))
    counts = estimate.calls(run, refills=True)
  names = ["logprobs", "logprobs: reference"]
  asked = [name for name in found if name.startswith("logprobs")]
  assert asked == names[: len(seen)]
  visions = [found[name][-1].vision for name in asked]
  assert [type(vision).__name__ for vision in visions] == seen
  updates = run.stage.updates_per_rollout
  calls = len(programs.microbatches(run)[0].groups) * updates
  assert [counts[name] for name in names] == [n * calls for n in times]


@pytest.mark.parametrize(
  ("freeze", "names"),
  [((), []), (("vision_tower",), ["tower"])],
)
def test_a_plan_of_demonstrations_asks_a_frozen_tower(freeze, names):
  fields = config()
  fields["stages"][STAGE] |= {"kind": "sft", "num_completions": 1}
  fields["stages"][STAGE] |= {"freeze": freeze, "kl_coef": 0.0, "rewards": ()}
  run = make_run(fields)
  found = []

  def compile(name, call, *arguments, **_):
    found.append(name)
    return call.eval_shape(*arguments)

  with sharding.use(run.mesh):
    programs.compile_run(run, compile)
    counts = estimate.calls(run, refills=True)
  own = ["zeros", "gradient", "optimizer step"]
  assert found == ["optimizer state", *names, *own]
  assert all(counts[name] > 0 for name in found[1:])


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
