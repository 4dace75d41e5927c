"""From a config to checked parts: all that can be wrong is said here."""

import dataclasses
import functools
import inspect
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Int

from jaxvlm import (
  checkpoint,
  hosts,
  models,
  paths,
  rewards,
  scratch,
  sharding,
)
from jaxvlm.data import loader
from jaxvlm.data.loader import Loader, Source
from jaxvlm.data.processor import Processor
from jaxvlm.data.rows import Rows, order_keys, select
from jaxvlm.display import Display
from jaxvlm.filling import Known
from jaxvlm.find import find
from jaxvlm.learner import Learner
from jaxvlm.models import Network
from jaxvlm.rollout.sampler import Sampler
from jaxvlm.scoring import Rewards, Scorer, check_rewards
from jaxvlm.stages import Stage, hold_schedule
from jaxvlm.types import Example, Params, Question

_TRIED = 4  # batches of a stage, from which sizes are chosen
# What any data entry of a config has beside its source's own fields.
_ENTRY = (
  *("source", "weight", "filter", "limit", "annotations", "rewards"),
  *("shuffle_options", "report_as"),
)
# The least that a number of the config may be; a stage checks its own.
_LEAST = {
  "inputs.max_prompt_length": 1,
  "sampler.slots": 0,
  "rewards.num_workers": 1,
  "limits.blind_every": 0,
  "limits.programs": 1,
  "limits.heartbeat": 5,  # a sign of life comes each half second
  "checkpoint.every": 1,
  "checkpoint.keep_last": 1,
  "checkpoint.keep_best": 0,
  "log.samples_every": 0,
  "evaluation.every": 0,
  "evaluation.batch_questions": 1,
  "evaluation.num_completions": 1,
  "evaluation.max_completion_length": 1,
  "evaluation.temperature": 0,
  "evaluation.top_k": 0,
}
_POSITIVE = ("rewards.timeout", "evaluation.top_p", "limits.host_wait")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutRows:
  """One capability's held-out rows and the reward that says what is right."""

  capability: str
  source: Source
  examples: Sequence[Example]  # all of them, as they are shown
  questions: Sequence[Question]  # this host's: `loader.questions`
  reward: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A run, ready to start."""

  config: Mapping[str, Any]  # plain; unpacked here but for a few numbers
  workdir: Any  # of paths.path
  checkpoint: pathlib.Path  # HF directory that the run starts from, here
  schedule: tuple[Stage, ...]
  mesh: Mesh
  network: Network
  processor: Processor
  banned: np.ndarray  # bool [V]
  sources: Mapping[str, Mapping[str, Source]]  # by stage, then name
  held_out: Sequence[HeldOutRows]
  dropped: Mapping[str, Mapping[str, int]]  # rows by source, then reason

  @property
  def primary(self) -> bool:
    """Whether this host writes what all hosts know."""
    return jax.process_index() == 0

  @functools.cached_property
  def devices(self) -> dict[str, int]:
    """How many lie along each axis of the mesh, and are of how many processes."""
    return dict(self.mesh.shape) | {"processes": jax.process_count()}

  @functools.cached_property
  def matrix_sizes(self) -> tuple[int, int]:
    """Weights that multiply each token of the decoder, each patch of the tower."""
    sizes = {"decoder": 0, "tower": 0}
    shapes = traverse_util.flatten_dict(self.network.shapes())
    for path, shape in shapes.items():
      if (
        path[-1] == "embedding" and not self.network.config.tie_word_embeddings
      ):
        continue  # a look-up, where there is a head beside it
      part = self.network.part_of(path)
      sizes["decoder" if part == "decoder" else "tower"] += shape.size
    return sizes["decoder"], sizes["tower"]

  @functools.cached_property
  def known(self) -> Known:
    """What the questions to come are like."""
    sizes = [rows.source.sizes for rows in self.held_out]
    for named in self.sources.values():
      sizes += [source.sizes for source in named.values()]
    tokens, patches = np.concatenate(sizes).max(0, initial=0).tolist()
    return Known(tokens, patches, tuple(self._tried()))

  def _tried(self) -> Iterator[Int[np.ndarray, "N 2"]]:
    """Tokens and patches of some batches of a data shard, as they will be."""
    shards = sharding.data_shards(self.mesh)
    rng = np.random.default_rng(0)
    for stage in self.schedule:
      if stage.kind == "sft":
        continue  # nothing is rolled out
      named = list(self.sources[stage.name].values())
      each = stage.rollout_questions // shards
      shares = np.cumsum([source.weight for source in named])
      places = (np.arange(each) + 0.5) / each * shares[-1]
      counts = np.bincount(
        np.searchsorted(shares, places), minlength=len(named)
      )
      for _ in range(_TRIED):
        yield np.concatenate(
          [
            source.sizes[rng.integers(len(source.sizes), size=count)]
            for source, count in zip(named, counts, strict=True)
          ]
        )
    each = self.config["evaluation"]["batch_questions"] // shards
    for rows in self.held_out:
      yield rows.source.sizes[:each]

  def make_sampler(self) -> Sampler:
    """One for all stages and evaluations, whose shapes fit their data."""
    return Sampler(
      network=self.network,
      mesh=self.mesh,
      eos_ids=self.processor.eos_ids,
      pad_id=self.processor.pad_id,
      banned=self.banned,
      layout=self.processor.layout,
      known=self.known,
      slots=self.config["sampler"]["slots"],
    )

  def make_learner(self, stage: Stage) -> Learner:
    return Learner(
      network=self.network,
      mesh=self.mesh,
      banned=self.banned,
      frozen=stage.freeze,
      optimizer=stage.make_optimizer(),
      objective=stage.make_objective(),
    )

  def make_loader(self, index: int) -> Loader:
    """The stream of questions of the stage at this place of the schedule."""
    stage = self.schedule[index]
    return Loader(
      self.sources[stage.name],
      self.processor,
      batch_size=stage.rollout_questions,
      seed=self.config["seed"],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      shuffle=stage.shuffle,
      total=stage.steps * stage.rollout_questions if stage.order else None,
    )

  def abstract_params(self) -> Params:
    """Shapes, dtypes and shardings of the network's weights."""
    network = self.network
    return sharding.abstract(self.mesh, network.shapes(), network.axes())

  def load_params(self, display: Display) -> Params:
    """The weights of the checkpoint.

    Raises:
      ValueError: they are no weights of this network; says which are not.
    """
    like = self.abstract_params()
    saved = self.checkpoint / models.ORBAX
    if saved.is_dir() and paths.remote(self.config["model"]["checkpoint"]):
      saved = paths.path(self.config["model"]["checkpoint"]) / models.ORBAX
    count = sum(leaf.size for leaf in jax.tree.leaves(like))
    with display.task("load the checkpoint", total=count) as advance:
      if saved.is_dir():
        return checkpoint.load_params(saved, like)
      return models.load_params(
        self.network, self.checkpoint, self.mesh, advance
      )

  def make_scorer(
    self, rewards: Rewards, row_rewards: Iterable[str] = ()
  ) -> Scorer:
    return Scorer(
      rewards=rewards, row_rewards=row_rewards, **self.config["rewards"]
    )


