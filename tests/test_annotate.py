"""Annotating with a scripted model; tests/tools has a real one."""

import io
import re

import jax
import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

from configs import common
from jaxvlm import annotate, compiling, job, rewards
from jaxvlm.display import Display
from jaxvlm.types import Rollout, Scores
from tests.runs import make_row, project_fixture  # noqa: F401

RIGHT, WRONG = "<answer>A</answer>", "<answer>B</answer>"
# For each row: its completions from the picture, a caption, and neither.
SCRIPT = (
  ((WRONG, WRONG), (RIGHT, RIGHT), (WRONG, RIGHT)),  # kept
  ((RIGHT, RIGHT), (RIGHT, RIGHT), (WRONG, WRONG)),
  ((RIGHT, WRONG), (RIGHT, RIGHT), (WRONG, WRONG)),
  ((WRONG, WRONG), (WRONG, RIGHT), (WRONG, WRONG)),
  ((WRONG, WRONG), (RIGHT, RIGHT), (RIGHT, RIGHT)),
)
VIEWS = ("image", "caption", "none")


class Sampler:
  """Says what the script has for a row in the view that its prompt shows."""

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self.prompts = []  # of each batch
    self.keys = []  # (prompt, key, question id)
    self.stop_at = None  # the batch at which the process dies
    self.say = self._say

  def weights(self, params):
    return params

  def start(self, weights, questions, *, key, draws):
    if len(self.prompts) == self.stop_at:
      raise KeyboardInterrupt
    texts = [self._text(question) for question in questions]
    self.prompts.append(texts)
    shape = (len(questions), draws.num_completions, 40)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for q, text in enumerate(texts):
      where = jax.random.key_data(key).tolist(), questions[q].question_id
      self.keys.append((text, *where))
      for g in range(draws.num_completions):
        said = self._tokenizer.encode(self.say(text, g))
        ids[q, g, : len(said)] = said
        mask[q, g, : len(said)] = True
    rollout = Rollout(
      completion_ids=ids,
      completion_mask=mask,
      truncated=np.arange(shape[1]) % 2 + np.zeros(shape[:2]) > 0,
      sampler_logprobs=np.zeros(shape, np.float32),
    )
    return lambda: rollout

  def _text(self, question):
    assert bool(question.example.images) == bool(len(question.pixel_values))
    text = self._tokenizer.decode(question.prompt_ids)
    text = re.sub(r"(<\|image_pad\|>)+", "[picture]", text)
    return re.search("user\n(.*?)<.im_end", text, re.DOTALL)[1]

  def _say(self, text, g):
    row = re.search(r"which (\d)\?", text)
    if row is None:
      return f" seen {text.count('[picture]')} "
    view = 0 if "[picture]" in text else 1 if "seen" in text else 2
    return SCRIPT[int(row[1]) % len(SCRIPT)][view][g]


class Scorer:
  """Grades in this process; a row whose answer is empty cannot be graded."""

  def __init__(self, name):
    self._reward = rewards.load(name)

  def score(self, completions, examples, lengths):
    assert lengths.shape == np.shape(completions)
    values = [
      [self._reward(text, example) for text in group]
      for group, example in zip(completions, examples, strict=True)
    ]
    failed = np.array([example.answer == "broken" for example in examples])
    return Scores(
      rewards=np.array(values),
      parts={},
      failed=failed,
      messages=("broke",) * len(examples),
    )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    pass


class ScriptedJob(job.Job):
  sampler: Sampler

  def make_sampler(self):
    return self.sampler

  def load_params(self, display):
    return {}

  def make_scorer(self, rewards, row_rewards=()):
    ((name, _),) = rewards
    return Scorer(name)


@pytest.fixture
def console():
  return Console(width=100, record=True, file=io.StringIO())


@pytest.fixture
def run(project, tmp_path, console):
  """run(entry, **changes): the sampler of an annotation of out.parquet."""

  def run(
    entry, *, stop_at=None, say=None, config=None, output=None, **changes
  ):
    output = output or tmp_path / "out.parquet"
    plan = make_plan(**changes)
    made = make_config(project, entry)
    made.update(config or {})
    with Display(console) as display:
      prepared = job.prepare(
        annotate.narrowed(made.to_dict(), plan), tmp_path, display
      )
      scripted = ScriptedJob(**vars(prepared))
      sampler = Sampler(prepared.processor.tokenizer)
      object.__setattr__(scripted, "sampler", sampler)
      sampler.stop_at = stop_at
      sampler.say = say or sampler.say
      annotate.run(scripted, plan, output, display)
    return sampler

  return run


