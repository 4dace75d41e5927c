"""The programs of a small network, compiled for TPUs that are not there."""

import dataclasses
import importlib.util
import types

import jax
import pytest

from configs import staged
from jaxvlm import sharding
from jaxvlm.models import find_family, find_size
from jaxvlm.plan import chips, compiler, hlo, planning, structure
from jaxvlm.plan.batch import Lengths
from jaxvlm.plan.planning import Plan, remedy

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install -e '.[tpu]'",
)
# Large enough for its weights to be told from activations, and head sizes that
# TPU kernels take.
TEXT = {
  "vocab_size": 32768,
  "hidden_size": 512,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 1,
  "intermediate_size": 2048,
  "rms_norm_eps": 1e-6,
  "max_position_embeddings": 4096,
  "rope_theta": 1e6,
}
VISION = {
  "depth": 2,
  "hidden_size": 256,
  "num_heads": 4,
  "intermediate_size": 512,
  "out_hidden_size": 512,
  "patch_size": 14,
  "temporal_patch_size": 2,
  "spatial_merge_size": 2,
  "window_size": 112,
  "fullatt_block_indexes": [1],
  "tokens_per_second": 2,
}
LENGTHS = Lengths(
  prompt=96,
  longest_prompt=256,
  visual=32,
  most_visual=128,
  completion=64,
  longest_completion=512,
)


def make_plan(topology: str, *, tensor: int, slots: int) -> Plan:
  config = staged.get_config("qwen2_5_vl_3b").to_dict()
  config["mesh"] |= {"data": 1, "fsdp": -1, "tensor": tensor}
  config["sampler"]["slots"] = slots
  stage = config["stages"]["visual_perception"]
  stage |= {"rollout_questions": 16, "update_questions": 16}
  stage |= {"updates_per_rollout": 2, "microbatch_tokens": 2048}
  stage |= {"max_completion_length": 512, "num_completions": 4}
  config["inputs"]["max_prompt_length"] = 256
  family = find_family("qwen2_5_vl")
  architecture = family.Config.from_hf(
    {
      "model_type": "qwen2_5_vl",
      "tie_word_embeddings": True,
      "text_config": TEXT
      | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
      "vision_config": VISION,
    }
  )
  devices = chips.devices(topology)
  mesh = sharding.make_mesh(**config["mesh"], devices=devices)
  with sharding.use(mesh):
    run = planning.make_run(
      config,
      mesh=mesh,
      architecture=architecture,
      stage="visual_perception",
      lengths=LENGTHS,
    )
  return planning.make(run, chips.find(devices[0]), efficiency=0.5)


@pytest.fixture(scope="module")
def plan():
  """One kv head on two chips: it does not divide."""
  pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
  return make_plan("v5e:2x2", tensor=2, slots=32)


@needs_libtpu
def test_every_program_of_a_step_compiles_for_a_pod(plan):
  names = [one.name for one in plan.compiled]
  assert names == [
    "optimizer state",
    "decode weights: around",
    "decode weights",
    "tower",
    "prefill",
    "empty caches",
    "decode: first columns",
    "grow",
    "decode",
    "admit: prefill",
    "admit",
    *["regroup", "regroup: rest"] * ("regroup" in names),
    "logprobs",
    "zeros",
    "gradient",
    "optimizer step",
  ]
  assert plan.fits and "fits" in plan.verdict


@needs_libtpu
def test_nothing_is_gathered_copied_or_held_that_should_not_be(plan):
  assert plan.faults == ()


@needs_libtpu
def test_weights_are_gathered_a_layer_at_a_time(plan):
  """A TPU gathers into temporaries, and copies outputs from there."""
  programs = {one.name: one for one in plan.compiled}
  layer = programs["decode weights"].memory
  weights = compiler.size(programs["decode"].held["weights"])
  assert layer.temporaries <= layer.outputs < weights / 4
  assert layer.outputs + layer.beside["decode weights"] >= weights


@needs_libtpu
def test_a_kernel_attends_where_the_mesh_consists_of_tpus(plan):
  gradient = next(x for x in plan.compiled if x.name == "gradient")
  text = [
    line.text
    for lines in gradient.module.computations.values()
    for line in lines
  ]
  assert any("tpu_custom_call" in line for line in text)


HBM = "f32[4,1024,1,128]{3,2,1,0:T(8,128)}"
CHIP = "f32[4,1024,1,128]{3,2,1,0:T(8,128)S(1)}"


