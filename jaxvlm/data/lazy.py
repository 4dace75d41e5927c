"""Sequences of rows that are made when they are asked for."""

import abc
from collections.abc import Sequence
from typing import overload

from jaxvlm.types import Example


class LazyRows(Sequence[Example]):
  """A sequence by the row of one place, from 0; places also count from the end."""

  @abc.abstractmethod
  def row(self, i: int) -> Example:
    """The row of place i in [0, len)."""

  @overload
  def __getitem__(self, i: int) -> Example: ...
  @overload
  def __getitem__(self, i: slice) -> Sequence[Example]: ...
  def __getitem__(self, i: int | slice) -> Example | Sequence[Example]:
    if isinstance(i, slice):
      return [self.row(j) for j in range(*i.indices(len(self)))]
    if not -len(self) <= i < len(self):
      raise IndexError(f"row {i} of {len(self)}")
    return self.row(int(i) % len(self))  # a row's number may seed a generator