def prepare(config: Mapping[str, Any], workdir: Any, display: Display) -> Job:
  """Reads and checks everything before any compute is spent.

  Raises:
    ValueError: what is wrong in config, data or checkpoint, and the remedy.
  """
  schedule = _schedule(config)
  mesh = sharding.make_mesh(**config["mesh"])
  for stage in schedule:
    stage.check_shards(sharding.data_shards(mesh), jax.process_count())
  _check_evaluation(config, schedule, sharding.data_shards(mesh))

  attention = models.choose_attention(config["model"]["attention"])
  directory = _checkpoint(config["model"], config["seed"], workdir, display)
  network = models.load_network(
    directory,
    dtype=config["model"]["dtype"],
    param_dtype=config["model"]["param_dtype"],
    remat=config["model"]["remat"],
    attention=attention,
  )
  display.print(f"Attention on {sharding.backend()}: {attention}.")
  found = sharding.whole(mesh, network.shapes(), network.axes())
  for axis, sizes in found.items():
    display.print(
      f"Mesh: {', '.join(map(str, sizes))} of {axis!r} do not divide among "
      f"{sharding.RULES[axis]!r}; each device holds them whole."
    )
  models.check_tensors(network, directory)
  inputs = dict(config["inputs"])
  longest = inputs.pop("max_prompt_length")
  processor = dataclasses.replace(
    Processor.from_directory(directory, **inputs),
    box_side=models.find_family(network.config.model_type).BOX_SIDE,
  )

  job = Job(
    config=config,
    workdir=workdir,
    checkpoint=directory,
    schedule=schedule,
    mesh=mesh,
    network=network,
    processor=processor,
    banned=processor.banned_ids(network.config.vocab_size),
    sources={},
    held_out=(),
    dropped={},
  )
  for stage in schedule:
    try:
      job.make_learner(stage)
      stage.make_optimizer().make({})
    except ValueError as error:
      raise ValueError(f"stages.{stage.name}: {error}") from error
    rounds = config["model"]["param_dtype"] == "bfloat16"
    if rounds and not stage.optimizer["compensated"]:
      raise ValueError(
        f"stages.{stage.name}.optimizer.compensated: got False, and "
        "model.param_dtype is bfloat16, which would round most updates away; "
        "expected True, or float32 weights."
      )
  return _with_rows(job, _Opener(processor, longest, display))


