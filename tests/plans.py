"""Runs of the paper's recipe, as a plan is made for them."""

from configs import staged
from jaxvlm import models, sharding
from jaxvlm.plan import planning
from jaxvlm.plan.batch import Lengths

SIZE = "qwen2_5_vl_3b"
STAGE = "visual_perception"


def config():
  return staged.get_config(SIZE).to_dict()


def make_run(fields, stage=STAGE, *, fsdp=8, tensor=1):
  mesh = sharding.make_mesh(data=1, fsdp=fsdp, tensor=tensor, slices=-1)
  with sharding.use(mesh):
    return planning.make_run(
      fields,
      mesh=mesh,
      architecture=models.find_size(SIZE),
      stage=stage,
      lengths=Lengths(
        prompt=512,
        longest_prompt=2048,
        visual=256,
        most_visual=1984,
        completion=512,
        longest_completion=2048,
      ),
    )
