"""Rollout, update, whole step and vision tower on defined arrays and weights.

  python tools/bench.py --model NAME --work W1 --work-dir DIR

DIR/NAME holds two Hugging Face checkpoints, policy/ and ref/, and inputs.npz:
B questions of one picture each (`prompts` [B P], `pixels`, `grid` [B 3]), G
completions of R tokens (`completions` [B*G R], `advantages`, `old_logps`,
`policy_logps`, `lengths` [B*G]), raw `images` [B H W 3] and `text` [B T] ids,
and pictures for the tower (`v_pixels`, `v_grid`). Rows of a question follow one
another. tools/bench_work.py makes such a folder from nothing.

  W1  B*G completions of exactly R tokens           tokens/s
  W2  the same, each ended at its own length        useful tokens/s
  W3  one GRPO update of all, reference included    samples/s
  W4  a whole step, from raw pictures and text      seconds
  W5  the tower, without gradient                   pictures/s

One device. Each repetition waits for a quiet machine, begins with arrays on the host and
ends with the result there; compilation is left out and told as first_call_s.
Prints a table's row to stderr and a JSON line to stdout, whose `check` says that
it was the same work: the losses and gradient norms of W3, the first numbers of
W5, and of W1 and W2 the largest errors of the learner's logprobs against
`policy_logps` and of the sampler's against the learner's.

`flops` and `bytes` are what a repetition needs (operations.py says what counts);
`matmul_gflops` and `bandwidth_gb_s` are what this machine gives to products of
such shapes and to large arrays, measured after the repetitions (machine.py),
while others used `limit_other_cpu` of the cores. The slower of the two takes
`limit_s`, and `share` is that over the median. Of the programs that this process
ran before, `compiled` were compiled and `cached` read from --compilation_cache,
in `compile_s` seconds. Compiling takes memory: `peak_rss_mb` is that of a run as
users have it once what is slow is `cached`; `peak_device_mb` is the device's own.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

# Where the other tools are.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from configs import common
from jaxvlm import compiling, heap, models, sharding
from jaxvlm.data.processor import Processor
from jaxvlm.data.vision_layout import (
  Layout,
  mrope_positions,
  token_places,
)
from jaxvlm.encoder import Encoder
from jaxvlm.filling import UNKNOWN, Known, sizes_of
from jaxvlm.learner import Learner, Objective, Optimizer
from jaxvlm.packing import Packed
from jaxvlm.rl import advantages
from jaxvlm.rollout.sampler import Draws, Sampler
from jaxvlm.types import Example, Experience, Params, Question, Rollout
from tools import machine, operations

METRICS = {
  "W1": "tokens_per_s",
  "W2": "useful_tokens_per_s",
  "W3": "samples_per_s",
  "W4": "s_per_step",
  "W5": "images_per_s",
}
REPS = {"tiny": 7, "small": 5, "medium": 3}
OPTIMIZER = Optimizer(
  name="adamw",
  b1=0.9,
  b2=0.999,
  weight_decay=0.0,
  clip_norm=1.0,
  compensated=False,
)
RATE = 1e-5
QUIET = 0.1  # share of the cores that others may use
_HZ = os.sysconf("SC_CLK_TCK")


def usual_dtype() -> str:
  """Of activations, on this machine."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_mesh() -> jax.sharding.Mesh:
  first = np.array(jax.devices()[:1]).reshape(1, 1, 1)
  return jax.sharding.Mesh(first, sharding.AXES)


