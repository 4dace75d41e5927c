"""Small worlds that need no download: pictures and sums with sure answers.

A picture is 2 x 2 cells of 28 pixels; a cell shows a handwritten digit
(scikit-learn's `load_digits`), a drawn shape, or nothing, in one of five
colours. Three capabilities are asked for: perception (one look), visual
reasoning (look, write down what is seen, conclude) and textual reasoning (no
picture). `warm_start` mixes all of them with captions and carries responses
of a deliberately weak teacher.

Every example is a pure function of (seed, split, capability, index). The
splits share nothing: digit images are split by index, scenes by a hash of
their cells, and texts by a hash of the question.
"""

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxvlm.data.lazy import LazyRows
from jaxvlm.types import Example

CELL = 28  # pixels
NAMES = ("a1", "a2", "b1", "b2")  # cells in reading order
COLORS = {
  "red": (230, 40, 40),
  "green": (40, 200, 60),
  "blue": (60, 90, 240),
  "yellow": (235, 220, 50),
  "purple": (190, 60, 220),
}
SHAPES = ("circle", "cross", "square", "triangle")
DIGITS = tuple("0123456789")
EMPTY = "empty"
CAPTION = "describe"  # the task, and how it is asked for
THINGS = (EMPTY, *SHAPES, *DIGITS)
SPLITS = {"train": range(0, 8), "dev": range(8, 9), "test": range(9, 10)}

Cell = tuple[str, str]  # thing, colour; ("empty", "")
Scene = tuple[Cell, Cell, Cell, Cell]


