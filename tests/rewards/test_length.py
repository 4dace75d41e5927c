"""rewards/length.py."""

import dataclasses

import pytest

from jaxvlm.rewards.length import reward
from jaxvlm.types import Example

ROW = Example(problem="?", answer="3")


@pytest.mark.parametrize(
  ("tokens", "expected"),
  [
    (0, 0.0),
    (75, 0.0),
    (76, -0.04),
    (80, -0.2),
    (99, -0.96),
    (100, -1.0),
    (1000, -1.0),
  ],
)
def test_the_penalty_is_dapos(tokens, expected):
  row = dataclasses.replace(ROW, completion_tokens=tokens)
  assert reward("a" * 9999, row, longest=100, buffer=25) == expected


def test_a_buffer_of_the_whole_length_punishes_each_token():
  row = dataclasses.replace(ROW, completion_tokens=1)
  assert reward("", row, longest=4, buffer=4) == -0.25


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_that_is_none_or_too_large_is_refused(buffer):
  row = dataclasses.replace(ROW, completion_tokens=1)
  with pytest.raises(ValueError, match=f"buffer={buffer}: expected 1 to"):
    reward("", row, longest=100, buffer=buffer)


def test_characters_are_not_counted_for_tokens():
  with pytest.raises(ValueError, match="not counted"):
    reward("three words here", ROW, longest=100, buffer=25)
