"""The models, one file a family; `Network` is how the package sees them."""

from jaxvlm.models.network import Network, find_family
from jaxvlm.models.pretrained import load_network, load_params, save_hf

__all__ = [
  "Network",
  "find_family",
  "load_network",
  "load_params",
  "save_hf",
]
