"""How long a step takes: each program's bound, and how often it runs.

A program takes as long as what it needs most of: products at the chip's rate,
HBM traffic at its bandwidth, or what it receives from other chips. That is a
bound from below, of which a share is reached (`efficiency`). The host, rewards
and what a program launch costs are left out.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from jaxvlm.plan import batch
from jaxvlm.plan.chips import Chip
from jaxvlm.plan.compiler import Compiled, size
from jaxvlm.plan.programs import FIRST_COLUMNS, Run, microbatches, policies
from jaxvlm.rollout import schedule

FORWARD, BACKWARD = 4, 10  # operations for a pair and number of a head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
  """A program within a step."""

  name: str
  calls: float  # a step
  compute: float  # seconds a call, at the chip's rates
  hbm: float
  ici: float

  @property
  def bound(self) -> str:
    return max(("compute", "hbm", "ici"), key=lambda name: getattr(self, name))

  @property
  def seconds(self) -> float:
    """Of all calls."""
    return self.calls * max(self.compute, self.hbm, self.ici)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A step."""

  programs: tuple[Timed, ...]
  efficiency: float
  generated: int  # tokens a step, over all chips
  chips: int

  @property
  def seconds(self) -> float:
    return sum(one.seconds for one in self.programs) / self.efficiency

  @property
  def tokens_per_second(self) -> float:
    """Generated, a chip."""
    return self.generated / self.seconds / self.chips

  @property
  def largest(self) -> Timed:
    return max(self.programs, key=lambda one: one.seconds)


def estimate(
  run: Run, compiled: Sequence[Compiled], chip: Chip, efficiency: float
) -> Estimate:
  """The time of a step of the stage at the run's mean lengths."""
  named = {one.name: one for one in compiled}
  refills = "admit" in named
  counts = calls(run, refills=refills)
  attention = attention_flops(run, prefills=counts.get("prefill", 1))
  programs = []
  for one in compiled:
    if one.name == "decode":
      first = named.get(FIRST_COLUMNS, one)
      programs.append(
        _decoding(decoded(run, refills=refills), run, one, first, chip)
      )
    elif count := counts.get(one.name, 0.0):
      more = attention.get(one.name, 0.0)
      programs.append(
        Timed(name=one.name, calls=count, **_seconds(one, chip, more))
      )
  stage = run.stage
  return Estimate(
    programs=tuple(programs),
    efficiency=efficiency,
    generated=stage.rollout_questions
    * stage.num_completions
    * run.lengths.completion,
    chips=run.mesh.size,
  )


def _seconds(one: Compiled, chip: Chip, flops: float = 0.0) -> dict[str, float]:
  """Of a call, by what bounds it; `flops` are those that its HLO does not show."""
  return {
    "compute": (one.cost.flops + flops) / chip.flops,
    "hbm": one.cost.bytes / chip.bandwidth,
    "ici": sum(x.turns * x.bytes for x in one.cost.collectives) / chip.links,
  }


def _decoding(
  steps: Sequence[tuple[int, int, int, int]],
  run: Run,
  full: Compiled,
  first: Compiled,
  chip: Chip,
) -> Timed:
  """Decoding: tokens of a step, and what one needs in the mean.

  A shape of fewer rows reads the weights as before and less of the caches; what
  a step needs grows with the columns in a line from the first to all of them.
  """
  widths = list(schedule.cache_columns(run.stage.max_completion_length))
  at_once, _ = in_flight(run)
  rows = at_once * run.stage.num_completions
  count, found = 0, dict.fromkeys(("compute", "hbm", "ici"), 0.0)
  ends = [
    (_seconds(one, chip), _weights_share(run, one)) for one in (first, full)
  ]
  for blocks, slots, columns, tokens in steps:
    share = 1.0
    if len(widths) > 1:
      share = (columns - widths[0]) / (widths[-1] - widths[0])
    count += tokens
    for part, (seconds, weights) in zip((1 - share, share), ends, strict=True):
      of_rows = weights + (1 - weights) * blocks * slots / rows
      for name in found:
        found[name] += tokens * part * of_rows * seconds[name]
  each = {name: seconds / count for name, seconds in found.items()}
  return Timed(name=full.name, calls=count, **each)


