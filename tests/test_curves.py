"""The picture of a run, checked by what is drawn in it."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from jaxvlm import curves
from jaxvlm.metrics import Logger


@pytest.fixture
def workdir(tmp_path):
  logger = Logger(
    tmp_path,
    resume_step=-1,
    tensorboard=False,
    wandb_project=None,
    primary=True,
    show=lambda record: None,
  )

  def evaluate(stage, step, score):
    metrics = {
      "perception/mean@4": score,
      "perception/greedy": score + 0.1,
      "perception/length": 4.0,
    }
    logger.evaluation(stage=stage, global_step=step, metrics=metrics, timing={})

  evaluate("start", 0, 0.0)
  for step in range(1, 31):
    stage = "warm_start" if step <= 10 else "visual_perception"
    metrics = {"loss": 1.0}
    if step > 10:
      reward = math.nan if step == 20 else step / 30
      metrics = {"reward": reward, "length": 4.0}
    logger.step(
      stage=stage, step=step, global_step=step, metrics=metrics, timing={}
    )
    if step % 10 == 0:
      evaluate(stage, step, step / 40)
  return tmp_path


@pytest.fixture
def drawn(workdir, monkeypatch):
  """The figure of the run, as it was when it was saved."""
  figures = []
  save = Figure.savefig

  def remember(figure, *args, **kwargs):
    figures.append(figure)
    save(figure, *args, **kwargs)

  monkeypatch.setattr(Figure, "savefig", remember)
  curves.draw_curves(workdir)
  return figures[0]


def has_line(axes, steps, values):
  return any(
    np.array_equal(line.get_xdata(), steps)
    and np.allclose(line.get_ydata(), values, equal_nan=True)
    for line in axes.lines
  )


def test_the_picture_is_a_large_png(workdir):
  curves.draw_curves(workdir)
  with Image.open(workdir / "curves.png") as image:
    assert image.format == "PNG" and min(image.size) > 1000


def test_the_three_panels_show_reward_accuracy_and_length(drawn):
  reward, accuracy, length = drawn.axes
  steps = np.arange(11, 31)
  values = np.where(steps == 20, np.nan, steps / 30)
  assert has_line(reward, steps, values)
  evaluated = [0, 10, 20, 30]
  assert has_line(accuracy, evaluated, [0, 25, 50, 75])
  assert has_line(accuracy, evaluated, [10, 35, 60, 85])
  assert has_line(length, steps, np.full(20, 4.0))
  assert has_line(length, evaluated, [4.0] * 4)


def test_stage_borders_are_drawn_and_named_in_every_panel(drawn):
  for axes in drawn.axes:
    assert has_line(axes, [10, 10], [0, 1])
    assert axes.get_xlim() == (0, 30)
  names = {text.get_text(): text.xy[0] for text in drawn.axes[0].texts}
  assert names["warm\nstart"] == 5
  assert names["visual\nperception"] == 20


def test_the_legend_names_what_is_drawn(drawn):
  [legend] = drawn.legends
  assert [text.get_text() for text in legend.get_texts()] == [
    "training",
    "perception, held out",
    "mean@4",
    "greedy",
  ]


def test_no_records_make_no_picture(tmp_path):
  curves.draw_curves(tmp_path)
  assert not (tmp_path / "curves.png").exists()


def test_smoothing_keeps_a_constant_and_leaves_gaps_out():
  values = np.full(40, 2.0)
  values[[0, 7]] = np.nan
  np.testing.assert_allclose(curves._smooth(values), 2.0)