def _with_rows(job: Job, open_source: "_Opener") -> Job:
  """The job with the rows of its stages and held-out sets, all checked."""
  sources = {
    stage.name: {
      name: open_source(
        f"stages.{stage.name}.data.{name}",
        entry,
        stage.max_completion_length if stage.kind == "sft" else None,
        stage.order,
      )
      for name, entry in stage.data.items()
    }
    for stage in job.schedule
  }
  held_out = []
  for capability in job.config["evaluation"]["capabilities"]:
    entry = job.config["evaluation"]["sets"][capability]
    field = f"evaluation.sets.{capability}.data"
    rows = open_source(field, entry["data"], None, "")
    examples = loader.shown(rows, job.config["seed"])
    held_out.append(
      HeldOutRows(
        capability=capability,
        source=rows,
        examples=examples,
        questions=loader.questions(
          rows,
          examples,
          job.processor,
          process_index=jax.process_index(),
          process_count=jax.process_count(),
        ),
        reward=entry["reward"],
      )
    )
  return dataclasses.replace(
    job, sources=sources, held_out=held_out, dropped=open_source.dropped
  )


def check_numbers(config: Mapping[str, Any]) -> None:
  """Raises ValueError for the first number that cannot be, by its field."""
  for path, value in traverse_util.flatten_dict(config).items():
    if not isinstance(value, int | float):
      continue
    field, expected = ".".join(map(str, path)), ""
    if not math.isfinite(value):
      expected = "a finite number"
    elif value < _LEAST.get(field, value):
      expected = f"{_LEAST[field]} or more"
    elif field in _POSITIVE and value <= 0:
      expected = "more than 0"
    if expected:
      raise ValueError(f"{field}: got {value}; expected {expected}.")


def _schedule(config: Mapping[str, Any]) -> tuple[Stage, ...]:
  """The stages in order; names, sizes, rewards and hand-offs checked."""
  names = config["schedule"]
  if isinstance(names, str) or not names:
    raise ValueError(
      f"schedule: got {names!r}; expected a tuple of stage names, of "
      f"{', '.join(config['stages'])}."
    )
  unknown = [name for name in names if name not in config["stages"]]
  if unknown:
    raise ValueError(
      f"schedule: no stage {unknown[0]!r}; there are "
      f"{', '.join(config['stages'])}."
    )
  if len(set(names)) < len(names):
    raise ValueError(f"schedule: {names} names a stage twice; copy it.")
  stages = tuple(Stage(name=name, **config["stages"][name]) for name in names)
  stages = hold_schedule(stages, config["hold_schedule"])
  for before, stage in zip((None, *stages), stages, strict=False):
    field = f"stages.{stage.name}"
    _check_rewards(f"{field}.rewards", stage.rewards)
    for name, entry in stage.data.items():
      own = entry.get("rewards", ())
      _check_rewards(f"{field}.data.{name}.rewards", own)
      if not (weight := entry.get("weight", 1.0)) > 0:
        raise ValueError(
          f"{field}.data.{name}.weight: got {weight}; expected more than 0. To "
          f"leave it out, set {field}.data to the others."
        )
    if stage.reset_optimizer or before is None:
      continue
    if (before.optimizer, before.freeze) != (stage.optimizer, stage.freeze):
      raise ValueError(
        f"stages.{stage.name}.reset_optimizer: got False, but optimizer or "
        f"freeze differ from those of {before.name}; make them equal or reset."
      )
  return stages


def _check_rewards(field: str, rewards: Rewards) -> None:
  try:
    check_rewards(rewards)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{field}: got {rewards!r}; expected (name, weight) of each, as "
      f"(('exact', 1.0),): {error}"
    ) from error
  for name, _ in rewards:
    _check_reward(field, name)


def _check_reward(field: str, name: str) -> None:
  try:
    rewards.load(name)
  except ValueError as error:
    raise ValueError(f"{field}: {error}") from error
  except Exception as error:  # the user's code: anything
    raise ValueError(
      f"{field}: {name} fails as it is imported: "
      f"{type(error).__name__}: {error}."
    ) from error


