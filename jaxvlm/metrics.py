"""(sum, count) pairs, timers, and the records that a run leaves behind.

`Logger` writes into the run's workdir:

  metrics.jsonl   a JSON object for each step and each evaluation
  samples.jsonl   completions of logged steps, with their parts of the reward
  samples/        the pictures they refer to, as PNG, each stored once
  tensorboard/    the same numbers as TensorBoard events

In metrics.jsonl everything outside "timing" is a pure function of the config,
so that an undisturbed run and a resumed one can be compared line by line.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from jaxvlm import paths
from jaxvlm.paths import Path

Metrics = dict[str, tuple[float, float]]  # name -> (sum, count)
Record = dict[str, Any]  # one line of a .jsonl file


def add(a: Metrics, b: Metrics) -> Metrics:
  """The pairs of two parts of a whole; a name may stand in one of them only."""
  total = dict(a)
  for name, (value, count) in b.items():
    value_so_far, count_so_far = total.get(name, (0.0, 0.0))
    total[name] = (value_so_far + value, count_so_far + count)
  return total


def means(metrics: Metrics) -> dict[str, float]:
  """sum / count of each pair; one that counts nothing is left out."""
  return {
    name: float(value) / float(count)
    for name, (value, count) in metrics.items()
    if count
  }


class Timers:
  """Seconds that each phase of a step takes.

  `with timers("rollout"): ...` adds to the phase, `take()` hands out the sums
  and starts anew. A phase ends when its result is on the host: block on it.
  """

  def __init__(self) -> None:
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
      yield
    finally:
      seconds = time.perf_counter() - start
      self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

  def take(self) -> dict[str, float]:
    seconds, self._seconds = self._seconds, {}
    return seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One completion worth a look."""

  question_id: int
  problem: str
  answer: str
  completion: str
  reward: float
  parts: Mapping[str, float]  # each reward by name, unweighted
  images: tuple[str | bytes | np.ndarray, ...]  # path, encoded or uint8 [H W 3]


