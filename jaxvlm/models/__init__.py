"""The models, one file a family; `Network` is how the package sees them."""

from jaxvlm.models.network import (
  REMAT,
  Network,
  check_remat,
  choose_attention,
  find_family,
  find_size,
)
from jaxvlm.models.pretrained import (
  ORBAX,
  check_tensors,
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
  "REMAT",
  "Network",
  "check_remat",
  "check_tensors",
  "choose_attention",
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
