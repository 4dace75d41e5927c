"""main, which also writes down what each host samples, and may be disturbed.

Writes WORKDIR/sampled/ROLLOUT.hostHOST.npz, and weights.hostHOST with a line for
each time that decoding's copy was made, and fails where one is left as an update
begins. MISHAP="HOST ROLLOUT WHAT" of the environment: on that host that rollout,
or where it is "update" the second gradient, begins with a SIGTERM ("stop"), a
SIGKILL ("kill"), an error ("fail") or a minute's sleep ("sleep").
NARROWEST: columns of caches at the beginning, if they are to grow.
"""

import itertools
import os
import pathlib
import signal
import time
import weakref

import jax
import numpy as np

from jaxvlm import learner, main, train
from jaxvlm.rollout import schedule

_roll_out, _learn = train.roll_out, train.learn
_sampling_weights, _add_gradient = train.sampling_weights, learner.add_gradient
_made: list[weakref.ref] = []
_gradients = itertools.count(1)


def sampling_weights(stage, sampler, params):
  with open(sampled() / f"weights.host{jax.process_index()}", "a") as file:
    file.write(f"{stage.name}\n")
  weights = _sampling_weights(stage, sampler, params)
  if weights is not None:
    _made.append(weakref.ref(weights))
  return weights


def learn(*args):
  assert all(weights() is None for weights in _made), "decoding's copy is left"
  return _learn(*args)


def roll_out(stage, sampler, weights, questions, key):
  host, place = jax.process_index(), sampled()
  number = len(list(place.glob(f"*.host{host}.npz")))
  mishap(host, number)
  # Where questions wait: they take others' places, and in the next step not.
  schedule.refills = lambda *_: number % 2 == 0
  rollout = _roll_out(stage, sampler, weights, questions, key)
  np.savez(
    place / f"{number}.host{host}.npz",
    questions=[question.question_id for question in questions],
    ids=rollout.completion_ids,
    mask=rollout.completion_mask,
    logprobs=rollout.sampler_logprobs,
  )
  return rollout


def add_gradient(*args):
  mishap(jax.process_index(), "update" if next(_gradients) == 2 else "")
  return _add_gradient(*args)


def sampled():
  place = pathlib.Path(main.CONFIG.value.workdir, "sampled")
  place.mkdir(exist_ok=True)
  return place


def mishap(host, number):
  planned = os.environ.get("MISHAP", "").split()
  if planned[:2] != [str(host), str(number)]:
    return
  if planned[2] == "stop":
    os.kill(os.getpid(), signal.SIGTERM)
  elif planned[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
  elif planned[2] == "fail":
    raise KeyError("no such picture")
  else:
    time.sleep(60)


if __name__ == "__main__":
  if columns := os.environ.get("NARROWEST"):
    schedule._NARROWEST["cpu"] = int(columns)
  train.roll_out, train.learn = roll_out, learn
  train.sampling_weights, learner.add_gradient = sampling_weights, add_gradient
  main.cli()
