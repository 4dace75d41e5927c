"""Meshes, the table of logical axes, and arrays between host and devices."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxvlm import sharding
from tests.dense import collate


def test_a_size_of_minus_one_takes_what_is_left():
  mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2, slices=-1)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert sharding.data_shards(mesh) == 4


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((2, 2, 1), r"mesh: \{'data': 2.*does not make 8 devices.*product is 8"),
    ((-1, 3, 1), r"mesh: \{'data': -1.*does not make 8 devices"),
    ((-1, -1, 1), "at most one is -1"),
    ((8, 0, 1), "sizes are positive"),
    ((-2, 4, 1), "sizes are positive"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
  data, fsdp, tensor = sizes
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, slices=-1)


def test_logical_axes_map_to_the_mesh_by_the_table():
  assert sharding.spec(("layer", "embed", "heads", None)) == PartitionSpec(
    None, "fsdp", "tensor", None
  )
  assert sharding.spec(("question", None)) == PartitionSpec(
    ("data", "fsdp"), None
  )


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (("heads", "mlp"), "'heads' and 'mlp'.*both fall on mesh axis 'tensor'"),
    (("question", "embed"), "'question' and 'embed'.*mesh axis 'fsdp'"),
    (("embd",), "no logical axis 'embd'; there are .*'embed'"),
  ],
)
def test_axes_that_collide_or_are_unknown_are_refused(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.spec(axes)


@pytest.mark.parametrize("axis", sharding.WHOLE)
def test_what_may_be_whole_is_so_where_it_does_not_divide(make_mesh, axis):
  mesh = make_mesh(1, 4, 2)
  assert sharding.sharding(mesh, (axis,), (3,)).spec == PartitionSpec(None)
  split = sharding.sharding(mesh, (axis,), (8,)).spec
  assert split == PartitionSpec(sharding.RULES[axis])


@pytest.mark.parametrize(
  ("axes", "shape", "message"),
  [
    (
      ("embed", "heads"),
      (6, 4),
      "mesh.fsdp: 4 devices do not divide the 6 of 'embed'",
    ),
    (
      ("embed", "heads"),
      (8, 3),
      "mesh.tensor: 2 devices .* 3 of 'heads' .*; expected a divisor of 3",
    ),
    (("question",), (2,), "mesh.data, mesh.fsdp: 4 devices .* 'question'"),
  ],
)
def test_what_is_to_be_split_and_does_not_divide_is_refused(
  make_mesh, axes, shape, message
):
  with pytest.raises(ValueError, match=message):
    sharding.sharding(make_mesh(1, 4, 2), axes, shape)


def test_it_is_told_which_axes_are_whole(make_mesh):
  shapes = {
    name: jnp.zeros((8, size)) for name, size in (("a", 3), ("b", 2), ("c", 5))
  }
  axes = dict.fromkeys("ac", ("embed", "kv_heads")) | {"b": ("embed", "heads")}
  found = sharding.whole(make_mesh(1, 4, 2), shapes, axes)
  assert found == {"kv_heads": [3, 5]}


class Device:
  """One of a TPU pod: slices of two hosts, each with a row of chips."""

  platform = "tpu"
  device_kind = "TPU v5 lite"
  core_on_chip = 0

  def __init__(self, number, chips):
    self.id = number
    self.process_index, x = divmod(number, chips)
    self.slice_index, y = divmod(self.process_index, 2)
    self.coords = (x, y, 0)

  def __repr__(self):
    return f"{self.slice_index}.{self.process_index}.{self.id}"


def test_the_data_axis_goes_over_slices_and_the_others_stay_within():
  devices = [Device(i, 4) for i in range(16)]
  found = sharding.arrange(devices, (4, 2, 2), -1)
  slices = np.vectorize(lambda device: device.slice_index)(found)
  assert slices.tolist() == [[[s] * 2] * 2 for s in (0, 0, 1, 1)]
  hosts = np.vectorize(lambda device: device.process_index)(found)
  assert (hosts[..., :1] == hosts).all()
  assert sorted(d.id for d in found.flat) == list(range(16))


def test_tensor_stays_on_a_host_whatever_the_order_of_the_chips():
  devices = [Device(i, 4) for i in range(8)]
  found = sharding.arrange(devices[::-1], (2, 1, 4), -1)
  hosts = np.vectorize(lambda device: device.process_index)(found)
  assert (hosts[..., :1] == hosts).all()


@pytest.mark.parametrize(
  ("count", "shape", "slices", "message"),
  [
    (16, (1, 8, 2), -1, "mesh.data: got 1, and there are 2 slices; expected a"),
    (16, (3, 1, 1), 2, "mesh.data: got 3, and there are 2 slices"),
    (16, (8, 1, 2), 8, "mesh.slices: got 8"),
    (8, (1, 1, 8), -1, "mesh.tensor: got 8, and a host has 4 devices"),
  ],
)
def test_slices_and_hosts_that_do_not_fit_are_refused(
  count, shape, slices, message
):
  devices = [Device(i, 4) for i in range(count)]
  with pytest.raises(ValueError, match=message):
    sharding.arrange(devices, shape, slices)


def test_every_weight_has_axes_that_the_table_places(network, make_mesh):
  mesh = make_mesh(2, 2, 2)
  split = jax.tree.map(
    lambda axes, shape: (
      not sharding.sharding(mesh, axes, shape.shape).is_fully_replicated
    ),
    network.axes(),
    network.shapes(),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  assert split["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"]
  assert split["visual"]["merger"]["linear_fc2"]["kernel"]
  assert not split["language_model"]["norm"]["weight"]


def test_constrain_acts_where_a_mesh_is_in_use_alone(make_mesh):
  def split(x):
    return jax.jit(lambda x: sharding.constrain(x, "question", None) + 0)(x)

  x = jnp.zeros((8, 2))
  with sharding.use(make_mesh(8, 1, 1)):
    inside = split(x)
  assert inside.sharding.shard_shape(x.shape) == (1, 2)
  assert split(x).sharding.shard_shape(x.shape) == (8, 2)


@pytest.mark.parametrize(
  ("rows", "heads", "part", "keys_part"),
  [
    (4, 2, (2, 2), (2, 1)),
    (4, 1, (2, 4), (2, 1)),  # keys' heads do not divide: all are whole
  ],
)
def test_each_device_gets_its_part_and_whole_what_does_not_divide(
  make_mesh, rows, heads, part, keys_part
):
  shapes = []

  def call(query, keys):
    shapes.append((query.shape, keys.shape))
    return (query + 1,)

  axes = ("question", "kv_heads")
  query = jnp.arange(rows * 4.0).reshape(rows, 4)
  arrays = (query, jnp.zeros((rows, heads)))
  by_device = lambda mesh: jax.jit(
    lambda *arrays: sharding.by_device(
      call, mesh, arrays, (axes, axes), (axes,)
    )
  )(*arrays)
  (got,) = by_device(make_mesh(2, 1, 2))
  np.testing.assert_array_equal(got, query + 1)
  by_device(None)
  assert shapes == [(part, keys_part), (query.shape, (rows, heads))]


def test_a_batch_comes_back_from_the_devices_as_it_went(
  make_mesh, questions, layout
):
  mesh = make_mesh(2, 2, 2)
  prompts = collate(questions, lanes=8, layout=layout)
  placed = sharding.place(mesh, prompts)
  assert placed.prompt_ids.sharding.shard_shape((8, 16)) == (2, 16)
  # Axes stand before the questions in this array alone.
  assert placed.position_ids.sharding.shard_shape((3, 8, 16)) == (3, 2, 16)
  lanes = placed.vision.pixel_values
  assert lanes.sharding.shard_shape(lanes.shape)[0] == 2
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(sharding.to_host(a), b),
    placed,
    prompts,
  )


def test_to_host_takes_this_hosts_rows_once_and_in_order():
  def shard(start, value):
    return types.SimpleNamespace(
      index=(slice(start, None), slice(None)), data=np.full((2, 3), value)
    )

  array = types.SimpleNamespace(
    is_fully_addressable=False,
    shape=(4, 3),
    addressable_shards=[shard(6, 1), shard(4, 0), shard(6, 1), shard(4, 0)],
  )
  np.testing.assert_array_equal(
    sharding.to_host(array), np.repeat([[0] * 3, [1] * 3], 2, axis=0)
  )


def test_hosts_agree_on_the_largest_and_add_their_sums(monkeypatch):
  np.testing.assert_array_equal(sharding.agree_max([3, 1]), [3, 1])
  np.testing.assert_array_equal(sharding.sum_over_hosts([3, 1]), [3, 1])
  monkeypatch.setattr(
    sharding.hosts, "exchange", lambda x: np.stack([x, np.array([2, 5])])
  )
  np.testing.assert_array_equal(sharding.agree_max([3, 1]), [3, 5])
  np.testing.assert_array_equal(sharding.sum_over_hosts([3, 1]), [5, 6])


def test_a_replicated_array_is_whole_on_the_host(make_mesh):
  everywhere = NamedSharding(make_mesh(8, 1, 1), PartitionSpec())
  array = jax.device_put(np.arange(6.0).reshape(2, 3), everywhere)
  np.testing.assert_array_equal(
    sharding.to_host(array), np.arange(6.0).reshape(2, 3)
  )
