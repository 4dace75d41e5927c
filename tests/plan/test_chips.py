"""Chips are known by their devices' kinds."""

import types

import pytest

from jaxvlm.plan import chips


def device(kind, **stats):
  return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


def test_a_gpu_says_itself_how_much_a_program_can_have():
  found = chips.find(device("NVIDIA H100 80GB HBM3", bytes_limit=70 << 30))
  assert (found.name, found.hbm) == ("H100", 70 << 30)
  assert chips.find(device("NVIDIA A100-SXM4-80GB")).hbm == 60 << 30


def test_a_tpu_that_is_not_there_is_known_by_its_kind():
  assert chips.find(device("TPU v5 lite")).name == "v5e"
  assert chips.find(device("TPU v5")).name == "v5p"


def test_an_unknown_chip_is_refused_with_those_there_are():
  with pytest.raises(ValueError, match=r"no figures of 'abacus'.*TPU v6 lite"):
    chips.find(device("abacus"))