class Lab:
  """A model: weights, arrays, sampler and learner, on one device."""

  def __init__(
    self,
    *,
    network: models.Network,
    params: Params,
    reference: Callable[[], Params],  # called by the works that need them
    arrays: Mapping[str, np.ndarray],  # of inputs.npz, read when asked for
    group: int,
    length: int,
    microbatch_tokens: int,
  ):
    self.network, self.mesh = network, make_mesh()
    self.params = self.lay_out(params)
    self._load_reference = reference
    self.arrays = arrays
    self.group, self.length = group, length
    self.microbatch_tokens = microbatch_tokens
    self.config = network.config.to_hf()
    self.layout = Layout.from_config(self.config)
    self.dtype = network.dtype
    banned = np.zeros(self.network.config.vocab_size, bool)
    self.known = UNKNOWN
    if "prompts" in arrays:
      tokens = [len(ids) for ids in arrays["prompts"]]
      sizes = np.column_stack([tokens, arrays["grid"].prod(axis=1)])
      self.known = Known.of(sizes)
    self.sampler = Sampler(
      network=self.network,
      mesh=self.mesh,
      eos_ids=(),
      pad_id=0,
      banned=banned,
      layout=self.layout,
      known=self.known,
    )
    self.draws = Draws(
      num_completions=self.group,
      max_completion_length=self.length,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
    )
    self.learner = Learner(
      network=self.network,
      mesh=self.mesh,
      banned=banned,
      frozen=(),
      optimizer=OPTIMIZER,
      objective=Objective(
        kind="grpo",
        temperature=1.0,
        surrogate=(
          ("clip_dual", None),
          ("clip_high", 0.2),
          ("clip_low", 0.2),
          ("name", "clip"),
        ),
        aggregation="sequence",
        max_completion_length=self.length,
        kl_coef=0.01,
        kl_estimator="k3",
        kl_limit=20.0,
        entropy_coef=0.0,
        importance=None,
        importance_cap=1.0,
        logprob_chunk=256,
      ),
    )

  def lay_out(self, params: Params) -> Params:
    """On the mesh, as an update leaves them: else its second call compiles."""
    return jax.tree.map(
      lambda x, axes: jax.device_put(
        x, sharding.sharding(self.mesh, axes, x.shape)
      ),
      params,
      self.network.axes(),
    )

  @classmethod
  def read(
    cls, directory: pathlib.Path, *, microbatch_tokens: int, remat: str
  ) -> Self:
    """The work folder's."""
    network = models.load_network(
      directory / "policy",
      dtype=usual_dtype(),
      param_dtype="float32",
      remat=remat,
      attention=models.choose_attention("auto"),
    )

    def load(name: str) -> Params:
      return models.load_params(
        network, directory / name, make_mesh(), lambda count: None
      )

    arrays = np.load(directory / "inputs.npz")
    return cls(
      network=network,
      params=load("policy"),
      reference=functools.partial(load, "ref"),
      arrays=arrays,
      group=int(arrays["G"]),
      length=int(arrays["R"]),
      microbatch_tokens=microbatch_tokens,
    )

  @functools.cached_property
  def reference(self) -> Params:
    return self.lay_out(self._load_reference())

  @functools.cached_property
  def questions(self) -> list[Question]:
    a = self.arrays
    patches = np.split(a["pixels"], len(a["prompts"]))
    return [
      self.question(i, ids, pixels, grid[None])
      for i, (ids, pixels, grid) in enumerate(
        zip(a["prompts"], patches, a["grid"], strict=True)
      )
    ]

  def question(
    self, i: int, ids: np.ndarray, pixels: np.ndarray, grid: np.ndarray
  ) -> Question:
    ids, grid = ids.astype(np.int32), grid.astype(np.int32)
    return Question(
      question_id=i,
      example=Example(problem="", answer=""),
      prompt_ids=ids,
      position_ids=mrope_positions(ids, grid, self.layout),
      pixel_values=pixels,
      image_grid_thw=grid,
    )

  def groups(self, name: str) -> np.ndarray:
    """An array of [B*G ...] as [B G ...]."""
    return self.arrays[name].reshape(
      -1, self.group, *self.arrays[name].shape[1:]
    )

  def pack(
    self,
    questions: list[Question],
    ids: np.ndarray,
    mask: np.ndarray | None = None,
  ) -> Packed:
    """Completions [B G R]; without a mask all have their full length."""
    return Packed(
      questions,
      ids.astype(np.int32),
      np.ones(ids.shape, bool) if mask is None else mask,
      tokens=self.microbatch_tokens,
      mesh=self.mesh,
      layout=self.layout,
      largest=self.known.patches,
    )

  def logprobs(
    self,
    params: Params,
    questions: list[Question],
    ids: np.ndarray,
    mask: np.ndarray | None = None,
  ) -> np.ndarray:
    """Those of completions, [B G R], as `pack` takes them."""
    return self.learner.logprobs([params], self.pack(questions, ids, mask))[0]

  def encode(self, questions: list[Question]) -> list[np.ndarray]:
    """The tower's tokens of each question, in the order of a lane."""
    known = Known.of(sizes_of(questions))
    see = Encoder(
      network=self.network, mesh=self.mesh, layout=self.layout, known=known
    )
    seen = see(self.params, questions)
    return [q.features[0] for q in seen if q.features is not None]

  def update(
    self,
    state: Any,
    questions: list[Question],
    ids: np.ndarray,
    values: np.ndarray,
    old: np.ndarray | None,
    reference: Any,
  ) -> tuple[Any, dict[str, Any]]:
    packed = self.pack(questions, ids)
    (known,) = self.learner.logprobs([reference], packed)

    def experience(u: int) -> Experience:
      place = functools.partial(packed.place, u=u)
      return Experience(
        tree=packed.tree(u),
        completion_mask=place(np.ones(ids.shape, bool)),
        advantages=place(values.astype(np.float32)),
        groups=place(np.ones((len(ids), 1), bool)),
        sampler_logprobs=place(np.zeros(ids.shape, np.float32)),
        old_logprobs=place(old),
        ref_logprobs=place(known),
      )

    microbatches = map(experience, range(len(packed)))
    state, metrics = self.learner.update(state, microbatches, RATE)
    return state, jax.device_get(metrics)


