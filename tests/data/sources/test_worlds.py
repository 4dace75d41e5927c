"""The embedded worlds: splits, answers, and a teacher that errs as told."""

import itertools
import random
import zlib

import numpy as np
import pytest

from jaxvlm.data.sources import worlds

CAPABILITIES = ("perception", "visual_reasoning", "textual_reasoning")
TASKS = {name: home for home in CAPABILITIES for name in worlds.TASKS[home]}
NO_ERRORS = dict.fromkeys(CAPABILITIES, 0.0)


def make(capability="perception", **changes):
  warm = capability == "warm_start"
  return worlds.source(
    capability=capability,
    **{
      "split": "train",
      "size": 400,
      "seed": 0,
      "tasks": {},
      "errors": NO_ERRORS if warm else {},
      "captions": 0,
      **changes,
    },
  )


def solve(problem, scene):
  """The answer, worked out from the words and the cells alone."""
  words = problem.removesuffix(" ?").split()
  cells = dict(zip(worlds.NAMES, scene or (), strict=scene is not None))
  things = [cells[w][0] for w in words if w in cells]
  match words:
    case ["color", "at", name]:
      return cells[name][1]
    case [("shape" | "digit") as kind, "at", name]:
      known = worlds.SHAPES if kind == "shape" else worlds.DIGITS
      assert cells[name][0] in known
      return cells[name][0]
    case ["where", color]:
      (place,) = [n for n, cell in cells.items() if cell[1] == color]
      return place
    case ["count", color]:
      return str(sum(cell[1] == color for cell in cells.values()))
    case ["sum", *_]:
      return str(sum(int(t) for t in things))
    case ["difference", *_]:
      first, second = things
      return str(abs(int(first) - int(second)))
    case ["largest", *_]:
      return max(things)
    case ["smallest", *_]:
      return min(things)
    case ["calc", *terms]:
      assert set(terms[1::2]) <= {"+", "-"}
      return str(eval(" ".join(terms)))
    case [("larger" | "smaller") as word, *terms]:
      totals = [eval(t) for t in " ".join(terms).split(" or ")]
      return str(max(totals) if word == "larger" else min(totals))
  raise AssertionError(problem)


