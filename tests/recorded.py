"""main, which also writes down what each host samples, and may be disturbed.

Writes WORKDIR/sampled/ROLLOUT.hostHOST.npz. MISHAP="HOST ROLLOUT WHAT" of the
environment: on that host that rollout begins with a SIGTERM ("stop"), an error
("fail") or a minute's sleep ("sleep").
"""

import os
import pathlib
import signal
import time

import jax
import numpy as np

from jaxvlm import main, train

_roll_out = train.roll_out


def roll_out(stage, sampler, params, questions, key):
  host = jax.process_index()
  place = pathlib.Path(main.CONFIG.value.workdir, "sampled")
  place.mkdir(exist_ok=True)
  number = len(list(place.glob(f"*.host{host}.npz")))
  mishap(host, number)
  rollout = _roll_out(stage, sampler, params, questions, key)
  np.savez(
    place / f"{number}.host{host}.npz",
    questions=[question.question_id for question in questions],
    ids=rollout.completion_ids,
    mask=rollout.completion_mask,
    logprobs=rollout.sampler_logprobs,
  )
  return rollout


def mishap(host, number):
  planned = os.environ.get("MISHAP", "").split()
  if planned[:2] != [str(host), str(number)]:
    return
  if planned[2] == "stop":
    os.kill(os.getpid(), signal.SIGTERM)
  elif planned[2] == "fail":
    raise KeyError("no such picture")
  else:
    time.sleep(60)


if __name__ == "__main__":
  train.roll_out = roll_out
  main.cli()