def make_plan(**changes):
  return annotate.Plan(
    **{
      "stage": "perceive",
      "source": "rows",
      "views": VIEWS,
      "completions": 2,
      "temperature": None,
      "caption_key": "caption" if "caption_prompt" not in changes else "",
      "caption_prompt": "",
    }
    | changes
  )


def make_config(project, entry):
  config = common.base(workdir="", schedule=("perceive",))
  config.model.checkpoint = str(project / "checkpoint")
  config.mesh.data = -1
  config.evaluation.batch_questions = 8
  config.stages.perceive = common.stage(
    data={"rows": entry},
    rewards=(("exact", 0.9), ("format", 0.1)),
    rollout_questions=8,
    update_questions=8,
    updates_per_rollout=1,
    microbatch_tokens=2048,
  )
  return config


def make_rows(count=5):
  random = np.random.default_rng(0)
  return [
    make_row(random, i)
    | {
      "problem": f"look: <image> which {i}?",
      "answer": "A",
      "caption": f" seen as {i}",
      "number": i,
      "tags": [f"tag {i}"],
    }
    for i in range(count)
  ]


@pytest.fixture
def rows(tmp_path):
  """rows(list): the data entry of a parquet file with them."""

  def rows(made=None, **fields):
    file = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(make_rows() if made is None else made)
    pyarrow.parquet.write_table(table, file)
    return common.data("files", path=str(file), **fields)

  return rows


def read(tmp_path):
  return pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()


def test_rates_are_those_made_by_hand(run, rows, tmp_path):
  run(rows())
  found = read(tmp_path)
  assert found["pass_rate"] == [0, 1, 0.5, 0, 0]
  assert found["pass_rate_caption"] == [1, 1, 1, 0.5, 1]
  assert found["pass_rate_blind"] == [0.5, 0, 0, 0, 1]
  assert found["completions"] == [2] * 5
  for suffix in ("", "_caption", "_blind"):
    assert found[f"mean_length{suffix}"] == [len(RIGHT)] * 5
    assert found[f"truncated{suffix}"] == [0.5] * 5


def test_a_view_has_the_picture_a_caption_in_its_place_or_nothing(run, rows):
  image, caption, blind = (batch[:5] for batch in run(rows()).prompts)
  shown = "look: <|vision_start|>[picture]<|vision_end|> which"
  assert image == [f"{shown} {i}?" for i in range(5)]
  assert caption == [f"look: seen as {i} which {i}?" for i in range(5)]
  assert blind == [f"look:  which {i}?" for i in range(5)]


def test_only_the_views_that_are_asked_for_are_answered(run, rows, tmp_path):
  sampler = run(rows(), views=("none",), caption_key="")
  assert len(sampler.prompts) == 1
  found = read(tmp_path)
  assert "pass_rate_blind" in found
  assert not {"pass_rate", "pass_rate_caption"} & set(found)


def test_the_checkpoint_captions_each_picture_where_it_is_asked(
  run, rows, tmp_path
):
  made = make_rows(2)
  made[1] |= {
    "problem": "<image> and <image> which 1?",
    "images": made[0]["images"] + made[1]["images"],
  }
  suffix = {"inputs": {"prompt_suffix": " Think!"}}
  sampler = run(
    rows(made), views=("caption",), caption_prompt="Describe.", config=suffix
  )
  asked, answered = sampler.prompts
  shown = "<|vision_start|>[picture]<|vision_end|>Describe."
  assert asked[:3] == [shown] * 3
  assert answered[:2] == [
    "look: seen 1 which 0? Think!",
    "seen 1 and seen 1 which 1? Think!",
  ]
  found = read(tmp_path)
  assert found["generated_caption"] == ["seen 1", "seen 1\nseen 1"]


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(
  run, rows, tmp_path
):
  entry = rows(make_rows(20))
  whole = run(entry, output=tmp_path / "whole.parquet").prompts
  assert len(whole) == 9
  again = []
  with pytest.raises(KeyboardInterrupt):
    run(entry, stop_at=4)
  assert not (tmp_path / "out.parquet").exists()
  # A batch that was under way, or whose file was torn, is asked again.
  parts = sorted((tmp_path / "out.parquet.parts").glob("*.json"))
  assert len(parts) == 1 + 3
  again = run(entry).prompts
  assert again == whole[3:]
  out, undisturbed = tmp_path / "out.parquet", tmp_path / "whole.parquet"
  assert out.read_bytes() == undisturbed.read_bytes()
  assert not (tmp_path / "out.parquet.parts").exists()


