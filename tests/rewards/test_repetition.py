"""rewards/repetition.py."""

import pytest

from jaxvlm.rewards.repetition import reward
from jaxvlm.types import Example

ROW = Example(problem="?", answer="3")


@pytest.mark.parametrize(
  ("completion", "words", "expected"),
  [
    ("", 2, 0.0),
    ("one", 2, 0.0),
    ("a b c d", 2, 0.0),
    ("a b a b", 2, -1 / 3),  # ab, ba, ab
    ("a A\na  a", 1, -3 / 4),
    ("a a a a", 3, -1 / 2),
    ("a b c a b", 3, 0.0),
    ("no " * 1001, 2, -0.999),
  ],
)
def test_runs_that_come_again_are_counted(completion, words, expected):
  assert reward(completion, ROW, words=words) == pytest.approx(expected)


def test_runs_of_no_words_are_refused():
  with pytest.raises(ValueError, match="words=0"):
    reward("a", ROW, words=0)
