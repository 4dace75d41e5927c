"""rewards/__init__.py: how a config names a reward and gives it options."""

import pytest

from jaxvlm.rewards import exact, load
from jaxvlm.types import Example

ROW = Example(problem="?", answer="3")


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine (1).py"
  path.write_text(
    "def share(completion, example, *, of, best=1.0):\n"
    "  return min(best, len(completion) / of)\n"
  )
  return path


def test_a_name_alone_is_the_reward():
  for completion in ("<answer>3</answer>", "<answer>4</answer>"):
    expected = exact.reward(completion, ROW)
    assert load("exact")(completion, ROW) == expected
    assert load("exact()")(completion, ROW) == expected


def test_options_reach_the_reward(file):
  assert load(f"{file}:share(of=8)")("four", ROW) == 0.5
  assert load(f"{file}:share(of=8, best=0.25)")("four", ROW) == 0.25
  assert load(f"{file}:share(\n  of=-4,\n)")("four", ROW) == -1.0


@pytest.mark.parametrize(
  ("options", "why"),
  [
    ("", "missing a required.*argument: 'of'"),
    ("()", "missing a required.*argument: 'of'"),
    ("(of=1, off=2)", "unexpected keyword argument 'off'"),
    ("(1)", "an option has no name"),
    ("(of=1)(best=2)", "these are not options"),
    ("(of=size)", "malformed"),
    ("(of=1, of=2)", "given twice"),
    ("(of=)", "syntax"),
    ("(of=__import__('os').getpid())", "malformed"),
  ],
)
def test_wrong_options_are_refused_and_the_form_is_shown(file, options, why):
  with pytest.raises(ValueError, match=why) as caught:
    load(f"{file}:share{options}")
  assert str(caught.value).startswith(f"{file}:share{options}: ")
  assert "as in 'number(relative=0.05)'" in str(caught.value)


def test_options_of_a_reward_without_any_are_refused():
  with pytest.raises(ValueError, match=r"exact\(case=1\): .*'case'"):
    load("exact(case=1)")


def test_an_unknown_reward_with_options_lists_what_there_is():
  with pytest.raises(ValueError, match=r"no 'exakt'\. There are: .*exact, "):
    load("exakt(a=1)")