def test_a_finished_command_only_shows_its_summary(
  run, rows, tmp_path, console
):
  run(rows())
  before = (tmp_path / "out.parquet").read_bytes()
  console.export_text()
  assert run(rows()).prompts == []
  assert (tmp_path / "out.parquet").read_bytes() == before
  assert "answered from" in console.export_text()


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"temperature": 0.5}, "plan.temperature: null -> 0.5"),
    ({"config": {"seed": 1}}, "config.seed: 0 -> 1"),
  ],
  ids=["plan", "config"],
)
def test_other_settings_are_refused(run, rows, tmp_path, killed, changes, told):
  if killed:
    with pytest.raises(KeyboardInterrupt):
      run(rows(), stop_at=1)
  else:
    run(rows())
  with pytest.raises(ValueError, match="other settings") as error:
    run(rows(), **changes)
  assert str(error.value).splitlines()[1:] == [f"  {told}"]


def test_other_rows_or_weights_are_refused(run, rows, project, tmp_path):
  run(rows())
  with pytest.raises(ValueError, match=r"  rows: \d+ -> \d+$"):
    run(rows(make_rows(4)))
  file = project / "checkpoint" / "model.safetensors"
  before = file.read_bytes()
  file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
  try:
    with pytest.raises(ValueError, match=r"  checkpoint: \S+ -> \S+$"):
      run(rows())
  finally:
    file.write_bytes(before)


def test_a_file_that_is_there_is_not_replaced(run, rows, tmp_path):
  (tmp_path / "out.parquet").write_bytes(b"mine")
  with pytest.raises(ValueError, match=r"out.parquet: exists"):
    run(rows())
  assert (tmp_path / "out.parquet").read_bytes() == b"mine"


def test_a_program_of_too_many_shapes_ends_it(run, rows, tmp_path, monkeypatch):
  """What was answered is kept: the command goes on there."""
  with monkeypatch.context() as patch:
    patch.setattr(compiling, "_shapes", {"decode": ["slots 1"] * 51})
    with pytest.raises(ValueError, match=r"image: 'decode' was .* 51 shapes"):
      run(rows())
  assert len(run(rows()).prompts) == 2  # of three views


def test_the_ids_join_the_rates_to_the_rows(run, rows, project, tmp_path):
  run(rows())
  rule = "pass_rate == 0 and pass_rate_caption == 1"
  for guard, expected in (("", [0, 4]), (" and pass_rate_blind <= 0.5", [0])):
    entry = rows(annotations=str(tmp_path / "out.parquet"), filter=rule + guard)
    config = make_config(project, entry).to_dict()
    with Display(Console(quiet=True)) as display:
      prepared = job.prepare(config, tmp_path, display)
    assert prepared.sources["perceive"]["rows"].kept.tolist() == expected


def test_rows_that_are_the_same_are_asked_once(run, rows, tmp_path):
  made = make_rows(3)
  sampler = run(rows([made[2], made[1], made[2]]), caption_key="caption")
  assert [len(set(batch)) for batch in sampler.prompts] == [2, 2, 2]
  assert read(tmp_path)["pass_rate"] == [0.5, 1, 0.5]


def test_draws_depend_on_seed_view_and_row_alone(run, rows, tmp_path):
  def keys(made, **changes):
    output = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
    found = run(rows(made), output=output, **changes).keys
    return {text: where for text, *where in found}

  first = keys(make_rows())
  assert keys(make_rows()[::-1]) == first and len(first) == 15
  assert len({tuple(key) for key, _ in first.values()}) == 3  # views
  assert len({question for _, question in first.values()}) == 5
  other = keys(make_rows(), config={"seed": 1})
  assert not any(other[text][0] == key for text, (key, _) in first.items())


