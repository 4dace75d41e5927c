"""What matters more than seconds: work that is not done, programs not made."""

import functools

import jax
import numpy as np
import pytest

from jaxvlm import compiling
from jaxvlm import learner as learner_module
from jaxvlm.data.vision_layout import mrope_positions
from jaxvlm.packing import Packed
from jaxvlm.types import Example, Experience, Question
from tests.learners import RATE

IMAGE = 5


@pytest.fixture(scope="module")
def learner(make_learner, mesh):
  return make_learner(mesh)


def make_question(layout, rows, cols, text, number=0):
  """A picture of so many patches, then so many words."""
  grid = np.array([[1, rows, cols]], np.int32)
  ids = [3, *[IMAGE] * (rows * cols // 4), 4, *[20 + number] * text]
  ids = np.array(ids, np.int32)
  random = np.random.default_rng(number)
  size = (rows * cols, 6 * layout.patch_size**2)
  return Question(
    question_id=number,
    example=Example(problem="", answer=""),
    prompt_ids=ids,
    position_ids=mrope_positions(ids, grid, layout),
    pixel_values=random.normal(size=size).astype(np.float32),
    image_grid_thw=grid,
  )


def experiences(packed, mask):
  """Microbatches whose numbers mean nothing."""
  for u in range(len(packed)):
    place = functools.partial(packed.place, u=u)
    values = np.full(mask.shape, -1.0, np.float32)
    yield Experience(
      tree=packed.tree(u),
      completion_mask=place(mask),
      advantages=place(np.ones(mask.shape[:2], np.float32)),
      groups=place(np.ones((len(mask), 1), bool)),
      sampler_logprobs=place(values),
      old_logprobs=place(values),
      ref_logprobs=place(values),
    )


def test_more_completions_of_a_prompt_do_not_read_it_again(
  learner, network, mesh, layout, params, place_params, banned
):
  """As many completion tokens, in 2 or in 8: the same operations and bytes.

  Rows of [prompt | completion] would be four times as many.
  """
  question = make_question(layout, 8, 8, 40)

  def cost(questions, completions, length):
    mask = np.ones((len(questions), completions, length), bool)
    packed = Packed(
      *(questions, mask.astype(np.int32), mask),
      tokens=1024,
      mesh=mesh,
      layout=layout,
    )
    (micro,) = experiences(packed, mask)
    state = learner.init(place_params(params, mesh))
    program = learner.program
    found = learner_module.add_gradient.lower(
      *(program, learner_module.zeros(program, state.params)),
      *(state.params, learner._banned, micro),
    ).compile()
    costs = found.cost_analysis()
    return np.array([costs["flops"], costs["bytes accessed"]])

  two, eight = cost([question], 2, 32), cost([question], 8, 8)
  assert (eight <= 1.01 * two).all()
  assert (cost([question] * 8, 1, 8) > 2 * two).all()


def test_twenty_batches_of_a_bucket_compile_nothing_anew(
  learner, mesh, layout, params, place_params, make_sampler, draws
):
  """Prompts, pictures, lengths and order vary."""
  random = np.random.default_rng(0)
  largest = make_question(layout, 4, 8, 20)
  sampler = make_sampler(mesh)
  state = learner.init(place_params(params, mesh))
  seen = set()
  for step in range(21):
    questions = [largest] + [
      make_question(
        layout, *random.choice([2, 4], 2), random.integers(12, 21), number
      )
      for number in range(1, 8)
    ]
    questions = [questions[q] for q in random.permutation(8)]
    before = compiling.tally().programs
    weights = sampler.weights(state.params)
    limits = random.integers(1, 9, (8, 3)).astype(np.int32)
    limits[0] = 8
    rollout = sampler.sample(
      weights,
      questions,
      key=jax.random.key(step),
      draws=draws,
      limits=limits,
    )
    packed = Packed(
      *(questions, rollout.completion_ids, rollout.completion_mask),
      tokens=64,
      mesh=mesh,
      layout=layout,
    )
    mask = rollout.completion_mask
    state, _ = learner.update(state, experiences(packed, mask), RATE)
    bucket = (*packed.plan.groups.shape[1:], *packed.tree(0).ids.shape)
    bucket += packed.tree(0).vision.rows.shape
    compiled = compiling.tally().programs - before
    assert (compiled > 0) == (bucket not in seen), step
    seen.add(bucket)
  assert len(seen) <= 4
