"""Every test sees 8 virtual CPU devices, exact matmuls and strict arrays."""

import concurrent.futures
import gc
import os
import threading

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling these small programs takes longer than running them.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=0"
  + " --xla_cpu_use_fusion_emitters=false"
  + " --xla_cpu_parallel_codegen_split_count=1"  # workers take the cores
)

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh

from jaxvlm import hosts, sharding
from jaxvlm.data.vision_layout import Layout
from jaxvlm.learner import Learner
from jaxvlm.models import Network, find_family
from jaxvlm.rollout.sampler import Draws, Sampler
from tests.learners import ADAMW, OBJECTIVE
from tests.questions import IMAGE, make_question

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Tracing makes many objects and little garbage.
gc.set_threshold(100_000, 50, 1000)

IDS = {
  "image_token_id": IMAGE,
  "video_token_id": 6,
  "vision_start_token_id": 3,
  "vision_end_token_id": 4,
  "tie_word_embeddings": True,
}
TEXT = {
  "max_position_embeddings": 512,
  "vocab_size": 50,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 48,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e4,
}
VISION = {
  "depth": 2,
  "hidden_size": 32,
  "num_heads": 2,
  "intermediate_size": 48,
  "out_hidden_size": 32,
  "temporal_patch_size": 2,
  "spatial_merge_size": 2,
}
TINY = {
  "qwen2_5_vl": {
    "model_type": "qwen2_5_vl",
    **IDS,
    "text_config": {
      **TEXT,
      "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
      **VISION,
      "patch_size": 14,
      "tokens_per_second": 2,
      "fullatt_block_indexes": [1],
      "window_size": 56,
    },
  },
  "qwen3_vl": {
    "model_type": "qwen3_vl",
    **IDS,
    "text_config": {
      **TEXT,
      "head_dim": 12,
      "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]},
    },
    "vision_config": {
      **VISION,
      "patch_size": 16,
      "num_position_embeddings": 9,
      "deepstack_visual_indexes": [0],
    },
  },
}
# The pictures of each question, as rows and columns of patches.
GRIDS = (
  [(4, 6), (2, 2)],
  [(4, 4)],
  [],
  [(2, 4)],
  [(2, 2), (2, 2), (4, 2)],
  [(4, 6)],
  [],
  [(2, 6), (2, 4)],
)


def pytest_collection_modifyitems(items):
  """Files of whole runs come first: what is left to share out last is short."""
  runs = {item.path for item in items if "launch" in item.fixturenames}
  items.sort(key=lambda item: item.path not in runs)


def pytest_collection_finish():
  gc.freeze()  # the libraries


@pytest.fixture(scope="session", params=["qwen2_5_vl"])
def family(request):
  """One, unless a test asks for others."""
  return request.param


@pytest.fixture(scope="session")
def network(family):
  return Network(
    config=find_family(family).Config.from_hf(TINY[family]),
    dtype="float32",
    param_dtype="float32",
    remat="none",
    attention="plain",
  )


@pytest.fixture(scope="session")
def layout(family):
  return Layout.from_config(TINY[family])


@pytest.fixture(scope="session")
def params(network):
  """Weights on the host, every bias and norm among them far from flat."""
  random = np.random.default_rng(0)
  flat = traverse_util.flatten_dict(network.init(0))
  return traverse_util.unflatten_dict(
    {
      path: np.asarray(2 * x + 0.1 * random.normal(size=x.shape), np.float32)
      for path, x in flat.items()
    }
  )


@pytest.fixture(scope="session")
def banned():
  return np.isin(np.arange(50), [3, 4, 5, 6, 48, 49])


@pytest.fixture(scope="session")
def questions(layout):
  """Eight: two pictures of unlike sizes, one, none, three small ones, ..."""
  random = np.random.default_rng(1)
  return [
    make_question(random, layout, i, sizes, words=2 * (i % 3 == 2))
    for i, sizes in enumerate(GRIDS)
  ]


@pytest.fixture(scope="session")
def mesh():
  """One device."""
  return make_mesh(1, 1, 1)


@pytest.fixture(scope="session", name="make_mesh")
def make_mesh_fixture():
  return make_mesh


def make_mesh(*sizes):
  devices = np.array(jax.devices()[: np.prod(sizes)])
  return Mesh(devices.reshape(sizes), sharding.AXES)


@pytest.fixture(scope="session")
def place_params(network):
  """Puts weights on a mesh, each time anew: an update consumes them."""

  def place(params, mesh):
    return jax.tree.map(
      lambda x, axes: jax.device_put(x, sharding.sharding(mesh, axes, x.shape)),
      params,
      network.axes(),
    )

  return place


@pytest.fixture(scope="session")
def make_sampler(network, layout, banned):
  def make(mesh, slots=0):
    return Sampler(
      network=network,
      mesh=mesh,
      eos_ids=(11, 12, 13, 14, 15, 16),
      pad_id=0,
      banned=banned,
      layout=layout,
      slots=slots,
    )

  return make


@pytest.fixture(scope="session")
def make_learner(network, banned):
  def make(mesh, *, optimizer=ADAMW, objective=OBJECTIVE, frozen=()):
    return Learner(
      network=network,
      mesh=mesh,
      banned=banned,
      frozen=frozen,
      optimizer=optimizer,
      objective=objective,
    )

  return make


@pytest.fixture(scope="session")
def draws():
  return Draws(
    num_completions=3,
    max_completion_length=8,
    temperature=0.7,
    top_k=0,
    top_p=1.0,
  )


@pytest.fixture(scope="session")
def rollout(make_sampler, place_params, params, mesh, questions, draws):
  """Three completions of every question, sampled on one device."""
  sampler = make_sampler(mesh)
  weights = sampler.weights(place_params(params, mesh))
  return sampler.sample(weights, questions, key=jax.random.key(0), draws=draws)


@pytest.fixture(name="among_hosts")
def among_hosts_fixture(monkeypatch):
  """among_hosts(count, call): what call(index) gives on each of so many hosts."""

  def among_hosts(count, call):
    here, said = threading.local(), {}
    all_there = threading.Barrier(count, timeout=60)

    def exchange(values):
      said[here.index] = values
      all_there.wait()
      found = np.stack([said[i] for i in range(count)])
      all_there.wait()
      return found

    def one(index):
      here.index = index
      return call(index)

    monkeypatch.setattr(hosts, "exchange", exchange)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
      return list(pool.map(one, range(count)))

  return among_hosts
