"""What each view shows of rows in memory."""

import numpy as np
import pytest

from jaxvlm.data.loader import Source
from jaxvlm.data.rows import row_id
from jaxvlm.types import Example
from jaxvlm.views import Views

TWO = Example(
  problem="<image> or <image>?",
  answer="x",
  images=(b"first", b"second"),
  columns={"about": " a cat and a dog\n"},
  rewards=(("exact", 1.0),),
  name="two",
)
NONE = Example(problem="1 + 1?", answer="2", name="none")
CHOICE = Example(
  problem="<image>which?\nA. cat\nB. dog\nC. cow\nD. pig",
  answer="B",
  images=(b"third",),
  name="choice",
)


def make_views(*examples, shuffle_options=False, **changes):
  source = Source(
    weight=1.0,
    examples=examples,
    kept=np.arange(len(examples)),
    row_ids=[row_id(example) for example in examples],
    sizes=np.ones((len(examples), 2), int),
    shuffle_options=shuffle_options,
  )
  settings = {
    "seed": 0,
    "completions": 3,
    "caption_key": "about",
    "caption_prompt": "",
  }
  return Views(source, **settings | changes)


def shown(views, view, captions=None):
  """Problem and pictures of every prompt."""
  prompts = [name for names in views.prompts.values() for name in names]
  found = [views.example(view, prompt, captions or {}) for prompt in prompts]
  assert not any(example.rewards for example in found)
  return [(example.problem, example.images) for example in found]


def test_a_row_has_one_prompt_and_rows_of_one_id_are_one():
  views = make_views(TWO, NONE, TWO)
  assert list(views.prompts) == [row_id(TWO), row_id(NONE)]
  assert [len(names) for names in views.prompts.values()] == [1, 1]
  assert views.completions == 3


def test_a_caption_of_a_column_stands_for_all_pictures():
  views = make_views(TWO, NONE)
  assert shown(views, "image") == [(TWO.problem, TWO.images), ("1 + 1?", ())]
  assert shown(views, "caption") == [
    ("a cat and a dog or ?", ()),
    ("1 + 1?", ()),
  ]
  assert shown(views, "none") == [("or ?", ()), ("1 + 1?", ())]


def test_pictures_are_captioned_one_by_one():
  views = make_views(TWO, NONE, caption_key="", caption_prompt="Describe.")
  names = views.pictures()
  asked = [views.picture(name) for name in names]
  assert [example.problem for example in asked] == ["<image>Describe."] * 2
  assert [example.images for example in asked] == [(b"first",), (b"second",)]
  captions = dict(zip(names, ["a cat", "a dog"], strict=True))
  assert shown(views, "caption", captions)[0] == ("a cat or a dog?", ())


@pytest.mark.parametrize("text", [None, " ", 3])
def test_a_row_with_pictures_needs_a_caption(text):
  row = Example(**vars(TWO) | {"columns": {"about": text}})
  views = make_views(row)
  with pytest.raises(ValueError, match=r"two: caption_key 'about' is .*about;"):
    shown(views, "caption")


def test_shuffled_options_make_a_prompt_of_each_completion():
  views = make_views(CHOICE, shuffle_options=True, completions=40)
  assert views.completions == 1
  image, blind = (shown(views, view) for view in ("image", "none"))
  assert len(image) == 40 and len(set(image)) > 12
  assert [p for p, _ in blind] == [p.removeprefix("<image>") for p, _ in image]
  (prompts,) = views.prompts.values()
  for prompt in prompts:
    example = views.example("image", prompt, {})
    assert f"{example.answer}. dog" in example.problem
