"""What is read from a program's HLO, on text small enough to count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm.plan import hlo

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
  ("text", "axes"),
  [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
    ("replica_groups=[1,8]<=[8]", "data+fsdp+tensor"),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", "data+fsdp"),
    ("source_target_pairs={{0,2},{2,0}}", "fsdp"),
    ("replica_groups={}", "data+fsdp+tensor"),
  ],
)
def test_a_group_is_told_by_the_axes_along_which_its_chips_differ(text, axes):
  assert hlo.mesh_axes(hlo.replica_group(text), SIZES) == axes


LOOP = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,8]{1,0} all-reduce(%y), replica_groups={{0,1}}, metadata={op_name="f"}
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%next, %z)
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] END
  ROOT %go = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_a_loops_body_counts_as_often_as_it_turns():
  """By twos to 10; an all-reduce moves 2 (n - 1) / n of its 256 bytes."""
  cost = hlo.Module(LOOP.replace("END", "constant(10)")).cost()
  assert cost.flops == 5 * 2 * 8**3
  assert hlo.by_kind(cost.collectives, {"fsdp": 2}) == {
    "all-reduce fsdp": 5 * 256
  }


def test_a_loop_whose_end_is_data_turns_as_often_as_one_says():
  text = LOOP.replace("END", "parameter(0)")
  assert hlo.Module(text, dynamic_turns=3).cost().flops == 3 * 2 * 8**3


def test_what_is_on_the_chip_is_no_traffic():
  text = """
ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %b = f32[1024]{0:T(1024)S(1)} negate(%a)
  ROOT %c = f32[1024]{0} negate(%b)
}
"""
  assert hlo.Module(text).cost().bytes == 2 * 4096


def test_a_part_that_is_fetched_ahead_counts_alone():
  """On TPUs weights and caches come to the chip in slices of a few MiB."""
  text = """
ENTRY %main (a: f32[1024]) -> f32[256] {
  %a = f32[1024]{0} parameter(0)
  %b = ((f32[1024]{0}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:256]}
  %c = f32[256]{0:T(256)S(1)} slice-done(%b)
  ROOT %d = f32[256]{0} negate(%c)
}
"""
  assert hlo.Module(text).cost().bytes == 1024 + 1024


@pytest.mark.parametrize(("here", "there"), [("", "S(1)"), ("S(1)", "")])
def test_a_copy_to_the_chip_or_from_it_counts_once(here, there):
  text = f"""
ENTRY %main (a: f32[1024]) -> f32[1024] {{
  %a = f32[1024]{{0:T(1024){here}}} parameter(0)
  %b = (f32[1024]{{0:T(1024){there}}}, f32[1024]{{0:T(1024){here}}}, u32[]{{:S(2)}}) copy-start(%a)
  ROOT %c = f32[1024]{{0:T(1024){there}}} copy-done(%b)
}}
"""
  assert hlo.Module(text).cost().bytes == 4096


def test_a_window_counts_what_it_meets_alone():
  """Padding that makes every output see one input is no work."""
  line = (
    "\nENTRY %m (a: f32[4,1,3]) -> f32[4,16,5] {\n"
    "  %a = f32[4,1,3]{2,1,0} parameter(0)\n"
    "  %k = f32[16,3,5]{2,1,0} parameter(1)\n"
    "  ROOT %c = f32[4,16,5]{2,1,0} convolution(%a, %k), "
    "window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=b0f_0io->b0f\n}\n"
  )
  assert hlo.Module(line).cost().flops == 2 * 4 * 16 * 3 * 5


def test_a_real_program_counts_its_products_and_collectives():
  """Six layers whose products are split over their sums."""
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), tuple(SIZES))

  def call(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  def placed(shape, *spec):
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

  found = jax.jit(call).lower(
    placed((32, 64), "data", "tensor"), placed((6, 64, 64), None, "tensor")
  )
  module = hlo.Module(found.compile().as_text())
  assert [module.turns(loop) for loop in module.loops()] == [6.0]
  cost = module.cost()
  assert cost.flops == 6 * 2 * 32 * 64 * 64 / 8  # an eighth of all products
  exchanged = hlo.by_kind(cost.collectives, SIZES)
  assert exchanged["all-reduce tensor"] == 6 * 4 * 16 * 32
