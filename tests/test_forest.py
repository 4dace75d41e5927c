"""The picture of arms over seeds."""

import io

import numpy as np
from PIL import Image

from jaxvlm import forest


def found(seeds):
  """What comparison.summarize gives, as far as it is drawn."""

  def spread(mean):
    values = [mean + 0.05 * (seed - 1) for seed in range(seeds)]
    sd = np.std(values, ddof=1) if seeds > 1 else None
    return {"mean": np.mean(values), "sd": sd, "values": values}

  def scores(mean):
    each = {"mean@8": spread(mean), "greedy": spread(mean + 0.1)}
    each["length"] = spread(9.0)
    return {"see": each, "overall": each}

  arms = {"staged": 0.5, "merged": 0.6, "reversed": 0.4}
  return {
    "start": scores(0.2),
    "arms": {arm: {"scores": scores(mean)} for arm, mean in arms.items()},
  }


def drawn(seeds):
  png = forest.draw(found(seeds))
  return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_bars_show_the_deviation_over_seeds():
  def blue(picture):
    return (picture[..., 2] - picture[..., 0] > 100).sum()

  assert blue(drawn(3)) > 1.2 * blue(drawn(1))


def test_every_arm_has_a_row():
  figures = []
  for arms in (1, 3):
    told = found(2)
    told["arms"] = dict(list(told["arms"].items())[:arms])
    figures.append(Image.open(io.BytesIO(forest.draw(told))).size)
  assert figures[0][0] == figures[1][0]
  assert figures[0][1] < figures[1][1]