class Logger:
  """Writes a run's records; one for each run, on every host.

  Args:
    workdir: where the records go; made if it is missing.
    resume_step: global step of the restored checkpoint, -1 where there is
      none. Records of later steps are cut off; they will be made again.
    tensorboard: whether to write TensorBoard events.
    wandb_project: Weights & Biases project; None: no W&B.
    primary: whether this host writes; the others only check arguments.
    show: called with each record as it is written (`Display.show`).

  Raises:
    ValueError: W&B is asked for and is not installed.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    resume_step: int,
    tensorboard: bool,
    wandb_project: str | None,
    primary: bool,
    show: Callable[[Record], None],
  ) -> None:
    self._workdir = paths.path(workdir)
    self._primary = primary
    self._show = show
    self._events: Any = None
    self._wandb: Any = None
    self._evaluated: set[tuple[str, int]] = set()
    if not primary:
      return
    self._workdir.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
      _cut(self._workdir / name, resume_step)
    for record in read_records(self._workdir / "metrics.jsonl", kind="eval"):
      self._evaluated.add((record["stage"], record["global_step"]))
    if tensorboard:
      from jaxvlm.events import Events  # brings PyTorch, where that is there

      self._events = Events(self._workdir / "tensorboard", resume_step)
    if wandb_project is not None:
      self._wandb = _start_wandb(wandb_project, self._workdir)

  def step(
    self,
    *,
    stage: str,
    step: int,
    global_step: int,
    metrics: Mapping[str, float],
    timing: Mapping[str, float],
  ) -> None:
    """Records one step; both counters say how many steps are done, from 1.

    `Display` and the curves know the metrics reward, accuracy, loss, length
    (tokens) and kl, and the timing tokens_per_second; others are welcome.
    """
    place = {"stage": stage, "step": step, "global_step": global_step}
    self._write("train", place, metrics, timing)

  def evaluation(
    self,
    *,
    stage: str,
    global_step: int,
    metrics: Mapping[str, float],
    timing: Mapping[str, float],
  ) -> None:
    """Records scores on held-out data, as of the end of `stage` or within it.

    Names: "perception/mean@8", "perception/greedy", "perception/length",
    "perception/truncated", "perception/task/color/greedy" and
    "perception/task/color/majority"; shares are in 0..1. Before any training
    the stage is "start", at global step 0. A resumed run may evaluate once
    more where its checkpoint stands: what is already recorded stays.
    """
    if (stage, global_step) in self._evaluated:
      return
    self._evaluated.add((stage, global_step))
    place = {"stage": stage, "global_step": global_step}
    self._write("eval", place, metrics, timing)

  def samples(
    self, *, stage: str, step: int, global_step: int, samples: Iterable[Sample]
  ) -> None:
    """Records completions, and stores their pictures where they are new."""
    if not self._primary:
      return
    place = {"stage": stage, "step": step, "global_step": global_step}
    for sample in samples:
      fields = {
        field.name: getattr(sample, field.name)
        for field in dataclasses.fields(sample)
      }
      fields["question_id"] = int(sample.question_id)
      fields["reward"] = _plain(sample.reward)
      fields["parts"] = _numbers(sample.parts)
      fields["images"] = [
        _store_picture(picture, self._workdir) for picture in sample.images
      ]
      _append(self._workdir / "samples.jsonl", place | fields)

  def close(self) -> None:
    if self._events is not None:
      self._events.close()
    if self._wandb is not None:
      self._wandb.finish()

  def _write(
    self,
    kind: str,
    place: Record,
    metrics: Mapping[str, float],
    timing: Mapping[str, float],
  ) -> None:
    if not self._primary:
      return
    record = {
      "kind": kind,
      **place,
      "metrics": _numbers(metrics),
      "timing": _numbers(timing),
    }
    _append(self._workdir / "metrics.jsonl", record)
    numbers = {f"{kind}/{name}": float(x) for name, x in metrics.items()}
    numbers |= {f"timing/{name}": float(x) for name, x in timing.items()}
    if self._events is not None:
      self._events.write(place["global_step"], numbers)
    if self._wandb is not None:
      self._wandb.log(numbers | {"global_step": place["global_step"]})
    self._show(record)


def read_records(file: Path, *, kind: str | None = None) -> list[Record]:
  """The records of a .jsonl file in order, or those of one kind.

  A missing file has none. A last line that a crash tore is left out.

  Raises:
    ValueError: another line is not JSON; names file and line.
  """
  records = [record for _, record in _lines(paths.path(file))]
  return [r for r in records if kind is None or r["kind"] == kind]


def _lines(file: pathlib.Path) -> Iterator[tuple[bytes, Record]]:
  content = file.read_bytes() if file.exists() else b""
  # What follows the last line feed is b"", or was torn by a crash.
  for number, line in enumerate(content.split(b"\n")[:-1], start=1):
    try:
      yield line, json.loads(line)
    except ValueError as error:
      raise ValueError(
        f"{file}:{number}: not a JSON record ({error}). "
        "Delete the line, or start in a new workdir."
      ) from error


def _cut(file: pathlib.Path, step: int) -> None:
  """Keeps the whole records of global steps up to `step`."""
  if not file.exists():
    return
  kept = [line for line, r in _lines(file) if r["global_step"] <= step]
  content = b"".join(line + b"\n" for line in kept)
  if content != file.read_bytes():
    paths.write(file, content)


def _append(file: pathlib.Path, record: Record) -> None:
  line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
  paths.append(file, line.encode("utf-8", errors="replace"))


def _plain(value: float) -> float | None:
  """A JSON number; None for NaN and infinities, which JSON does not have."""
  value = float(value)
  return value if math.isfinite(value) else None


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
  return {name: _plain(value) for name, value in values.items()}


def _store_picture(
  picture: str | bytes | np.ndarray, workdir: pathlib.Path
) -> str:
  """Writes samples/<digest>.png unless it is there; returns that path."""
  if isinstance(picture, np.ndarray):
    encoded = f"{picture.shape}".encode() + picture.tobytes()
  elif isinstance(picture, bytes):
    encoded = picture
  else:
    encoded = paths.path(picture).read_bytes()
  name = f"samples/{hashlib.sha256(encoded).hexdigest()[:16]}.png"
  if not (workdir / name).exists():
    (workdir / "samples").mkdir(exist_ok=True)
    if isinstance(picture, np.ndarray):
      image = Image.fromarray(picture)
    else:
      image = Image.open(io.BytesIO(encoded)).convert("RGB")
    png = io.BytesIO()
    image.save(png, format="PNG")
    paths.write(workdir / name, png.getvalue())
  return name


def _start_wandb(project: str, workdir: pathlib.Path) -> Any:
  try:
    import wandb
  except ImportError as error:
    raise ValueError(
      f"wandb_project={project!r}, but wandb is not installed. "
      "Run `pip install wandb`, or leave wandb_project out."
    ) from error
  # Its own files stay on this machine where the workdir is in a bucket.
  home = paths.here() if paths.remote(workdir) else workdir
  # A resumed run goes on under the id it had.
  file = workdir / "wandb_id"
  if not file.exists():
    paths.write(file, secrets.token_hex(8).encode())
  run = wandb.init(
    project=project, id=file.read_text(), dir=str(home), resume="allow"
  )
  run.define_metric("*", step_metric="global_step")
  return run