Respond = Callable[[random.Random, float], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """A question that is not drawn yet."""

  problem: str
  answer: str
  scene: Scene | None = None  # None: text alone
  respond: Respond  # the teacher's response, given how often it errs


def source(
  *,
  capability: str,
  split: str,
  size: int,
  seed: int,
  tasks: Mapping[str, float],
  errors: Mapping[str, float],
  captions: int,
) -> Sequence[Example]:
  """Examples of one capability.

  Args:
    capability: "perception", "visual_reasoning", "textual_reasoning", or
      "warm_start" (all three and captions, with the teacher's responses).
    split: "train", "dev" or "test".
    size: number of examples.
    seed: of the questions; another seed gives other questions of the split.
    tasks: how often each task comes, in any unit; {}: all alike.
    errors: how often the teacher errs in each capability (warm_start only).
    captions: so many examples at the front are captions: of pictures of their
      own in warm_start, elsewhere of the very pictures that would be asked
      about.

  Raises:
    ValueError: unknown capability, split or task, or no size.
  """
  if capability not in (*TASKS, "warm_start"):
    raise ValueError(
      f"worlds: no capability {capability!r}; there are "
      f"{', '.join((*TASKS, 'warm_start'))}."
    )
  if split not in SPLITS:
    raise ValueError(
      f"worlds: no split {split!r}; there are {', '.join(SPLITS)}."
    )
  if size < 1:
    raise ValueError(f"worlds: size is {size}; at least 1 is needed.")
  known = list(_makers() if capability == "warm_start" else TASKS[capability])
  for name in tasks:
    if name not in known:
      raise ValueError(
        f"worlds: {capability} has no task {name!r}; there are "
        f"{', '.join(known)}."
      )
  if (set(errors) != set(TASKS)) if capability == "warm_start" else errors:
    raise ValueError(
      f"worlds: errors are given for {sorted(errors)}; warm_start takes "
      f"{', '.join(TASKS)}, the others none."
    )
  if captions and capability == "textual_reasoning":
    raise ValueError(f"worlds: captions is {captions}; {capability} has none.")
  weights = dict(tasks) or dict.fromkeys(known, 1.0)
  return _Worlds(
    capability=capability,
    split=split,
    size=size,
    seed=seed,
    weights=weights,
    errors=dict(errors),
    captions=captions,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Worlds(LazyRows):
  capability: str
  split: str
  size: int
  seed: int
  weights: dict[str, float]
  errors: dict[str, float]
  captions: int

  def __len__(self) -> int:
    return self.size

  def row(self, i: int) -> Example:
    name = f"{self.capability}/{self.split}/{self.seed}/{i}"
    rng = random.Random(name)
    task = rng.choices(list(self.weights), list(self.weights.values()))[0]
    captioned = i < self.captions
    if captioned and self.capability == "warm_start":
      task = CAPTION
    home, make = _makers()[task]
    draft = make(rng)
    while _bucket(draft) not in SPLITS[self.split]:
      draft = make(rng)
    response = None
    if self.capability == "warm_start":
      response = draft.respond(rng, self.errors.get(home, 0.0))
    images: tuple[np.ndarray, ...] = ()
    if draft.scene is not None:
      images = (draw(draft.scene, self.split, rng.getrandbits(32)),)
    if captioned and task != CAPTION:
      assert draft.scene is not None
      task, draft = CAPTION, _caption(draft.scene)
      response = draft.respond(rng, 0.0)
    return Example(
      problem="<image>" * len(images) + draft.problem,
      answer=draft.answer,
      images=images,
      task=task,
      name=f"worlds/{name}",
      response=response,
    )


def _bucket(draft: Draft) -> int:
  """The tenth of the world that a draft lies in."""
  key = repr(draft.scene) if draft.scene else draft.problem
  return zlib.crc32(key.encode()) % 10


def _digit(rng: random.Random, digit: int) -> Cell:
  return str(digit), rng.choice(list(COLORS))


def _cell(rng: random.Random) -> Cell:
  kind = rng.random()
  if kind < 0.2:
    return EMPTY, ""
  thing = rng.choice(SHAPES if kind < 0.6 else DIGITS)
  return thing, rng.choice(list(COLORS))


def make_scene(rng: random.Random) -> Scene:
  """Anything in every cell."""
  return _scene(rng, {})


def label(cell: Cell) -> tuple[int, int]:
  """Places of a cell's thing in THINGS and of its colour; 0: none."""
  thing, color = cell
  return THINGS.index(thing), list(COLORS).index(color) + 1 if color else 0


def words() -> list[str]:
  """Every word of problems and responses, for a tokenizer."""
  examples = source(
    capability="warm_start",
    split="train",
    size=2000,
    seed=0,
    tasks={},
    errors=dict.fromkeys(TASKS, 0.0),
    captions=0,
  )
  found: set[str] = set()
  for i in range(len(examples)):
    example = examples[i]
    found.update(f"{example.problem} {example.response}".split())
  return sorted(word.removeprefix("<image>") for word in found)


def _scene(rng: random.Random, cells: Mapping[int, Cell]) -> Scene:
  """The given cells, and anything in the others."""
  first, second, third, fourth = (
    cells[i] if i in cells else _cell(rng) for i in range(len(NAMES))
  )
  return first, second, third, fourth


# Perception: the trace says what is where, the answer is one word of it. The
# teacher misreads some cells and then answers by what it has said.


def _at(rng: random.Random, asked: str, cell: Cell) -> Draft:
  place = rng.randrange(len(NAMES))
  seen = cell[1] if asked == "color" else cell[0]
  words = next(kind for kind in (COLORS, SHAPES, DIGITS) if seen in kind)

  def respond(rng: random.Random, error: float) -> str:
    said = seen
    if rng.random() < error:
      said = rng.choice([word for word in words if word != seen])
    return _reason([NAMES[place], said], said)

  return Draft(
    problem=f"{asked} at {NAMES[place]} ?",
    answer=seen,
    scene=_scene(rng, {place: cell}),
    respond=respond,
  )


def _color(rng: random.Random) -> Draft:
  thing = rng.choice(rng.choice((SHAPES, DIGITS)))
  return _at(rng, "color", (thing, rng.choice(list(COLORS))))


def _shape(rng: random.Random) -> Draft:
  return _at(rng, "shape", (rng.choice(SHAPES), rng.choice(list(COLORS))))


def _read(rng: random.Random) -> Draft:
  return _at(rng, "digit", _digit(rng, rng.randrange(10)))


def _where(rng: random.Random) -> Draft:
  color = rng.choice(list(COLORS))
  cells = _colored(rng, color, 1)
  place = [cell[1] for cell in cells].index(color)

  def respond(rng: random.Random, error: float) -> str:
    said = [cell[1] or EMPTY for cell in cells]
    if rng.random() < error:
      other = rng.choice([i for i in range(len(NAMES)) if i != place])
      said[place], said[other] = said[other], said[place]
    found = said.index(color)
    looks = zip(NAMES[: found + 1], said, strict=False)
    return _reason([word for look in looks for word in look], NAMES[found])

  return Draft(
    problem=f"where {color} ?",
    answer=NAMES[place],
    scene=_scene(rng, dict(enumerate(cells))),
    respond=respond,
  )


def _count(rng: random.Random) -> Draft:
  color, number = rng.choice(list(COLORS)), rng.randrange(4)
  cells = _colored(rng, color, number)

  def respond(rng: random.Random, error: float) -> str:
    said = [cell[1] or EMPTY for cell in cells]
    if rng.random() < error:
      said[rng.randrange(len(NAMES))] = rng.choice([*COLORS, color])
    trace: list[str] = []
    for i, name in enumerate(NAMES):
      so_far = said[: i + 1].count(color)
      trace += [name, said[i], str(so_far)]
    return _reason(trace, said.count(color))

  return Draft(
    problem=f"count {color} ?",
    answer=str(number),
    scene=_scene(rng, dict(enumerate(cells))),
    respond=respond,
  )


def _colored(rng: random.Random, color: str, number: int) -> list[Cell]:
  """Cells of which so many have the colour."""
  cells = [_cell(rng) for _ in NAMES]
  while sum(cell[1] == color for cell in cells) != number:
    cells = [_cell(rng) for _ in NAMES]
    for i in rng.sample(range(len(NAMES)), number):
      cells[i] = rng.choice(rng.choice((SHAPES, DIGITS))), color
  return cells


# Visual reasoning: the trace names what is seen, the answer follows from it.
# The teacher misreads some digits and then concludes correctly.


def _visual(
  rng: random.Random,
  problem: str,
  places: Sequence[int],
  digits: Sequence[int],
  solve: Callable[[Sequence[int]], int],
) -> Draft:
  cells = {p: _digit(rng, d) for p, d in zip(places, digits, strict=True)}
  return Draft(
    problem=problem,
    answer=str(solve(digits)),
    scene=_scene(rng, cells),
    respond=_trace(places, digits, solve),
  )


def _trace(
  places: Sequence[int],
  digits: Sequence[int],
  solve: Callable[[Sequence[int]], int],
) -> Respond:
  def respond(rng: random.Random, error: float) -> str:
    said = [rng.randrange(10) if rng.random() < error else d for d in digits]
    while solve(said) > 9:
      said = [rng.randrange(10) for _ in digits]
    seen = [f"{NAMES[p]} {d}" for p, d in zip(places, said, strict=True)]
    return _reason(seen, solve(said))

  return respond


def _reason(trace: Sequence[str], answer: int | str) -> str:
  return f"<think> {' '.join(trace)} </think> <answer> {answer} </answer>"


def _sum(rng: random.Random) -> Draft:
  total = rng.randrange(10)
  first = rng.randint(0, total)
  places = rng.sample(range(len(NAMES)), 2)
  problem = f"sum of {NAMES[places[0]]} and {NAMES[places[1]]} ?"
  return _visual(rng, problem, places, (first, total - first), sum)


def _difference(rng: random.Random) -> Draft:
  gap = rng.randrange(10)
  low = rng.randint(0, 9 - gap)
  digits = rng.sample((low, low + gap), 2)
  places = rng.sample(range(len(NAMES)), 2)
  problem = f"difference of {NAMES[places[0]]} and {NAMES[places[1]]} ?"
  return _visual(rng, problem, places, digits, lambda d: abs(d[0] - d[1]))


def _extreme(rng: random.Random, word: str) -> Draft:
  solve = max if word == "largest" else min
  places = rng.sample(range(len(NAMES)), 3)
  answer = rng.randrange(10)
  span = range(answer + 1) if solve is max else range(answer, 10)
  digits = [answer, *rng.choices(span, k=2)]
  rng.shuffle(digits)
  problem = f"{word} of {' '.join(NAMES[p] for p in places)} ?"
  return _visual(rng, problem, places, digits, solve)


# Textual reasoning: no picture. The teacher slips by one in some steps.


def _slip(rng: random.Random, error: float, value: int) -> int:
  if rng.random() >= error:
    return value
  return min(9, max(0, value + rng.choice((-1, 1))))


def _calc(rng: random.Random) -> Draft:
  start = rng.randrange(10)
  terms = []
  value = start
  for _ in range(3):
    after = rng.randrange(10)
    sign = (
      "+" if after > value or (after == value and rng.random() < 0.5) else "-"
    )
    terms.append((sign, abs(after - value)))
    value = after

  def respond(rng: random.Random, error: float) -> str:
    said, value = [], start
    for sign, term in terms:
      value = value + term if sign == "+" else value - term
      value = _slip(rng, error, min(9, max(0, value)))
      said.append(value)
    return _reason([str(v) for v in said], said[-1])

  chain = " ".join(f"{sign} {term}" for sign, term in terms)
  return Draft(
    problem=f"calc {start} {chain} ?", answer=str(value), respond=respond
  )


def _compare(rng: random.Random, word: str) -> Draft:
  solve = max if word == "larger" else min
  answer = rng.randrange(10)
  other = rng.choice(range(answer + 1) if solve is max else range(answer, 10))
  totals = rng.sample((answer, other), 2)
  firsts = [rng.randint(0, total) for total in totals]
  sums = [f"{a} + {t - a}" for a, t in zip(firsts, totals, strict=True)]

  def respond(rng: random.Random, error: float) -> str:
    said = [_slip(rng, error, total) for total in totals]
    return _reason([str(v) for v in said], solve(said))

  return Draft(
    problem=f"{word} {sums[0]} or {sums[1]} ?",
    answer=str(answer),
    respond=respond,
  )


def _describe(rng: random.Random) -> Draft:
  return _caption(make_scene(rng))


def _caption(scene: Scene) -> Draft:
  """All cells in random order, each named; never wrong."""

  def respond(rng: random.Random, error: float) -> str:
    del error
    cells = [
      f"{name} {color} {thing}" if color else f"{name} {thing}"
      for name, (thing, color) in zip(NAMES, scene, strict=True)
    ]
    return " ".join(rng.sample(cells, len(cells)))

  return Draft(problem=CAPTION, answer="", scene=scene, respond=respond)


TASKS: dict[str, dict[str, Callable[[random.Random], Draft]]] = {
  "perception": {
    "color": _color,
    "shape": _shape,
    "digit": _read,
    "where": _where,
    "count": _count,
  },
  "visual_reasoning": {
    "sum": _sum,
    "difference": _difference,
    "largest": functools.partial(_extreme, word="largest"),
    "smallest": functools.partial(_extreme, word="smallest"),
  },
  "textual_reasoning": {
    "calc": _calc,
    "larger": functools.partial(_compare, word="larger"),
    "smaller": functools.partial(_compare, word="smaller"),
  },
}


@functools.cache
def _makers() -> dict[str, tuple[str, Callable[[random.Random], Draft]]]:
  """Each task's capability and maker."""
  makers = {
    name: (home, make)
    for home, tasks in TASKS.items()
    for name, make in tasks.items()
  }
  return makers | {CAPTION: ("", _describe)}


# Drawing.


@functools.cache
def _digit_masks() -> tuple[np.ndarray, np.ndarray]:
  """uint8 [1797 24 24] ink of the handwritten digits, and their labels."""
  from sklearn.datasets import load_digits  # slow to import, not always used

  digits = load_digits()
  ink = np.kron(digits.images / 16.0, np.ones((3, 3)))
  ink = (np.roll(ink, 1, 1) + ink + np.roll(ink, -1, 1)) / 3
  ink = (np.roll(ink, 1, 2) + ink + np.roll(ink, -1, 2)) / 3
  return (255 * ink).astype(np.uint8), digits.target


@functools.cache
def _digit_indices(split: str, digit: int) -> list[int]:
  """Images of one digit in one split."""
  _, labels = _digit_masks()
  return [
    int(i) for i in np.flatnonzero(labels == digit) if i % 10 in SPLITS[split]
  ]


@functools.cache
def _shape_masks() -> dict[str, np.ndarray]:
  """uint8 [24 24] ink of each shape."""
  y, x = np.mgrid[0:24, 0:24] - 11.5
  inside = {
    "circle": x**2 + y**2 < 90,
    "cross": (abs(abs(x) - abs(y)) < 3) & (abs(x) < 9) & (abs(y) < 9),
    "square": (abs(x) < 8.5) & (abs(y) < 8.5),
    "triangle": (y < 8) & (y > -9) & (abs(x) < (y + 9) * 0.6),
  }
  return {name: (255 * mask).astype(np.uint8) for name, mask in inside.items()}


def draw(scene: Scene, split: str, seed: int) -> np.ndarray:
  """The picture of a scene, uint8 [56 56 3].

  Things are shifted by up to two pixels and noise is added, both from `seed`;
  digit images come from `split`.
  """
  rng = random.Random(seed)
  picture = np.full((2 * CELL, 2 * CELL, 3), 30, np.int16)
  for i, (thing, color) in enumerate(scene):
    if thing == EMPTY:
      continue
    if thing in SHAPES:
      ink = _shape_masks()[thing]
    else:
      ink = _digit_masks()[0][rng.choice(_digit_indices(split, int(thing)))]
    top = CELL * (i // 2) + rng.randrange(5)
    left = CELL * (i % 2) + rng.randrange(5)
    patch = picture[top : top + 24, left : left + 24]
    paint = np.array(COLORS[color], np.int16) - 30
    patch += (ink[..., None].astype(np.int32) * paint // 255).astype(np.int16)
  noise = np.random.Generator(np.random.PCG64(seed))
  picture += noise.integers(-20, 21, picture.shape, np.int16)
  return picture.clip(0, 255).astype(np.uint8)