def calls(run: Run, *, refills: bool) -> Mapping[str, float]:
  """How often each program runs in a step, all but decoding.

  Args:
    run: whose.
    refills: as `schedule.refills` says.
  """
  stage, lengths = run.stage, run.lengths
  updates = stage.updates_per_rollout
  micro = microbatches(run)[0].groups.shape[0] * updates
  looks = 0
  if run.reference_looks:
    looks = microbatches(run, looks=True)[0].groups.shape[0] * updates
  each = stage.rollout_questions // run.shards
  patches = each * lengths.visual * run.layout.patches_per_token
  lane = max(lengths.most_visual * run.layout.patches_per_token, 1)
  lanes = max(-(-patches // (4 * lane)), 1)
  found = {
    "tower": lanes,  # where it is asked by itself
    "zeros": stage.updates_per_rollout,
    "gradient": micro,
    "optimizer step": stage.updates_per_rollout,
  }
  if stage.kind == "sft":
    return found
  at_once, fresh = in_flight(run)
  waves = -(-each // at_once)
  more = -(-(each - at_once) // fresh)
  return found | {
    "decode weights: around": 1,
    "decode weights": run.network.config.text_config.num_hidden_layers,
    "merger": lanes,
    "prefill": 1 if refills else waves,
    "admit: prefill": more,
    "admit": more,
    "logprobs": policies(run) * micro,
    "logprobs: reference": looks,
  }


def in_flight(run: Run) -> tuple[int, int]:
  """Blocks of a data shard that decode at once, and are admitted together."""
  stage, shards = run.stage, run.shards
  return schedule.in_flight(
    run.slots,
    shards=shards,
    each=stage.rollout_questions // shards,
    group=stage.num_completions,
  )


def decoded(run: Run, *, refills: bool) -> list[tuple[int, int, int, int]]:
  """(blocks, slots, columns, tokens) of each shape of a data shard's decoding."""
  each = run.stage.rollout_questions // run.shards
  group = run.stage.num_completions
  at_once, fresh = in_flight(run)
  lengths = batch.completion_lengths(each * group, run.lengths)
  lengths = np.random.default_rng(0).permutation(lengths).reshape(each, group)
  shapes = list(schedule.ladder(each, (at_once, group)))
  together = each if refills else at_once
  found: list[tuple[int, int, int, int]] = []
  for i in range(0, each, together):
    steps = decode_steps(lengths[i : i + together], at_once, fresh, shapes)
    found += with_columns(steps, run.stage.max_completion_length)
  return found


def with_columns(
  steps: Sequence[tuple[int, int, int]], longest: int
) -> Iterator[tuple[int, int, int, int]]:
  """(blocks, slots, columns, tokens): of the caches, as they grow meanwhile."""
  *less, all_columns = schedule.cache_columns(longest)
  clock = 0
  for blocks, slots, tokens in steps:
    ends = clock + tokens
    for columns in less:
      if clock < min(columns, ends):
        yield blocks, slots, columns, min(columns, ends) - clock
        clock = min(columns, ends)
    if clock < ends:
      yield blocks, slots, all_columns, ends - clock
      clock = ends


def _weights_share(run: Run, decode: Compiled) -> float:
  """Of a decode step's traffic, what reads weights."""
  weights = decode.held["weights"]
  read = size(weights)
  if not run.network.config.tie_word_embeddings:
    read -= size(weights["language_model"]["embed_tokens"])  # few rows of it
  return min(read / decode.cost.bytes, 1.0)


def decode_steps(
  lengths: Int[np.ndarray, "Q G"],
  at_once: int,
  fresh: int,
  ladder: list[tuple[int, int]],
) -> list[tuple[int, int, int]]:
  """(blocks, slots, tokens) of each shape in which a data shard decodes.

  As the sampler does: while questions wait, so many blocks as end at a time
  are admitted; then the rows that are left go on in smaller shapes.

  Args:
    lengths: of the completions of a data shard.
    at_once: blocks.
    fresh: blocks that are admitted together.
    ladder: of `schedule.ladder`.
  """
  left = lengths[:at_once].copy()
  waiting, group, steps = at_once, lengths.shape[1], 0
  while waiting < len(lengths):
    ends = np.sort(left.max(1))[fresh - 1]
    left, steps = left - ends, steps + ends
    free = np.argsort(left.max(1), kind="stable")[:fresh]
    more = lengths[waiting : waiting + fresh]
    left[free[: len(more)]] = more
    left[free[len(more) :]] = 0
    waiting += fresh
  shape, found = (at_once, group), []
  for enough, width in [*ladder, (0, 1)]:
    for ends in np.unique(np.append(np.maximum(left, 0), 0)):
      if (-(-(left > ends).sum(1) // width)).sum() <= enough:
        break
    found.append((*shape, int(ends + steps)))
    left, shape, steps = left - ends, (enough, width), 0
  return found


def attention_flops(run: Run, *, prefills: float) -> Mapping[str, float]:
  """Operations on a chip within fused kernels, which the HLO does not show.

  Args:
    run: whose.
    prefills: calls that read the prompts of a step.
  """
  if run.network.attention == "plain":
    return {}
  text, tower = run.network.config.text_config, run.network.config.vision_config
  split = run.mesh.shape["tensor"]
  if text.num_key_value_heads % split:
    split = 1  # all heads on each chip
  width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
  patches = run.lengths.visual * run.layout.patches_per_token
  full = len(getattr(tower, "fullatt_block_indexes", range(tower.depth)))
  picture = patches**2 * full * tower.hidden_size

  def pairs(*, looks: bool) -> float:
    """Of numbers of a query and a key that sees it, in a microbatch."""
    plan, asked, mask = microbatches(run, looks=looks)
    own = np.array([len(q.prompt_ids) for q in asked])
    length = mask.sum(-1)
    found = float(
      (own * (own + 1) / 2).sum()
      + (length * own[:, None] + length * (length + 1) / 2).sum()
    )
    found *= width / split
    if looks or "vision_tower" not in run.stage.freeze:
      found += len(asked) * picture
    return found / plan.groups.shape[0] / run.shards

  own = np.array([len(q.prompt_ids) for q in microbatches(run)[1]])
  each = run.stage.rollout_questions / run.shards
  read = each * float(np.mean(own * (own + 1) / 2)) * width / split
  again = run.network.remat == "full"
  update = pairs(looks=False)
  looked = FORWARD * pairs(looks=True) if run.reference_looks else 0.0
  return {
    "prefill": FORWARD * read / prefills,
    "logprobs": FORWARD * update,
    "logprobs: reference": looked,
    "gradient": (FORWARD * (1 + again) + BACKWARD) * update,
  }