def _check_evaluation(
  config: Mapping[str, Any], schedule: Sequence[Stage], shards: int
) -> None:
  evaluation = config["evaluation"]
  if evaluation["batch_questions"] % shards:
    raise ValueError(
      f"evaluation.batch_questions: got {evaluation['batch_questions']}; "
      f"expected a multiple of the {shards} data shards."
    )
  for name in evaluation["capabilities"]:
    if name not in evaluation["sets"]:
      raise ValueError(
        f"evaluation.capabilities: no set {name!r}; there are "
        f"{', '.join(evaluation['sets'])}."
      )
    field = f"evaluation.sets.{name}.reward"
    _check_reward(field, evaluation["sets"][name]["reward"])
    if own := evaluation["sets"][name]["data"].get("rewards", ()):
      raise ValueError(
        f"evaluation.sets.{name}.data.rewards: got {own!r}; what is right is "
        f"said by evaluation.sets.{name}.reward alone."
      )
  for stage in schedule:
    if stage.promote == "latest":
      continue
    capability = stage.metric.partition("/")[0]
    if not evaluation["every"] or capability not in evaluation["capabilities"]:
      raise ValueError(
        f"stages.{stage.name}.promote: best needs evaluation.every > 0 and a "
        f"metric of one of {evaluation['capabilities']}, as "
        f"'capability/mean@{evaluation['num_completions']}'; got every = "
        f"{evaluation['every']}, metric = {stage.metric!r}."
      )


def _checkpoint(
  model: Mapping[str, Any], seed: int, workdir: Any, display: Display
) -> pathlib.Path:
  """The HF directory to start from; made first where the config says so.

  One in a bucket is copied here, but for what Orbax reads there itself.
  """
  for field in ("dtype", "param_dtype"):
    if model[field] not in ("float32", "bfloat16"):
      raise ValueError(
        f"model.{field}: got {model[field]!r}; expected float32 or bfloat16."
      )
  models.check_remat(model["remat"])
  if model["checkpoint"]:
    given = paths.path(model["checkpoint"])
    if not given.is_dir():
      raise ValueError(
        f"model.checkpoint: got {model['checkpoint']!r}; no such directory. "
        "Nothing is downloaded here: `hf download Qwen/Qwen3-VL-8B-Instruct "
        "--local-dir DIR` makes a directory to give."
      )
    return paths.local(given, leave=(models.ORBAX,))
  if not model["scratch"]:
    raise ValueError(
      "model.checkpoint: got ''; expected a Hugging Face directory of a "
      "Qwen-VL model (config.json, *.safetensors, tokenizer)."
    )
  directory = workdir / "scratch"
  # Before the run's config was found right, another may have made this.
  made = directory.exists() and (workdir / "config.json").exists()
  if not made and jax.process_index() == 0:
    paths.remove(directory)
    made_with = model["scratch"]
    with display.task(
      "make a checkpoint", total=made_with["tower_steps"]
    ) as advance:
      scratch.make_checkpoint(
        directory, seed=seed, progress=advance, **made_with
      )
  hosts.wait()  # for the first, which makes it
  return paths.local(directory)


@dataclasses.dataclass
class _Opener:
  """Opens sources, inspects their rows and counts what is dropped."""

  processor: Processor
  longest: int
  display: Display
  dropped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

  def __call__(
    self,
    field: str,
    entry: Mapping[str, Any],
    longest_response: int | None,
    order: str,
  ) -> Source:
    if missing := sorted(set(_ENTRY) - entry.keys()):
      raise ValueError(
        f"{field}: has no {', '.join(missing)}; common.data of "
        "configs/common.py gives an entry all its fields."
      )
    name, weight, filter, limit, annotations, rewards, mixed, report_as = (
      entry[field] for field in _ENTRY
    )
    arguments = {k: v for k, v in entry.items() if k not in _ENTRY}
    source = find("data.sources", name, "source")
    try:
      inspect.signature(source).bind(**arguments)
    except TypeError as error:
      raise ValueError(f"{field}: source {name!r}: {error}.") from error
    rows = Rows(
      source(**arguments),
      annotations=annotations,
      rewards=rewards,
      report_as=report_as,
    )
    chosen = select(
      rows,
      name=field,
      filter=filter,
      limit=limit,
      shuffle_options=mixed,
      watch=self.display.progress,
    )
    found = loader.inspect(
      rows,
      chosen.rows,
      self.processor,
      name=field,
      max_prompt_length=self.longest,
      max_response_length=longest_response,
      watch=self.display.progress,
    )
    if dropped := chosen.dropped | found.dropped:
      self.dropped[field] = dropped
      counts = ", ".join(f"{n} {why}" for why, n in dropped.items())
      self.display.print(f"{field}: dropped {counts}; {len(found.kept)} stay.")
    keys = None
    if order:
      keys = order_keys(rows, found.kept, name=f"{field}: order", order=order)
    return Source(
      *(weight, rows, found.kept, found.row_ids, found.sizes, keys, mixed)
    )
