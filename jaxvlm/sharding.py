"""The mesh, the one table of logical axes, and host <-> global arrays."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm import hosts

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. "question" is the only axis of activations that
# is split over hosts; a weight has at most one axis on fsdp, one on tensor.
RULES: dict[str, str | tuple[str, ...] | None] = {
  "question": ("data", "fsdp"),
  "lane": ("data", "fsdp"),
  "layer": None,
  "embed": "fsdp",
  "vision_embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "vision_heads": "tensor",
  "mlp": "tensor",
  "vision_mlp": "tensor",
  "vocab": "tensor",
  "place": None,  # in a table of learned positions
  "head_dim": None,
  "patch": None,
  "norm": None,
}
# Those that each device holds whole where their size does not divide: few keys'
# heads, a small tower, an odd vocabulary. What else does not divide is refused.
WHOLE = ("kv_heads", "vision_heads", "vision_mlp", "vision_embed", "vocab")

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
  "mesh", default=None
)


def make_mesh(
  *,
  data: int,
  fsdp: int,
  tensor: int,
  slices: int,
  devices: Sequence[jax.Device] | None = None,  # None: all there are
) -> Mesh:
  """A mesh over all devices; one size may be -1 and takes what is left.

  Args:
    data: devices along this axis, those of all slices together.
    fsdp: likewise, within a slice.
    tensor: likewise, within a host.
    slices: parts of the data axis whose devices have a slower network between
      them: slices of a TPU pod, or hosts; -1: as many as the devices say.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, slices do
      not divide the data axis, or tensor reaches over hosts.
  """
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) > 1 or any(s < 1 and s != -1 for s in sizes.values()):
    raise ValueError(
      f"mesh: got {sizes}; sizes are positive and at most one is -1."
    )
  if free and count % fixed == 0:
    sizes[free[0]] = count // fixed
  if int(np.prod(list(sizes.values()))) != count:
    raise ValueError(
      f"mesh: {sizes} does not make {count} devices; set one size to -1 or "
      f"choose sizes whose product is {count}."
    )
  shape = tuple(sizes.values())
  return Mesh(arrange(devices, shape, slices), AXES)


def arrange(
  devices: Sequence[Any], shape: tuple[int, ...], slices: int
) -> np.ndarray:
  """The devices as an array of this shape, neighbours near one another.

  Raises:
    ValueError: as `make_mesh`.
  """
  named = {getattr(device, "slice_index", 0) for device in devices}
  if slices == -1:
    slices = len(named)
  if slices < 1 or shape[0] % slices:
    raise ValueError(
      f"mesh.data: got {shape[0]}, and there are {slices} slices; expected a "
      "multiple of these. mesh.slices=1 takes all devices for one slice."
    )
  inner, outer = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
  try:
    found = (
      mesh_utils.create_hybrid_device_mesh(
        inner,
        outer,
        devices,
        process_is_granule=len(named) != slices,
        allow_split_physical_axes=True,
      )
      if slices > 1
      else mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
      )
    )
  except ValueError as error:
    raise ValueError(f"mesh.slices: got {slices}: {error}.") from error
  if not _whole_on_hosts(found):
    by_host = sorted(devices, key=lambda d: (d.process_index, d.id))
    found = np.array(by_host).reshape(shape)
  if not _whole_on_hosts(found):
    local = len(devices) // len({d.process_index for d in devices})
    raise ValueError(
      f"mesh.tensor: got {shape[-1]}, and a host has {local} devices; expected "
      "a divisor of these, for a question and its group stay on one host."
    )
  return found


def _whole_on_hosts(devices: np.ndarray) -> bool:
  """Whether those that share a question's work are of one host."""
  groups = devices.reshape(-1, devices.shape[-1])
  return all(len({d.process_index for d in group}) == 1 for group in groups)


def data_shards(mesh: Mesh) -> int:
  """Slices that the questions of a batch are split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def host_shards(mesh: Mesh) -> int:
  """Those of them that are of this host's questions."""
  return data_shards(mesh) // jax.process_count()


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
  """Makes `constrain` in layers refer to this mesh while tracing."""
  token = _mesh.set(mesh)
  try:
    yield
  finally:
    _mesh.reset(token)


def mesh_in_use() -> Mesh | None:
  """The one that `use` names here."""
  return _mesh.get()


def backend() -> str:
  """cpu, gpu or tpu: what the mesh in use consists of, else the process's own.

  They differ where programs are compiled for a machine that is not there.
  """
  mesh = _mesh.get()
  return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """Mesh axes of an array with these logical axes.

  Raises:
    ValueError: an unknown name, or two axes that fall on one mesh axis.
  """
  names: list[str | tuple[str, ...] | None] = []
  taken: dict[str, str] = {}
  for axis in axes:
    if axis is not None and axis not in RULES:
      raise ValueError(
        f"sharding: no logical axis {axis!r}; there are {sorted(RULES)}."
      )
    rule = None if axis is None else RULES[axis]
    for name in (rule,) if isinstance(rule, str) else rule or ():
      if name in taken:
        raise ValueError(
          f"sharding: axes {taken[name]!r} and {axis!r} of {axes} both fall "
          f"on mesh axis {name!r}."
        )
      taken[name] = str(axis)
    names.append(rule)
  return PartitionSpec(*names)


