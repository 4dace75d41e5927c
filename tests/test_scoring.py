"""scoring.py: rewards in processes that can be killed."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from jaxvlm.scoring import Scorer, briefly
from jaxvlm.types import Example

REWARDS = """
import os, sys, time

def length(completion, example):
  return len(completion)

def share(completion, example, *, of):
  return len(completion) / of

def tokens(completion, example):
  return example.completion_tokens

def width(completion, example):
  (size,) = example.box_sizes
  return size[1] + example.picture_sizes[0][1] / 1000

def jax_free(completion, example):
  return float("jax" not in sys.modules and example.images == ())

def pid(completion, example):
  return os.getpid()

def bad(completion, example):
  if completion == "sleep":
    time.sleep(60)
  if completion == "lock":  # holds the interpreter lock, deaf to signals
    (10 ** 9) ** (10 ** 9)
  if completion == "raise":
    raise KeyError("gone")
  if completion == "exit":
    os._exit(3)
  return {"nan": float("nan"), "none": None}.get(completion, 1)
"""


def rows(count):
  return [
    Example(problem="?", answer="3", name=f"set.jsonl:{i}")
    for i in range(count)
  ]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("rewards") / "mine.py"
  path.write_text(REWARDS)
  return path


def alive(pid):
  status = pathlib.Path(f"/proc/{pid}/stat")
  return status.exists() and status.read_text().split()[2] != "Z"


def gone_within(pid, seconds):
  until = time.monotonic() + seconds
  while alive(pid) and time.monotonic() < until:
    time.sleep(0.05)
  return not alive(pid)


def test_a_row_with_rewards_of_its_own_is_scored_by_these_alone(file):
  length, share = f"{file}:length", f"{file}:share(of=2)"
  examples = [
    dataclasses.replace(row, rewards=own)
    for row, own in zip(
      rows(4),
      ((), ((length, 2.0), ("exact", 0.5)), ((share, -1.0),), ()),
      strict=True,
    )
  ]
  with Scorer(
    rewards=(("exact", 1.0), ("format", 0.1)),
    num_workers=2,
    timeout=20.0,
    row_rewards=[length, "exact", share],
  ) as scorer:
    scores = scorer.score([["\\boxed{3}", "3"]] * 4, examples)
    other = dataclasses.replace(rows(1)[0], rewards=(("math", 1.0),))
    with pytest.raises(ValueError, match=r"jsonl:0: its reward 'math' is none"):
      scorer.score([["a"]], [other])
  none = [np.nan, np.nan]
  for name, want in (
    ("exact", [[1, 0], [1, 0], none, [1, 0]]),
    ("format", [[1, 0], none, none, [1, 0]]),
    (length, [none, [9, 1], none, none]),
    (share, [none, none, [4.5, 0.5], none]),
  ):
    np.testing.assert_array_equal(scores.parts[name], want, err_msg=name)
  np.testing.assert_allclose(
    scores.rewards, [[1.1, 0], [18.5, 2], [-4.5, -0.5], [1.1, 0]]
  )
  np.testing.assert_array_equal(
    scores.accuracy, [[1, 0], [9, 1], [4.5, 0.5], [1, 0]]
  )
  assert not scores.failed.any()


def test_a_failure_names_the_rows_own_reward(file):
  bad = f"{file}:bad"
  examples = [
    dataclasses.replace(row, rewards=own)
    for row, own in zip(
      rows(2), ((("exact", 1.0), (bad, 1.0)), ()), strict=True
    )
  ]
  with Scorer(
    rewards=(("format", 1.0),),
    num_workers=1,
    timeout=20.0,
    row_rewards=[bad, "exact"],
  ) as scorer:
    scores = scorer.score([["ok", "raise"]] * 2, examples)
  assert scores.failed.tolist() == [True, False]
  (message,) = scores.messages
  assert message.startswith(f"reward {bad!r} raised KeyError")
  assert "row set.jsonl:0, completion 1" in message
  np.testing.assert_array_equal(scores.parts[bad], [[0, 0], [np.nan, np.nan]])
  np.testing.assert_array_equal(scores.rewards[0], [0, 0])


def test_a_scorer_may_have_the_rewards_of_rows_alone():
  row = dataclasses.replace(rows(1)[0], rewards=(("exact", 1.0),))
  with Scorer(
    rewards=(), num_workers=1, timeout=20.0, row_rewards=["exact"]
  ) as scorer:
    assert scorer.score([["\\boxed{3}"]], [row]).rewards.tolist() == [[1.0]]
    with pytest.raises(ValueError, match=r"jsonl:0: has no rewards"):
      scorer.score([["3"]], rows(1))


def test_rewards_are_the_weighted_sum_of_the_parts(file):
  length = f"{file}:length"
  rewards = (("exact", 0.9), ("format", 0.1), (length, -0.01))
  completions = [
    ["<answer>3</answer>", "<answer>4</answer>"],
    ["3", r"<answer>3</answer> \boxed{3}"],
  ]
  with Scorer(rewards=rewards, num_workers=2, timeout=20.0) as scorer:
    scores = scorer.score(completions, rows(2))
  assert list(scores.parts) == ["exact", "format", length]
  np.testing.assert_array_equal(scores.parts["exact"], [[1, 0], [0, 1]])
  np.testing.assert_array_equal(scores.parts["format"], [[1, 1], [0, 0]])
  lengths = [[len(text) for text in group] for group in completions]
  np.testing.assert_array_equal(scores.parts[length], lengths)
  expected = [[0.82, -0.08], [-0.01, 0.9 - 0.28]]
  np.testing.assert_allclose(scores.rewards, expected, atol=1e-12)
  assert scores.rewards.dtype == np.float64
  assert not scores.failed.any()
  assert scores.messages == ()


def test_rewards_know_tokens_and_sizes(file):
  names = (f"{file}:tokens", f"{file}:width")
  examples = [
    Example(
      problem="?", answer="", picture_sizes=((9, w),), box_sizes=((8, w),)
    )
    for w in (10, 20)
  ]
  lengths = np.array([[3, 1], [4, 1]])
  with Scorer(
    rewards=tuple((name, 1.0) for name in names), num_workers=1, timeout=20.0
  ) as scorer:
    scores = scorer.score([["a", "b"], ["c", "d"]], examples, lengths)
    np.testing.assert_array_equal(scores.parts[names[0]], lengths)
    np.testing.assert_array_equal(
      scores.parts[names[1]], [[10.01] * 2, [20.02] * 2]
    )
    uncounted = scorer.score([["a", "b"]], examples[:1])
    assert uncounted.failed.all()
    with pytest.raises(ValueError, match=r"shape \(2, 2\) .* \(1, 2\)"):
      scorer.score([["a", "b"]], examples[:1], lengths)


@pytest.fixture(scope="module")
def scorer(file):
  rewards = (("format", 1.0), (f"{file}:bad", 1.0))
  with Scorer(rewards=rewards, num_workers=2, timeout=1.5) as scorer:
    yield scorer


@pytest.mark.parametrize(
  ("kind", "why"),
  [
    ("raise", "raised KeyError: 'gone' (mine.py:"),
    ("nan", "returned nan"),
    ("none", "raised TypeError"),
    ("sleep", "hung for more than 1.5 s"),
    ("lock", "hung for more than 1.5 s"),
    ("exit", "ended its process (exit status 3)"),
  ],
)
def test_a_bad_reward_costs_its_group_and_is_named(scorer, file, kind, why):
  completions = [["a", "b"], ["a", kind], [kind, "b"], ["a", "b"]]
  scores = scorer.score(completions, rows(4))
  np.testing.assert_array_equal(scores.failed, [False, True, True, False])
  expected = [[1, 1], [0, 0], [0, 0], [1, 1]]
  np.testing.assert_array_equal(scores.rewards, expected)
  np.testing.assert_array_equal(scores.parts[f"{file}:bad"], expected)
  first, second = scores.messages
  assert f"{file}:bad" in first
  assert why in first
  assert "row set.jsonl:1, completion 1" in first
  assert "row set.jsonl:2, completion 0" in second
  again = scorer.score([["a", "b"]], rows(1))
  assert not again.failed.any()


def test_a_hang_costs_at_most_the_wall_limit(scorer):
  start = time.monotonic()
  scorer.score([["sleep", "a"]] * 2 + [["a", "b"]] * 20, rows(22))
  assert time.monotonic() - start < 1.5 + 10.0


def test_a_worker_that_dies_between_steps_is_replaced(file):
  name = f"{file}:pid"
  rewards = ((name, 1.0),)
  with Scorer(rewards=rewards, num_workers=1, timeout=20.0) as scorer:
    (pid,) = scorer.score([["a"]], rows(1)).parts[name].ravel()
    os.kill(int(pid), signal.SIGKILL)
    assert gone_within(int(pid), 10)
    scores = scorer.score([["a"], ["b"]], rows(2))
    assert not scores.failed.any()
    assert (scores.parts[name] != pid).all()


def test_a_worker_outlives_the_signal_that_ends_a_run(file):
  name = f"{file}:pid"
  with Scorer(rewards=((name, 1.0),), num_workers=1, timeout=20.0) as scorer:
    (pid,) = scorer.score([["a"]], rows(1)).parts[name].ravel()
    os.kill(int(pid), signal.SIGTERM)
    assert scorer.score([["a"]], rows(1)).parts[name] == pid


def test_workers_hold_neither_jax_nor_pictures(file):
  picture = np.zeros((4, 4, 3), np.uint8)
  row = Example(problem="<image>?", answer="3", images=(picture,))
  rewards = ((f"{file}:jax_free", 1.0), ("exact", 1.0), ("format", 1.0))
  with Scorer(rewards=rewards, num_workers=1, timeout=20.0) as scorer:
    assert scorer.score([["<answer>3</answer>"]], [row]).rewards == [[3.0]]


def test_large_groups_pass(file):
  name = f"{file}:length"
  with Scorer(rewards=((name, 1.0),), num_workers=2, timeout=20.0) as scorer:
    scores = scorer.score([["a" * 300_000] * 4] * 6, rows(6))
  assert (scores.rewards == 300_000).all()


def test_a_file_is_found_from_where_the_scorer_was_made(file, monkeypatch):
  monkeypatch.chdir(file.parent)
  rewards = (("mine.py:length", 1.0), ("mine.py:share(of=6)", 2.0))
  with Scorer(rewards=rewards, num_workers=1, timeout=20.0) as scorer:
    monkeypatch.chdir("/")
    pid = scorer._workers[0]._process.pid
    os.kill(pid, signal.SIGKILL)
    assert gone_within(pid, 10)
    scores = scorer.score([["abc"]], rows(1))
  assert scores.parts["mine.py:length"] == [[3.0]]
  assert scores.parts["mine.py:share(of=6)"] == [[0.5]]
  assert scores.rewards == [[4.0]]


@pytest.mark.parametrize(
  ("names", "why"),
  [
    (("exact", "typo"), "no 'typo'. There are: .*exact, format, "),
    (("{dir}/absent.py:score",), "no such file"),
    (("{dir}/mine.py:absent",), "has no function 'absent'"),
    (("{dir}/broken.py:score",), "ZeroDivisionError.*broken.py:1"),
    (("exact", "exact"), "name each once"),
    (("{dir}/mine.py:share",), "missing a required.*'of'"),
    (("{dir}/mine.py:share(off=1)",), "required.*'of'|unexpected.*'off'"),
    ((), "got none"),
  ],
)
def test_bad_names_are_refused_before_any_step(file, names, why):
  (file.parent / "broken.py").write_text("1 / 0")
  names = [name.format(dir=file.parent) for name in names]
  with pytest.raises(ValueError, match=why):
    Scorer(
      rewards=tuple((name, 1.0) for name in names), num_workers=1, timeout=1.0
    )


def test_bad_sizes_are_refused(scorer):
  with pytest.raises(ValueError, match="not finite"):
    Scorer(rewards=(("exact", np.nan),), num_workers=1, timeout=1.0)
  with pytest.raises(ValueError, match="num_workers=0"):
    Scorer(rewards=(("exact", 1.0),), num_workers=0, timeout=1.0)
  with pytest.raises(ValueError, match="2 examples and 1 groups"):
    scorer.score([["a"]], rows(2))
  with pytest.raises(ValueError, match=r"\[1, 2\] completions"):
    scorer.score([["a"], ["a", "b"]], rows(2))


def test_no_questions_have_no_scores(scorer):
  scores = scorer.score([], [])
  assert scores.rewards.shape == (0, 0)
  assert scores.failed.shape == (0,)


def test_failures_are_told_one_by_one_until_they_are_many():
  messages = [f"reward 'a' hung on row {i}" for i in range(7)]
  messages.append("reward 'b' returned nan on row 7")
  assert briefly(messages[:2], 0) == messages[:2]
  assert briefly(messages, 2) == [
    *messages[:3],
    "5 groups more are left out: 4 x reward 'a' hung; 1 x reward 'b' returned "
    "nan.",
  ]
  (line,) = briefly(messages, 9)
  assert "8 groups more are left out: 7 x reward 'a' hung; 1 x" in line
  assert briefly([], 9) == []


def test_close_ends_every_worker(file):
  scorer = Scorer(rewards=(("exact", 1.0),), num_workers=2, timeout=1.0)
  pids = [worker._process.pid for worker in scorer._workers]
  scorer.close()
  assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("kind", ["a", "lock"])
def test_workers_die_with_the_trainer(file, kind, tmp_path):
  """Even one that hangs in a call which holds the interpreter lock."""
  script = textwrap.dedent(f"""
    from jaxvlm.scoring import Scorer
    from jaxvlm.types import Example
    rewards = (("{file}:bad", 1.0),)
    scorer = Scorer(rewards=rewards, num_workers=1, timeout=2.0)
    print(scorer._workers[0]._process.pid, flush=True)
    scorer.score([["{kind}"]], [Example(problem="?", answer="3")])
    input()
  """)
  with subprocess.Popen(
    [sys.executable, "-c", script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  ) as trainer:
    pid = int(trainer.stdout.readline())
    time.sleep(0.5)
    assert alive(pid)
    trainer.kill()
  assert gone_within(pid, 20)


def test_a_hang_of_the_real_grader_costs_the_wall_limit_and_its_group_alone():
  hangs = [r"\Gamma(30000000)", r"2^{(99\cdot 99\cdot 999\cdot 99)}"]
  answers = [*hangs, "30000000!", "9^{9^{9}}", r"\frac{2}{4}", "0.3"]
  completions = [[rf"\boxed{{{answer}}}"] for answer in answers]
  examples = [
    Example(problem="?", answer="1/2", name=f"set.jsonl:{i}")
    for i in range(len(answers))
  ]
  with Scorer(rewards=(("math", 1.0),), num_workers=2, timeout=2.5) as scorer:
    before = {worker._process.pid for worker in scorer._workers}
    start = time.monotonic()
    scores = scorer.score(completions, examples)
    assert time.monotonic() - start < 2.5 + 15.0  # a worker starts in between
    np.testing.assert_array_equal(scores.failed, [True] * 2 + [False] * 4)
    np.testing.assert_array_equal(scores.rewards[:, 0], [0, 0, 0, 0, 1, 0])
    for i, message in enumerate(scores.messages):
      assert message.startswith(
        f"reward 'math' hung for more than 2.5 s on row set.jsonl:{i}, "
      )
    assert len(scores.messages) == 2
    again = scorer.score(completions[4:], examples[4:])
    assert not again.failed.any()
    after = {worker._process.pid for worker in scorer._workers}
  assert not before & after
  assert not any(alive(pid) for pid in before | after)
