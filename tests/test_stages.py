"""A stage's knobs: what is refused, and what a learning rate is when."""

import math

import pytest

from jaxvlm.stages import Ledger, Stage, hold_schedule

OPTIMIZER = {
  "name": "adamw",
  "b1": 0.9,
  "b2": 0.999,
  "weight_decay": 0.0,
  "clip_norm": 1.0,
  "compensated": False,
}


def make_stage(**changes):
  return Stage(
    **{
      "name": "seeing",
      "kind": "grpo",
      "data": {"rows": {"source": "files", "weight": 1.0}},
      "shuffle": True,
      "order": "",
      "rewards": (("exact", 1.0),),
      "steps": 10,
      "rollout_questions": 16,
      "max_rollouts": 1,
      "update_questions": 16,
      "updates_per_rollout": 2,
      "microbatch_tokens": 64,
      "num_completions": 4,
      "max_completion_length": 32,
      "temperature": 0.8,
      "advantage": {"name": "grpo", "eps": 1e-6},
      "surrogate": {
        "name": "clip",
        "clip_low": 0.2,
        "clip_high": 0.3,
        "clip_dual": 3.0,
      },
      "aggregation": "token",
      "mask_truncated": False,
      "importance": None,
      "importance_cap": 2.0,
      "entropy_coef": 0.0,
      "kl_coef": 0.01,
      "kl_estimator": "k3",
      "kl_limit": 20.0,
      "kl_target": "loss",
      "reference": "stage_start",
      "freeze": (),
      "optimizer": OPTIMIZER,
      "reset_optimizer": True,
      "learning_rate": 1e-3,
      "lr_schedule": "constant",
      "lr_warmup": 0,
      "lr_final": 0.0,
      "promote": "latest",
      "metric": "",
      "logprob_chunk": 64,
    }
    | changes
  )


@pytest.mark.parametrize(
  ("changes", "got", "expected"),
  [
    ({"kind": "ppo"}, "kind: got 'ppo'", "expected one of grpo, sft"),
    (
      {"reference": "start"},
      "reference: got 'start'",
      "expected one of stage_start, base, none",
    ),
    (
      {"lr_schedule": "step"},
      "lr_schedule: got 'step'",
      "expected one of constant, linear, cosine",
    ),
    (
      {"promote": "first"},
      "promote: got 'first'",
      "expected one of latest, best",
    ),
    (
      {
        "kl_target": "reward",
        "advantage": {"name": "gdpo", "eps": 0.1},
      },
      "kl_target: got 'reward'",
      "gdpo normalises each reward by itself; expected loss",
    ),
    (
      {"kl_target": "both"},
      "kl_target: got 'both'",
      "expected one of loss, reward",
    ),
    ({"kl_estimator": "k4"}, "kl_estimator: got 'k4'", "one of k1, k2, k3"),
    (
      {"aggregation": "mean"},
      "aggregation: got 'mean'",
      "expected one of token, sequence, sequence_sum, fixed",
    ),
    (
      {"importance": "token"},
      "importance: got 'token'",
      "expected one of None, token_truncate",
    ),
    (
      {"advantage": {"name": "ppo"}},
      "advantage: got {'name': 'ppo'}",
      "expected a name, one of grpo, dr_grpo, rloo, batch_std, gdpo",
    ),
    (
      {"advantage": {"name": "rloo", "eps": 0.1}},
      "advantage: got {'name': 'rloo', 'eps': 0.1}",
      "rloo takes nothing else",
    ),
    (
      {"surrogate": {"name": "gspo", "clip_low": 0.1}},
      "surrogate: got {'name': 'gspo', 'clip_low': 0.1}",
      "gspo takes clip_high, clip_low",
    ),
    ({"max_rollouts": 0}, "max_rollouts: got 0", "expected at least 1"),
    (
      {"max_rollouts": 2, "update_questions": 8},
      "max_rollouts: got 2",
      "rollout_questions = update_questions; expected 1",
    ),
    ({"steps": 0}, "steps: got 0", "expected at least 1"),
    (
      {"microbatch_tokens": 0},
      "microbatch_tokens: got 0",
      "expected at least 1",
    ),
    ({"logprob_chunk": -1}, "logprob_chunk: got -1", "expected at least 1"),
    ({"kl_coef": -0.1}, "kl_coef: got -0.1", "expected 0 or more"),
    ({"lr_warmup": -1}, "lr_warmup: got -1", "expected 0 or more"),
    (
      {"learning_rate": math.nan},
      "learning_rate: got nan",
      "expected 0 or more",
    ),
    ({"order": "-f()"}, "order: got '-f()'", "is not taken in an expression"),
    ({"data": {}}, "data: got {}", "expected at least one source"),
    (
      {"num_completions": 1},
      "num_completions: got 1",
      "fewer than 2 has no advantage; expected 2 or more",
    ),
    ({"temperature": 0.0}, "temperature: got 0.0", "expected > 0"),
    ({"rewards": ()}, "rewards: got ()", "expected at least one"),
    (
      {"update_questions": 24},
      "update_questions: got 24",
      "expected at most rollout_questions = 16",
    ),
    (
      {"update_questions": 9},
      "update_questions: got 9",
      "expected a multiple of updates_per_rollout = 2",
    ),
    (
      {"reference": "none"},
      "kl_coef: got 0.01",
      "reference is none; expected 0",
    ),
    (
      {"kind": "sft", "update_questions": 8},
      "update_questions: got 8",
      "sft trains on all it reads",
    ),
  ],
)
def test_a_wrong_value_is_refused_by_name(changes, got, expected):
  with pytest.raises(ValueError) as error:
    make_stage(**changes)
  assert str(error.value).startswith(f"stages.seeing.{got}; ")
  assert expected in str(error.value)