def said(response):
  return response.split("<answer>")[1].split("</answer>")[0].strip()


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_scene(task):
  _, make_draft = worlds._makers()[task]
  rng = random.Random(1)
  for _ in range(300):
    draft = make_draft(rng)
    assert draft.answer == solve(draft.problem, draft.scene)
    assert draft.answer in {
      *worlds.COLORS,
      *worlds.SHAPES,
      *worlds.DIGITS,
      *worlds.NAMES,
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_without_errors_is_right(task):
  _, make_draft = worlds._makers()[task]
  rng = random.Random(2)
  for _ in range(300):
    draft = make_draft(rng)
    assert said(draft.respond(rng, 0.0)) == draft.answer


@pytest.mark.parametrize("task", TASKS)
def test_a_weak_teacher_is_wrong_at_times_and_not_always(task):
  _, make_draft = worlds._makers()[task]
  rng = random.Random(3)
  drafts = [make_draft(rng) for _ in range(400)]
  wrong = np.mean([said(d.respond(rng, 0.4)) != d.answer for d in drafts])
  assert 0.1 < wrong < 0.8


@pytest.mark.parametrize("task", ["color", "shape", "digit", "where"])
def test_a_look_fails_as_often_as_it_is_told_to(task):
  _, make_draft = worlds._makers()[task]
  rng = random.Random(4)
  drafts = [make_draft(rng) for _ in range(2000)]
  wrong = np.mean([said(d.respond(rng, 0.4)) != d.answer for d in drafts])
  assert abs(wrong - 0.4) < 0.05


def test_captions_are_never_wrong():
  _, make_draft = worlds._makers()[worlds.CAPTION]
  for seed in range(200):
    scene = make_draft(random.Random(seed)).scene
    told = make_draft(random.Random(seed)).respond(random.Random(0), 1.0)
    cells = {}
    for word in told.split():
      if word in worlds.NAMES:
        name = word
        cells[name] = []
      else:
        cells[name].append(word)
    for name, (thing, color) in zip(worlds.NAMES, scene, strict=True):
      assert cells[name] == [w for w in (color, thing) if w]


def test_responses_have_at_most_17_words():
  examples = make("warm_start", size=3000, errors=dict.fromkeys(NO_ERRORS, 0.4))
  # With the end of the turn that is 18 tokens.
  assert max(len(examples[i].response.split()) for i in range(3000)) <= 17


def test_every_word_is_known_to_the_tokenizer():
  known = set(worlds.words())
  for capability in (*CAPABILITIES, "warm_start"):
    examples = make(capability, split="dev", seed=5)
    for example in (examples[i] for i in range(len(examples))):
      text = f"{example.problem} {example.answer} {example.response or ''}"
      assert set(text.replace("<image>", "").split()) <= known


def test_an_example_is_a_function_of_its_index():
  first, again = make("warm_start"), make("warm_start")
  for i in (7, 3, 7, 399):
    a, b = first[i], again[i]
    assert (a.problem, a.answer, a.response) == (
      b.problem,
      b.answer,
      b.response,
    )
    assert len(a.images) == len(b.images)
    for x, y in zip(a.images, b.images, strict=True):
      np.testing.assert_array_equal(x, y)


def test_another_seed_gives_other_questions():
  one = [make(seed=0)[i].problem for i in range(50)]
  assert one != [make(seed=1)[i].problem for i in range(50)]


def test_pictures_are_56_pixels_square_and_text_has_none():
  picture = make("visual_reasoning")[0].images[0]
  assert picture.shape == (56, 56, 3) and picture.dtype == np.uint8
  example = make("textual_reasoning")[0]
  assert example.images == () and "<image>" not in example.problem


def test_digit_images_of_the_splits_are_disjoint_and_complete():
  labels = worlds._digit_masks()[1]
  parts = {
    split: {
      i for digit in range(10) for i in worlds._digit_indices(split, digit)
    }
    for split in worlds.SPLITS
  }
  for one, other in itertools.combinations(parts.values(), 2):
    assert not one & other
  assert set.union(*parts.values()) == set(range(len(labels)))
  assert min(len(p) for p in parts.values()) > 100


@pytest.mark.parametrize("capability", ["visual_reasoning", "perception"])
def test_scenes_of_the_splits_are_disjoint(capability, monkeypatch):
  scenes = {split: set() for split in worlds.SPLITS}

  def remember(scene, split, seed):
    scenes[split].add(scene)
    return np.zeros((56, 56, 3), np.uint8)

  monkeypatch.setattr(worlds, "draw", remember)
  for split in worlds.SPLITS:
    examples = make(capability, split=split, size=2000)
    for i in range(len(examples)):
      assert examples[i].problem
  for one, other in itertools.combinations(scenes.values(), 2):
    assert one and other and not one & other


def test_texts_of_the_splits_are_disjoint():
  texts = {}
  for split in worlds.SPLITS:
    examples = make("textual_reasoning", split=split, size=2000)
    texts[split] = {examples[i].problem for i in range(2000)}
  for one, other in itertools.combinations(texts.values(), 2):
    assert not one & other


def test_a_split_is_a_tenth_of_a_hash():
  examples = make("textual_reasoning", split="test")
  for i in range(50):
    assert zlib.crc32(examples[i].problem.encode()) % 10 == 9


def test_pictures_are_drawn_with_digits_of_their_split(monkeypatch):
  asked = set()
  look_up = worlds._digit_indices

  def remember(split, digit):
    asked.add(split)
    return look_up(split, digit)

  monkeypatch.setattr(worlds, "_digit_indices", remember)
  examples = make(split="dev", size=20)
  for i in range(20):
    assert examples[i].images
  assert asked == {"dev"}


def test_captions_come_first_when_asked_for():
  examples = make("warm_start", captions=30)
  assert {examples[i].task for i in range(30)} == {worlds.CAPTION}
  assert {examples[i].task for i in range(30, 400)} > {worlds.CAPTION}


@pytest.mark.parametrize("capability", ["perception", "visual_reasoning"])
def test_pictures_that_are_asked_about_can_be_described_instead(capability):
  asked = make(capability, size=60)
  described = make(capability, size=60, captions=50)
  for i in range(60):
    row, caption = asked[i], described[i]
    assert (caption.images[0] == row.images[0]).all()
    assert (caption.task == worlds.CAPTION) is (i < 50)
    if i < 50:
      assert caption.problem == "<image>describe"
      assert {*worlds.NAMES} <= set(caption.response.split())
    else:
      assert (caption.problem, caption.answer) == (row.problem, row.answer)


def test_a_caption_says_what_a_question_would_be_answered():
  asked = make(tasks={"digit": 1.0}, size=60)
  described = make(tasks={"digit": 1.0}, size=60, captions=60)
  for i in range(60):
    place = asked[i].problem.split()[2]
    words = described[i].response.split()
    after = words[words.index(place) + 1 :]
    ends = [after.index(name) for name in worlds.NAMES if name in after]
    assert asked[i].answer in after[: min(ends, default=len(after))]


def test_tasks_come_as_often_as_weighed():
  examples = make(tasks={"color": 3.0, "where": 1.0}, size=1000)
  tasks = [examples[i].task for i in range(1000)]
  assert set(tasks) == {"color", "where"}
  assert abs(tasks.count("color") / 1000 - 0.75) < 0.05


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_answer_is_right_for_most_questions(capability):
  for task in worlds.TASKS[capability]:
    examples = make(capability, tasks={task: 1.0}, size=1000)
    answers = [examples[i].answer for i in range(1000)]
    assert max(answers.count(a) for a in set(answers)) < 400


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"capability": "smell"}, "no capability 'smell'; there are perception"),
    ({"split": "valid"}, "no split 'valid'; there are train"),
    ({"size": 0}, "size is 0"),
    ({"tasks": {"sum": 1.0}}, "perception has no task 'sum'"),
    ({"errors": NO_ERRORS}, "errors are given for"),
    ({"capability": "warm_start", "errors": {}}, "warm_start takes"),
    (
      {"captions": 3, "capability": "textual_reasoning"},
      "captions is 3; textual_reasoning has none",
    ),
  ],
)
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_an_index_outside_is_refused():
  with pytest.raises(IndexError, match="400 of 400"):
    make()[400]
