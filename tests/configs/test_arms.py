"""Arms share rows, freeze policy and budget, and say in what they differ."""

import importlib
import json
import pathlib

import pytest

from configs import arms, common, staged
from jaxvlm import account
from jaxvlm.data.sources import files, worlds
from jaxvlm.stages import Stage, hold_schedule

PAPER = pathlib.Path(arms.__file__).with_name("paper.py")
BASES = ("tiny", "tiny_qwen3", "files", f"{PAPER}:qwen3_vl_8b")
SAME_ROWS = (
  *("merged", "reversed", "released_order"),
  *("difficulty", "staged_difficulty"),
)
# What an entry has besides its source's arguments.
ENTRY = set(common.data("files"))


def load(arm, base="tiny"):
  if arm == "staged":
    return arms.load(base)
  return importlib.import_module(f"configs.{arm}").get_config(base)


def compared(config):
  """The stages after what all arms share."""
  names = [n for n in config.schedule if n != "warm_start"]
  return {name: config.stages[name].to_dict() for name in names}


def rows_asked(config):
  """Questions asked of each data entry, whatever it is called."""
  asked = {}
  for stage in compared(config).values():
    total = sum(entry["weight"] for entry in stage["data"].values())
    for entry in stage["data"].values():
      rows = json.dumps(
        entry | {"weight": None, "report_as": None}, sort_keys=True
      )
      questions = stage["steps"] * stage["rollout_questions"]
      asked[rows] = asked.get(rows, 0) + questions * entry["weight"] / total
  return asked


def updates(config):
  return sum(
    s["steps"] * s["updates_per_rollout"] for s in compared(config).values()
  )


def questions(config):
  return sum(
    s["steps"] * s["rollout_questions"] for s in compared(config).values()
  )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_of_every_base_makes_as_many_updates_of_as_many_questions(
  arm, base
):
  config, other = load("staged", base), load(arm, base)
  assert updates(other) == updates(config)
  assert questions(other) == questions(config)
  assert {s["freeze"] for s in compared(other).values()} == {
    s["freeze"] for s in compared(config).values()
  }
  assert other.evaluation == config.evaluation
  assert set(other.stages) == set(other.schedule)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("arm", SAME_ROWS)
def test_arms_that_differ_in_order_ask_the_same_rows_as_often(arm, base):
  expected = rows_asked(load("staged", base))
  assert rows_asked(load(arm, base)) == pytest.approx(expected)


@pytest.mark.parametrize("arm", arms.ARMS)
def test_stages_of_an_arm_are_stages_to_jaxvlm(arm):
  config = load(arm)
  for name in config.schedule:
    Stage(name=name, **config.stages[name].to_dict())


def test_orders_are_what_the_arms_are_called():
  before = ("warm_start",)
  perception, visual, textual = staged.CAPABILITIES
  assert load("reversed").schedule == (*before, textual, visual, perception)
  released = (perception, textual, visual)
  assert load("released_order").schedule == (*before, *released)
  paper = f"{PAPER}:qwen2_5_vl_7b"
  assert load("reversed", paper).schedule == (visual, textual, perception)
  # By pass rate: the only knob in which they are not merged and staged.
  for arm, other in (("difficulty", "merged"), ("staged_difficulty", "staged")):
    ordered, plain = compared(load(arm)), compared(load(other))
    for name, stage in ordered.items():
      assert stage["order"] == "-pass_rate"
      assert stage | {"order": ""} == plain[name]


@pytest.mark.parametrize("capability", staged.CAPABILITIES)
def test_a_single_stage_spends_all_on_its_own_rows(capability):
  config = load(f"{capability}_only")
  (stage,) = compared(config).values()
  assert list(stage["data"]) == ["worlds"]
  assert stage["data"] == {
    "worlds": compared(load("staged"))[capability]["data"]["worlds"]
  }


def test_captions_are_of_the_pictures_that_perception_asks_about():
  config = load("caption_sft")
  stage = compared(config)["captions"]
  asked = compared(load("staged"))["visual_perception"]
  assert stage["kind"] == "sft"
  assert stage["optimizer"] == asked["optimizer"]

  def examples(entry, count=40):
    fields = {k: v for k, v in entry.items() if k not in ENTRY}
    return worlds.source(**fields)[:count]

  captions = examples(stage["data"]["worlds"])
  for caption, row in zip(
    captions, examples(asked["data"]["worlds"]), strict=True
  ):
    assert (caption.images[0] == row.images[0]).all()
    assert caption.response and caption.problem == "<image>describe"
    assert row.response is None
  assert list(compared(config))[1:] == list(staged.CAPABILITIES[1:])