def test_a_missing_or_misspelt_field_is_a_type_error():
  with pytest.raises(TypeError, match="temprature"):
    make_stage(temprature=1.0)
  with pytest.raises(TypeError, match="missing"):
    Stage(name="seeing", kind="grpo")


def test_data_may_bring_its_own_rewards_in_place_of_the_stages():
  own = {
    "a": {"source": "files", "rewards": (("exact", 1.0), ("format", 0.1))},
    "b": {"source": "files", "rewards": (("math", 1.0),)},
  }
  stage = make_stage(data=own, rewards=())
  assert stage.row_rewards == ["exact", "format", "math"]
  with pytest.raises(ValueError, match="unless each data entry has its own"):
    make_stage(data=own | {"c": {"source": "files"}}, rewards=())


def test_what_sft_does_not_read_may_be_anything():
  stage = make_stage(kind="sft", num_completions=1, temperature=0.0, rewards=())
  assert stage.make_objective().temperature == 1.0


@pytest.mark.parametrize(
  ("changes", "hosts", "message"),
  [
    ({}, 3, "rollout_questions: got 16; expected a multiple of 3 "),
    (
      {"update_questions": 8, "rollout_questions": 16},
      8,
      r"update_questions: got 8; expected a multiple of 16 \(8 hosts, 2 updates",
    ),
  ],
)
def test_questions_that_mesh_or_hosts_do_not_divide_are_refused(
  changes, hosts, message
):
  make_stage(**changes).check_shards(8, 2)
  with pytest.raises(ValueError, match=message):
    make_stage(**changes).check_shards(hosts, hosts)


@pytest.mark.parametrize(
  ("changes", "rates"),
  [
    ({}, {0: 1.0, 19: 1.0}),
    ({"lr_warmup": 0.2}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 19: 1.0}),
    ({"lr_warmup": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 19: 1.0}),
    ({"lr_schedule": "linear"}, {0: 1.0, 5: 0.75, 10: 0.5, 19: 0.05}),
    (
      {"lr_schedule": "linear", "lr_final": 0.2, "lr_warmup": 4},
      {0: 0.25, 4: 1.0, 12: 0.6, 16: 0.4},
    ),
    (
      {"lr_schedule": "cosine"},
      {0: 1.0, 5: 0.5 + math.sqrt(2) / 4, 10: 0.5, 15: 0.5 - math.sqrt(2) / 4},
    ),
    ({"lr_schedule": "cosine", "lr_final": 0.1}, {10: 0.55}),
  ],
)
def test_learning_rates_are_those_made_by_hand(changes, rates):
  """10 steps of 2 updates: 20 updates in all."""
  stage = make_stage(**changes)
  for update, rate in rates.items():
    assert stage.learning_rate_at(update) == pytest.approx(1e-3 * rate)