# One repetition, how much it does, and what tells that it was the work.
Work = tuple[Callable[[], Any], float, Callable[[], dict[str, Any]]]


def rollout(lab: Lab, *, limited: bool) -> Work:
  """W1, W2, in tokens."""
  questions, turn = lab.questions, iter(range(10**9))
  limits = lab.groups("lengths").astype(np.int32) if limited else None
  tokens = (
    int(limits.sum()) if limited else len(questions) * lab.group * lab.length
  )

  told: list[Rollout] = []

  def run() -> None:
    found = lab.sampler.sample(
      lab.sampler.weights(lab.params),
      questions,
      key=jax.random.key(next(turn)),
      draws=lab.draws,
      limits=limits,
    )
    assert found.completion_mask.sum() == tokens
    told[:] = [found]

  def check() -> dict[str, Any]:
    logprobs = lab.logprobs(lab.params, questions, lab.groups("completions"))
    error = np.abs(logprobs - lab.groups("policy_logps")).max()
    (found,) = told
    own = lab.logprobs(
      lab.params, questions, found.completion_ids, found.completion_mask
    )
    gap = np.abs(own - found.sampler_logprobs).max()
    return {
      "max_abs_logp_err": float(error),
      "max_abs_sampler_gap": float(gap),
    }

  return run, tokens, check


def update(lab: Lab) -> Work:
  """W3, in samples."""
  state = lab.learner.init(lab.params)
  ids, values = lab.groups("completions"), lab.groups("advantages")
  old = lab.groups("old_logps")
  told: dict[str, Any] = {}

  def run() -> None:
    nonlocal state
    state, metrics = lab.update(
      state, lab.questions, ids, values, old, lab.reference
    )
    place = sum(name.startswith("loss") for name in told) + 1
    if place <= 2:
      total, count = metrics["loss"]
      told[f"loss{place}"] = round(float(total / count), 6)
      told[f"grad_norm{place}"] = round(float(metrics["grad_norm"][0]), 5)
    if place == 1:
      total, count = (x[0] for x in metrics["kl"])
      told["kl1"] = round(float(total / count), 6)

  return run, ids.shape[0] * ids.shape[1], lambda: told


def step(lab: Lab) -> Work:
  """W4, in steps."""
  with tempfile.TemporaryDirectory() as directory:
    processor = make_processor(lab, pathlib.Path(directory))
  words = [[f"t{i}" for i in row] for row in lab.arrays["text"]]
  rows = [
    Example(
      problem=f"{' '.join(said[:8])} <image> {' '.join(said[8:])}",
      answer="",
      images=(picture,),
    )
    for said, picture in zip(words, lab.arrays["images"], strict=True)
  ]
  state, turn = lab.learner.init(lab.params), iter(range(10**9))
  reference = jax.tree.map(jnp.copy, lab.params)
  told: dict[str, Any] = {}

  def run() -> None:
    nonlocal state
    questions = [processor.question(row, i) for i, row in enumerate(rows)]
    for question, ids in zip(questions, lab.arrays["prompts"], strict=True):
      np.testing.assert_array_equal(question.prompt_ids, ids)
    found = lab.sampler.sample(
      lab.sampler.weights(state.params),
      questions,
      key=jax.random.key(next(turn)),
      draws=lab.draws,
    )
    assert found.completion_mask.all()
    paid = (found.completion_ids % 2 == 0).mean(-1)
    values = advantages.grpo(paid, eps=1e-4)
    state, metrics = lab.update(
      state, questions, found.completion_ids, values, None, reference
    )
    told["grad_norm"] = round(float(metrics["grad_norm"][0]), 5)

  return run, 1, lambda: told