def test_captions_of_files_are_a_column(tmp_path):
  file = tmp_path / "rows.jsonl"
  row = {"problem": "which?", "answer": "A", "caption": "a cat", "images": []}
  file.write_text(json.dumps(row))
  entry = compared(load("caption_sft", "files"))["captions"]["data"]["files"]
  fields = {k: v for k, v in entry.items() if k not in ENTRY}
  (example,) = files.source(**fields | {"path": str(file)})
  assert example.response == "a cat"
  assert example.problem == "Describe the picture in detail."


def test_an_arm_allows_by_name_and_the_baseline_nothing():
  assert load("staged").allows == ()
  for arm in arms.ARMS[1:]:
    assert {"schedule", *arms.OUTCOMES} <= set(load(arm).allows)
    assert "freeze" not in load(arm).allows
    assert "updates" not in load(arm).allows
  for arm in SAME_ROWS:
    assert not {"rows", "draws", "patches"} & set(load(arm).allows)


def test_how_much_is_rolled_out_may_differ_where_the_policy_decides_it():
  asked = {"questions", "draws", "patches", "prompt_tokens"}
  assert asked <= set(load("merged", "tiny,dapo").allows)
  assert not asked & set(load("merged").allows)


def test_workdirs_of_arms_differ():
  for base in BASES:
    assert len({load(arm, base).workdir for arm in arms.ARMS}) == len(arms.ARMS)


def test_rewards_that_differ_between_stages_go_with_their_rows(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import staged\n"
    "def get_config(size='tiny'):\n"
    "  config = staged.get_config(size)\n"
    "  config.stages.textual_reasoning.rewards = (('math', 1.0),)\n"
    "  return config\n"
  )
  data = load("merged", f"{file}:tiny").stages.merged.data
  assert data.textual_reasoning_worlds.rewards == (("math", 1.0),)
  assert data.visual_reasoning_worlds.rewards == ()


def test_a_base_that_cannot_be_one_is_refused_by_name(tmp_path):
  with pytest.raises(ValueError, match=r"no config file 'nowhere.py'"):
    arms.load("nowhere.py:tiny")
  with pytest.raises(ValueError, match="no size 'huge'"):
    arms.load("huge")
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import common\n"
    "def get_config():\n"
    "  return common.base(schedule=('visual_perception',))\n"
  )
  with pytest.raises(ValueError, match="has no stage 'visual_reasoning'"):
    arms.load(str(file))


def test_captions_of_another_source_are_refused(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import common, staged\n"
    "def get_config():\n"
    "  config = staged.get_config()\n"
    "  data = {'mine': common.data('mine.py:rows')}\n"
    "  config.stages.visual_perception.data = data\n"
    "  return config\n"
  )
  with pytest.raises(ValueError, match=r"source 'mine' is 'mine.py:rows'"):
    load("caption_sft", str(file))


@pytest.mark.parametrize("arm", ["staged", *SAME_ROWS])
def test_arms_that_are_held_have_the_same_learning_rates(arm):
  """As compare_arms.py --hold_schedule makes them."""

  def told(config):
    rate = load("staged").stages.visual_perception.learning_rate
    stages = [
      Stage(name=name, **stage | {"learning_rate": rate})
      for name, stage in compared(config).items()
    ]
    held = hold_schedule(stages, [stage.name for stage in stages])
    return account.schedule(held), account.schedule(stages)

  held, apart = told(load(arm))
  expected, _ = told(load("merged"))
  assert held == expected
  assert (apart == expected) is (len(compared(load(arm))) == 1)


@pytest.mark.parametrize("size", ["qwen2_5_vl_7b", "qwen3_vl_8b"])
def test_the_paper_is_the_paper(size):
  config = arms.load(f"{PAPER}:{size}")
  assert {n: config.stages[n].steps for n in config.schedule} == {
    "visual_perception": 90,
    "textual_reasoning": 375,
    "visual_reasoning": 465,
  }
  for name in config.schedule:
    stage = config.stages[name]
    assert (stage.rollout_questions, stage.num_completions) == (512, 5)
    assert (stage.update_questions, stage.updates_per_rollout) == (512, 4)
    assert (
      config.inputs.max_prompt_length == stage.max_completion_length == 2048
    )
    assert (stage.learning_rate, stage.lr_schedule) == (1e-6, "constant")
    assert stage.optimizer.weight_decay == 0.01
    assert stage.kl_coef == 0.01
    assert stage.reference == "stage_start"
    assert stage.freeze == ()
    assert stage.rewards == (("math", 0.9), ("think_format", 0.1))


def test_a_size_that_the_paper_has_not_is_refused():
  with pytest.raises(ValueError, match="no size 'tiny'; there are qwen2_5_vl"):
    arms.load(f"{PAPER}:tiny")
