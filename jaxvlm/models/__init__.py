"""The models, one file a family; `Network` is how the package sees them."""

from jaxvlm.models.network import Network, find_family, find_size
from jaxvlm.models.pretrained import (
  ORBAX,
  copy_companions,
  find_tensors,
  hub_name,
  load_network,
  load_params,
  save_hf,
  weights,
)

__all__ = [
  "ORBAX",
  "Network",
  "copy_companions",
  "find_family",
  "find_size",
  "find_tensors",
  "hub_name",
  "load_network",
  "load_params",
  "save_hf",
  "weights",
]
