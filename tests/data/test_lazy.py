"""Rows that are made when they are asked for."""

import numpy as np
import pytest

from jaxvlm.data.lazy import LazyRows
from jaxvlm.types import Example


class Squares(LazyRows):
  def __len__(self):
    return 5

  def row(self, i):
    assert type(i) is int
    return Example(problem=str(i), answer=str(i * i))


@pytest.mark.parametrize(
  ("place", "answer"), [(0, "0"), (4, "16"), (-1, "16"), (np.int64(3), "9")]
)
def test_a_row_is_made_by_its_place(place, answer):
  assert Squares()[place].answer == answer


def test_a_slice_is_of_rows():
  assert [row.answer for row in Squares()[3:0:-2]] == ["9", "1"]
  assert [row.answer for row in Squares()] == ["0", "1", "4", "9", "16"]


@pytest.mark.parametrize("place", [5, -6])
def test_a_place_outside_is_refused(place):
  with pytest.raises(IndexError, match=f"row {place} of 5"):
    Squares()[place]