def _copies(*lines: str, weight: tuple[int, ...] = ()) -> list[str]:
  """Faults of a decode loop of these lines, with a cache of 2 MiB.

  With weights of this shape.
  """
  body = "\n".join(f"  {line}" for line in lines)
  text = f"""
%body (p: f32[4,1024,1,128]) -> f32[4,1024,1,128] {{
  %p = {HBM} parameter(0)
{body}
}}

%condition (p: f32[4,1024,1,128]) -> pred[] {{
  %p = f32[4,1024,1,128]{{3,2,1,0}} parameter(0)
  ROOT %go = pred[] custom-call(%p)
}}

ENTRY %main (a: f32[4,1024,1,128]) -> f32[4,1024,1,128] {{
  %a = f32[4,1024,1,128]{{3,2,1,0}} parameter(0)
  ROOT %w = f32[4,1024,1,128]{{3,2,1,0}} while(%a), condition=%condition, body=%body
}}
"""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  weights, cache = (
    jax.ShapeDtypeStruct(shape, "float32", sharding=here)
    for shape in (weight, (1024, 4, 1, 128))
  )
  one = types.SimpleNamespace(
    name="decode",
    module=hlo.Module(text),
    held={"weights": weights, "caches": cache},
  )
  return structure.faults(None, [one])


def test_a_cache_that_a_step_copies_is_a_fault():
  assert len(_copies(f"ROOT %c = {HBM} copy(%p)")) == 1


def test_a_cache_that_is_read_and_written_on_the_chip_is_none():
  read = f"%c = {CHIP} copy(%p)"
  back = f"%s = ({HBM}, {CHIP}, u32[]{{:S(2)}}) copy-start(%c)"
  assert _copies(read, back, f"ROOT %d = {HBM} copy-done(%s)") == []


def test_a_weight_that_has_as_many_numbers_as_a_cache_is_none():
  copy = f"ROOT %c = {HBM} copy(%p)"
  assert _copies(copy, weight=(4, 1024, 1, 128)) == []


@needs_libtpu
def test_what_should_not_be_is_found(plan):
  """A cache that a step gathers."""
  decode = next(x for x in plan.compiled if x.name == "decode")
  module = decode.module
  loop = next(x for x in module.loops() if module.turns(x) is None)
  body = module.computations[loop.attribute("body").lstrip("%")]
  cache = next(
    line
    for line in body
    for shape in line.shapes
    if line.opcode == "get-tuple-element" and shape.bytes >= structure.MIB
  )
  gathered = dataclasses.replace(cache, opcode="all-gather", name="planted")
  body.append(gathered)
  try:
    found = structure.faults(plan.run, [decode])
  finally:
    body.remove(gathered)
  assert any("planted" in fault for fault in found)


def _holds(array: str, *, size: str, tokens: int) -> list[str]:
  """Faults of an update on 64 x 4 chips that holds this array."""
  module = hlo.Module(
    f"\nENTRY %m (a: {array}) -> {array} {{\n"
    f"  ROOT %a = {array}{{2,1,0}} parameter(0)\n}}\n"
  )
  run = types.SimpleNamespace(
    network=types.SimpleNamespace(config=find_size(size)),
    mesh=types.SimpleNamespace(
      shape={"data": 1, "fsdp": 64, "tensor": 4}, size=256
    ),
  )
  one = types.SimpleNamespace(
    name="gradient",
    module=module,
    cost=module.cost(),
    replicated=(0, ""),
    tokens=tokens,
  )
  return structure.faults(run, [one])


@pytest.mark.parametrize("rows", ["1,16384", "1,8192", "4,4096"])
def test_logits_of_half_of_the_tokens_are_a_fault(rows):
  """16384 tokens are 8 times the width of this model."""
  array = f"f32[{rows},37984]"
  (fault,) = _holds(array, size="qwen2_5_vl_3b", tokens=16384)
  assert "holds logits" in fault


@pytest.mark.parametrize("rows", ["1,3584", "64,64", "2,3584", "64,56"])
def test_the_heads_gradient_is_none_padded_or_not(rows):
  assert not _holds(f"f32[{rows},38016]", size="qwen2_5_vl_7b", tokens=6144)


@pytest.mark.parametrize(
  ("name", "knob"),
  [
    ("gradient", "microbatch_tokens"),
    ("decode", "sampler.slots"),
    ("optimizer step", "mesh.fsdp"),
  ],
)
def test_what_does_not_fit_names_a_knob_that_helps(name, knob):
  assert knob in remedy(name)