def test_a_warmup_as_long_as_the_stage_never_divides_by_zero():
  stage = make_stage(lr_schedule="linear", lr_warmup=20)
  assert stage.learning_rate_at(19) == pytest.approx(1e-3)
  assert stage.learning_rate_at(20) == pytest.approx(1e-3)


def held(*stages):
  return hold_schedule(stages, [stage.name for stage in stages])


def all_rates(stages):
  return [
    stage.learning_rate_at(update)
    for stage in stages
    for update in range(stage.updates)
  ]


@pytest.mark.parametrize("lr_schedule", ["constant", "linear", "cosine"])
def test_held_stages_have_the_learning_rates_of_one_long_stage(lr_schedule):
  knobs = {"lr_schedule": lr_schedule, "lr_warmup": 3, "lr_final": 0.1}
  short = make_stage(name="first", steps=4, **knobs)
  long = make_stage(name="second", steps=7, **knobs)
  whole = make_stage(steps=11, **knobs)
  assert all_rates(held(short, long)) == all_rates([whole])
  assert all_rates(held(long, short)) == all_rates([whole])
  assert all_rates([short, long]) != all_rates([whole])  # warm-up comes twice


def test_held_stages_hand_the_optimizer_on():
  warm, *others = (make_stage(name=name) for name in ("warm", "a", "b", "c"))
  stages = hold_schedule((warm, *others), ("a", "b", "c"))
  assert [stage.reset_optimizer for stage in stages] == [
    True,
    True,
    False,
    False,
  ]
  assert stages[0] == warm
  assert hold_schedule((warm, *others), ()) == (warm, *others)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "c"), ("a", "x"), ("x",)])
def test_stages_are_held_only_where_they_follow_one_another(names):
  stages = [make_stage(name=name) for name in "abc"]
  with pytest.raises(
    ValueError, match=r"hold_schedule: got .*follow one another"
  ):
    hold_schedule(stages, names)


def test_stages_of_different_learning_rates_are_not_held():
  stages = make_stage(name="a"), make_stage(name="b", learning_rate=2e-3)
  with pytest.raises(
    ValueError, match=r"stages.a.learning_rate is 0.001, that of b 0.002"
  ):
    held(*stages)


def test_training_rollouts_draw_from_the_distribution_that_is_trained():
  stage = make_stage()
  draws, objective = stage.make_draws(), stage.make_objective()
  assert (draws.top_k, draws.top_p) == (0, 1.0)
  assert draws.temperature == objective.temperature == 0.8
  assert (draws.num_completions, draws.max_completion_length) == (4, 32)
  assert dict(objective.surrogate) == stage.surrogate
  assert objective.kl_coef == 0.01


def test_a_kl_term_in_the_reward_is_none_in_the_loss():
  stage = make_stage(kl_target="reward", updates_per_rollout=1)
  assert stage.make_objective().kl_coef == 0.0
  assert stage.asks_old_logprobs
  assert not make_stage(updates_per_rollout=1).asks_old_logprobs


def test_the_optimizer_is_what_the_config_names():
  assert make_stage().make_optimizer().b2 == 0.999
  with pytest.raises(TypeError, match="lr"):
    make_stage(optimizer=OPTIMIZER | {"lr": 1.0}).make_optimizer()


def test_a_ledger_adds_up_what_it_knows():
  ledger = Ledger()
  ledger.add(questions=4, updates=1)
  ledger.add(questions=4, model_flops=2.5)
  assert (ledger.questions, ledger.updates) == (8, 1)
  assert (ledger.model_flops, ledger.patches) == (2.5, 0)
  with pytest.raises(AttributeError, match="epochs"):
    ledger.add(epochs=1)