def test_each_completion_sees_the_options_in_an_order_of_its_own(
  run, rows, tmp_path
):
  made = make_rows(3)
  for i, row in enumerate(made):
    row["problem"] += "\nA. cat\nB. dog\nC. cow\nD. pig"
    row["answer"] = "ABC"[i]
  sampler = run(
    rows(made, shuffle_options=True),
    views=("image", "none"),
    caption_key="",
    completions=16,
    temperature=0.0,  # the prompts differ
    say=lambda text, g: "<answer>A</answer>",
  )
  image, blind = (
    [text for batch in batches for text in batch]
    for batches in (sampler.prompts[:6], sampler.prompts[6:])
  )
  options = [text.partition("?")[2] for text in image]
  assert options == [text.partition("?")[2] for text in blind]
  assert len(set(options)) > 6
  rights = [
    [f"A. {right}" in text for text in options[16 * i : 16 * i + 16]]
    for i, right in enumerate(("cat", "dog", "cow"))
  ]
  found = read(tmp_path)
  # A model that always says A is right as often as A is.
  assert found["pass_rate"] == [sum(right) / 16 for right in rights]
  assert found["pass_rate"] == found["pass_rate_blind"]
  assert 0 < sum(found["pass_rate"]) < 1.5
  assert found["completions"] == [16] * 3 and found["answer"] == list("ABC")


def test_a_reward_that_fails_leaves_the_rate_unknown(
  run, rows, tmp_path, console
):
  made = make_rows()
  made[0]["answer"] = made[1]["answer"] = "broken"
  run(rows(made))
  assert read(tmp_path)["pass_rate"] == [None, None, 0.5, 0, 0]
  text = console.export_text()
  assert text.count("broke") == 5
  assert text.count("counted below") == 1
  assert re.search(r"kept +0 *\n", text)
  assert re.search(r"the reward failed.* 2 *\n", text)


def test_a_sources_own_reward_says_what_is_right(run, rows, tmp_path):
  made = [row | {"answer": "yes"} for row in make_rows()]
  run(rows(made, rewards=(("format", 1.0),)))
  assert read(tmp_path)["pass_rate"] == [1] * 5


def test_the_summary_counts_rates_and_why_rows_are_rejected(run, rows, console):
  run(rows())
  lines = [" ".join(line.split()) for line in console.export_text().split("\n")]
  tokens = f"0 {len(RIGHT)}.0 50.0 %"
  assert f"image 30.0 % 3 60.0 % 1 20.0 % 1 20.0 % {tokens}" in lines
  assert f"caption 90.0 % 0 0.0 % 1 20.0 % 4 80.0 % {tokens}" in lines
  start = lines.index("rows")
  assert lines[start + 2 : start + 6] == [
    "kept 1",
    "guessable without picture and caption 1",
    "right from the image 2",
    "wrong from the caption 1",
  ]


def test_rows_without_a_caption_are_named_before_anything_is_asked(
  run, rows, tmp_path
):
  made = make_rows()
  made[3]["caption"] = None
  with pytest.raises(ValueError, match=r"rows.parquet\[3\]: caption_key"):
    run(rows(made))
  made[3]["caption"] = "long " * 3000
  with pytest.raises(ValueError, match=r"\[3\]: 150\d\d tokens with its capt"):
    run(rows(made))
  assert not (tmp_path / "out.parquet.parts").exists()


def test_a_row_without_pictures_needs_no_caption(run, rows):
  made = make_rows(2)
  made[1] |= {"problem": "which 1?", "images": [], "caption": None}
  assert run(rows(made)).prompts[1][1] == "which 1?"


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"views": ("image", "text")}, "views: got"),
    ({"views": ("image", "image")}, "each once"),
    ({"completions": 0}, "at least 1"),
    ({"caption_key": ""}, "the view caption needs one of them"),
    ({"views": ("image",)}, "the other views none"),
  ],
  ids=str,
)
def test_a_plan_that_cannot_be_is_refused(changes, told):
  with pytest.raises(ValueError, match=told):
    make_plan(**changes)


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"stage": "see"}, "no stage 'see'; there are perceive"),
    ({"source": "row"}, "no 'row' in stages.perceive.data; there are rows"),
    ({"temperature": 0.0}, "got 2 at temperature 0, where all are the same"),
  ],
  ids=str,
)
def test_what_does_not_fit_the_config_is_told(project, changes, told):
  config = make_config(project, common.data("files")).to_dict()
  with pytest.raises(ValueError, match=told):
    annotate.narrowed(config, make_plan(**changes))


def test_a_checkpoint_is_to_be_named(project):
  config = make_config(project, common.data("files"))
  config.model.checkpoint = ""
  with pytest.raises(ValueError, match="checkpoint that answers"):
    annotate.narrowed(config.to_dict(), make_plan())


def test_several_hosts_are_refused(run, rows, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="got 2 hosts; expected one"):
    run(rows())