def make_processor(lab: Lab, directory: pathlib.Path) -> Processor:
  """One whose words are ids: t17 is 17."""
  import tokenizers
  import transformers

  size = lab.network.config.vocab_size
  special = {
    lab.config["image_token_id"]: "<|image_pad|>",
    lab.config["video_token_id"]: "<|video_pad|>",
    lab.config["vision_start_token_id"]: "<|vision_start|>",
    lab.config["vision_end_token_id"]: "<|vision_end|>",
    size - 4: "<|im_end|>",
    size - 3: "<|endoftext|>",
    size - 2: "<unk>",
  }
  words = {special.get(i, f"t{i}"): i for i in range(size)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token="<unk>")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(list(special.values()))
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    unk_token="<unk>",
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    chat_template=(
      "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
      "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
      "<|vision_start|><|image_pad|><|vision_end|>"
      "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    ),
  ).save_pretrained(directory)
  side = lab.layout.patch_size * lab.layout.spatial_merge_size
  half = lab.config["model_type"] == "qwen3_vl"
  clip_mean = [0.48145466, 0.4578275, 0.40821073]
  clip_std = [0.26862954, 0.26130258, 0.27577711]
  (directory / "preprocessor_config.json").write_text(
    json.dumps(
      {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": side**2,
        "max_pixels": 1280 * side**2,
        "patch_size": lab.layout.patch_size,
        "merge_size": lab.layout.spatial_merge_size,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3 if half else clip_mean,
        "image_std": [0.5] * 3 if half else clip_std,
      }
    )
  )
  (directory / "config.json").write_text(json.dumps(lab.config))
  return Processor.from_directory(
    directory,
    min_pixels=None,
    max_pixels=None,
    prompt_suffix="",
    system_prompt=None,
  )