def sharding(
  mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
  """Sharding of an array.

  A dimension that does not divide is whole on each device if its axis is one
  of WHOLE.

  Raises:
    ValueError: another dimension does not divide; names both axes.
  """
  names = list(spec(axes))
  for i, (axis, name, size) in enumerate(zip(axes, names, shape, strict=True)):
    mesh_axes = (name,) if isinstance(name, str) else name or ()
    parts = int(np.prod([mesh.shape[one] for one in mesh_axes]))
    if size % parts == 0:
      continue
    if axis not in WHOLE:
      raise ValueError(
        f"mesh.{', mesh.'.join(mesh_axes)}: {parts} devices do not divide "
        f"the {size} of {axis!r} of an array {shape}; expected a divisor of "
        f"{size}."
      )
    names[i] = None
  return NamedSharding(mesh, PartitionSpec(*names))


def abstract(mesh: Mesh, shapes: Any, axes: Any) -> Any:
  """Shapes, dtypes and shardings of arrays with these logical axes."""
  return jax.tree.map(
    lambda x, names: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding(mesh, names, x.shape)
    ),
    shapes,
    axes,
  )


def whole(mesh: Mesh, shapes: Any, axes: Any) -> dict[str, list[int]]:
  """Which logical axes are not split though the table says so, and sizes.

  Args:
    mesh: the mesh.
    shapes: a tree of what has a shape.
    axes: the same tree with the logical axes of each.

  Raises:
    ValueError: as `sharding`.
  """
  found: dict[str, set[int]] = {}

  def look(x: Any, names: tuple[str | None, ...]) -> None:
    placed = sharding(mesh, names, x.shape).spec
    for axis, size, here in zip(names, x.shape, placed, strict=True):
      if here is None and axis is not None and RULES[axis] is not None:
        found.setdefault(axis, set()).add(size)

  jax.tree.map(look, shapes, axes)
  return {axis: sorted(sizes) for axis, sizes in found.items()}


def device_bytes(tree: Any) -> int:
  """Bytes on one device of arrays, or of shapes that are placed."""
  return sum(
    math.prod(device_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def device_shape(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
  """Of an array's part on one device."""
  return x.sharding.shard_shape(x.shape) if x.sharding else x.shape


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins the layout of an activation, where a mesh is in use."""
  mesh = _mesh.get()
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))


def by_device(
  call: Callable[..., Any],
  mesh: Mesh | None,
  arrays: Sequence[jax.Array],
  axes: Sequence[tuple[str | None, ...]],
  out_axes: Sequence[tuple[str | None, ...]],
) -> Any:
  """`call` on each device's own part of arrays with these logical axes.

  For what the compiler cannot split. A logical axis that does not divide in
  one of the arrays is whole in all of them.
  """
  if mesh is None or mesh.size == 1:
    return call(*arrays)
  whole = {
    axis
    for x, names in zip(arrays, axes, strict=True)
    for axis, placed in zip(
      names, sharding(mesh, names, x.shape).spec, strict=True
    )
    if placed is None
  }

  def specs(axes: Sequence[tuple[str | None, ...]]) -> tuple[Any, ...]:
    return tuple(
      spec(tuple(None if axis in whole else axis for axis in names))
      for names in axes
    )

  return jax.shard_map(
    call,
    mesh=mesh,
    in_specs=specs(axes),
    out_specs=specs(out_axes),
    check_vma=False,  # kernels do not say over what theirs vary
  )(*arrays)


def place(mesh: Mesh, batch: Any) -> Any:
  """This host's arrays of a record -> global arrays, split over questions.

  Args:
    mesh: the mesh.
    batch: Prompts, Tree or Experience of numpy arrays; the rows of a tree are
      split as questions are.
  """

  def one(path: tuple[Any, ...], x: Any) -> jax.Array:
    placed = NamedSharding(mesh, spec(batch_axes(path)))
    return jax.make_array_from_process_local_data(placed, np.asarray(x))

  return jax.tree_util.tree_map_with_path(one, batch)


def batch_axes(path: tuple[Any, ...]) -> tuple[str | None, ...]:
  """The first logical axes, to the one that is split, of a record's array."""
  names = {key.name for key in path if hasattr(key, "name")}
  rows = "lane" if "vision" in names else "question"
  return (None, rows) if names & {"position_ids", "levels"} else (rows,)


def agree_max(values: Any) -> np.ndarray:
  """Elementwise maximum over hosts, so that all compile the same shapes."""
  return hosts.exchange(values).max(0)


def sum_over_hosts(values: Any) -> np.ndarray:
  """Elementwise sum over hosts."""
  return hosts.exchange(values).sum(0)


def to_host(x: jax.Array, axis: int = 0) -> np.ndarray:
  """This host's rows of a global array whose `axis` is split over hosts."""
  if x.is_fully_addressable:
    return np.asarray(x)
  rows = {
    shard.index[axis].start or 0: shard.data for shard in x.addressable_shards
  }
  own = np.concatenate([np.asarray(rows[at]) for at in sorted(rows)], axis)
  assert own.shape[axis] * jax.process_count() == x.shape[axis], x.sharding
  return own


def pin(tree: Any) -> Any:
  """A record's arrays [Q ...] split over questions, where a mesh is in use.

  What a program returns lies as the compiler likes, and `to_host` takes
  nothing but a host's own rows.
  """
  return jax.tree.map(
    lambda x: constrain(x, "question", *(x.ndim - 1) * (None,)), tree
  )


def gather(values: np.ndarray) -> tuple[np.ndarray, slice]:
  """Rows of all hosts, as many of each, and where this host's are."""
  rows = np.concatenate(hosts.exchange(values))
  start = jax.process_index() * len(values)
  return rows, slice(start, start + len(values))