def vision(lab: Lab) -> Work:
  """W5, in pictures."""
  grids = lab.arrays["v_grid"]
  pixels = np.split(lab.arrays["v_pixels"], len(grids))
  image = lab.layout.image_token_id
  questions = [
    lab.question(
      i,
      np.full(grid.prod() // lab.layout.patches_per_token, image),
      patches,
      grid[None],
    )
    for i, (patches, grid) in enumerate(zip(pixels, grids, strict=True))
  ]
  places = [token_places(q.image_grid_thw, lab.layout) for q in questions]
  told: dict[str, Any] = {}

  def run() -> None:
    tokens = lab.encode(questions)
    rows = np.concatenate([t[at] for t, at in zip(tokens, places, strict=True)])
    told["shape"] = list(rows.shape)
    told["mean"] = round(float(rows.mean()), 7)
    told["rms"] = round(float(np.sqrt((rows**2).mean())), 6)
    told["row0"] = [round(float(x), 5) for x in rows[0, :4]]

  return run, len(grids), lambda: told


WORKS = {
  "W1": functools.partial(rollout, limited=False),
  "W2": functools.partial(rollout, limited=True),
  "W3": update,
  "W4": step,
  "W5": vision,
}


# -- timing ----------------------------------------------------------------------


def busy() -> tuple[float, float, float]:
  """Wall seconds, core seconds of the machine, and of this process."""
  try:
    line = pathlib.Path("/proc/stat").read_text().splitlines()[0]
    counts = [int(x) for x in line.split()[1:9]]
    machine = (sum(counts) - counts[3] - counts[4]) / _HZ
  except (OSError, ValueError):
    machine = 0.0
  own = os.times()
  return time.perf_counter(), machine, sum(own[:4])


def lap(since: tuple[float, float, float]) -> tuple[float, float]:
  """Seconds since then, and the share of the cores that others used."""
  wall, machine, own = (a - b for a, b in zip(busy(), since, strict=True))
  return wall, max(0.0, (machine - own) / (wall * (os.cpu_count() or 1)))


def timed(
  run: Callable[[], Any], reps: int, *, longest_wait: float
) -> tuple[list[float], list[float], float]:
  """Walls of the quiet repetitions, others' shares, seconds of the first."""
  started = time.perf_counter()
  run()
  first = time.perf_counter() - started
  return *repeated(run, reps, longest_wait=longest_wait), first


def repeated(
  run: Callable[[], Any], reps: int, *, longest_wait: float
) -> tuple[list[float], list[float]]:
  """Walls of the quiet repetitions of what has run before, others' shares."""
  found: list[tuple[float, float]] = []
  while len(found) < 2 * reps and sum(o <= QUIET for _, o in found) < reps:
    until = time.perf_counter() + longest_wait
    while time.perf_counter() < until:
      since = busy()
      time.sleep(0.5)
      if lap(since)[1] <= QUIET:
        break
    since = busy()
    run()
    found.append(lap(since))
  quiet = [one for one in found if one[1] <= QUIET]
  kept = quiet if len(quiet) >= min(3, reps) else found[:reps]
  return [w for w, _ in kept], [o for _, o in kept]


def machine_limit(
  lab: Lab, work: str, seconds: float, *, longest_wait: float
) -> dict[str, float]:
  """What a repetition needs, what the machine gives, and the share reached."""
  need = operations.of_work(
    work, lab.network, lab.arrays, at_once=lab.microbatch_tokens
  )
  found: list[tuple[float, float]] = []

  def measure() -> None:
    rate = machine.matmul_rate(need.products, lab.dtype)
    found.append((rate, machine.bandwidth()))

  _, others = repeated(measure, 1, longest_wait=longest_wait)
  rate, bandwidth = (max(x) for x in zip(*found, strict=True))
  limit = machine.limit(need, rate, bandwidth)
  return {
    "flops": need.flops,
    "bytes": need.bytes,
    "matmul_gflops": round(rate / 1e9, 2),
    "bandwidth_gb_s": round(bandwidth / 1e9, 2),
    "limit_other_cpu": round(min(others), 3),
    "limit_s": round(limit, 6),
    "share": round(limit / seconds, 4),
  }


def surroundings() -> dict[str, Any]:
  """What a figure depends on besides the work."""
  packages = ("jax", "jaxlib", "flax", "optax", "jaxvlm")
  return {
    "threads": len(os.sched_getaffinity(0)),
    "device": jax.devices()[0].device_kind,
    "load1": round(os.getloadavg()[0], 2),
    "unix": int(time.time()),
    "versions": {"python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in packages},
  }


def device_memory(device: Any) -> dict[str, float]:
  """MB in use at most so far; nothing of a CPU, which does not say."""
  stats = device.memory_stats()
  if not stats:
    return {}
  return {"peak_device_mb": round(stats["peak_bytes_in_use"] / 2**20, 1)}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, help="a folder of --work-dir")
  parser.add_argument("--work", required=True, choices=sorted(METRICS))
  parser.add_argument("--work-dir", required=True, type=pathlib.Path)
  parser.add_argument("--reps", type=int, help="repetitions that count")
  parser.add_argument(
    "--wait",
    type=float,
    default=60.0,
    help="seconds to wait for a quiet machine, before a repetition",
  )
  parser.add_argument("--microbatch_tokens", type=int, default=2048)
  parser.add_argument("--remat", default="dots", choices=models.REMAT)
  parser.add_argument(
    "--compilation_cache",
    default=common.base().compilation_cache,
    metavar="DIR",
    help="of programs, as in a run's config; '': none (default: %(default)s)",
  )
  parser.add_argument("--variant", default="")
  given = parser.parse_args()
  directory = given.work_dir / given.model
  if not (directory / "inputs.npz").is_file():
    sys.exit(
      f"bench: {directory} has no inputs.npz; tools/bench_work.py makes it."
    )
  heap.keep()
  compiling.keep(given.compilation_cache)
  lab = Lab.read(
    directory, microbatch_tokens=given.microbatch_tokens, remat=given.remat
  )
  run, amount, check = WORKS[given.work](lab)
  reps = given.reps or REPS.get(given.model.rpartition("-")[2], 5)
  walls, others, first = timed(run, reps, longest_wait=given.wait)
  values = walls if given.work == "W4" else [amount / w for w in walls]
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  tally = compiling.tally()
  line = {
    "peer": "jaxvlm" + (f":{given.variant}" if given.variant else ""),
    "model": given.model,
    "work": given.work,
    "metric": METRICS[given.work],
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
    "n": len(values),
    "values": [round(v, 5) for v in values],
    "higher_is_better": given.work != "W4",
    "dtype": lab.dtype,
    "remat": given.remat,
    "microbatch_tokens": given.microbatch_tokens,
    "peak_rss_mb": round(peak, 1),
    **device_memory(jax.devices()[0]),
    **surroundings(),
    "walls_s": [round(w, 4) for w in walls],
    "other_cpu": [round(o, 3) for o in others],
    "n_quiet": sum(o <= QUIET for o in others),
    "first_call_s": round(first, 2),
    "compiled": tally.programs - tally.cached,
    "cached": tally.cached,
    "compile_s": round(tally.seconds, 2),
    **machine_limit(
      lab, given.work, statistics.median(walls), longest_wait=given.wait
    ),
    "check": check(),
  }
  print(
    f"{given.model} {given.work}: {line['median']:.4g} {line['metric']} "
    f"({line['min']:.4g} to {line['max']:.4g}, {line['n_quiet']} of {len(walls)} "
    f"quiet), {peak:.0f} MB, {line['share']:.0%} of the machine's limit",
    file=sys.stderr,
  )
  print(json.dumps(line))


if __name__ == "__main__":
  main()
