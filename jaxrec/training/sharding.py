"""Sharding of all arrays: one mesh with the axes (data, expert, model), and two tables of rules.

Modules only name the axes of their arrays; the tables map each name to a mesh axis (None: replicated).

    weights      nn.with_logical_partitioning(init, ("embed", "heads", "head_dim"))
                 embed, heads, head_dim, mlp, vocab, expert, queries, layers
    activations  nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
                 act_batch, act_length, act_targets, act_embed, act_heads, act_expert, act_mlp

    mesh = make_mesh(MeshConfig(data=-1))
    with use_mesh(mesh):
        params = init_sharded(lambda: model.init(key, batch), mesh)
        state, metrics = jax.jit(step)(state, shard_batch(batch, mesh))
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrec.config import UserError

AXES = ("data", "expert", "model")

WEIGHT_RULES = (
    ("embed", None),
    ("heads", "model"),
    ("head_dim", None),
    ("mlp", "model"),
    ("vocab", "model"),
    ("expert", "expert"),
    ("queries", None),
    ("layers", None),
)

# The batch is also split over the expert axis: outside the expert layers those devices are data-parallel.
ACTIVATION_RULES = (
    ("act_batch", ("data", "expert")),
    ("act_length", None),
    ("act_targets", None),
    ("act_embed", None),
    ("act_heads", "model"),
    ("act_expert", "expert"),
    ("act_mlp", "model"),
)

RULES = WEIGHT_RULES + ACTIVATION_RULES


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh of the devices of all hosts."""

    data: int = -1
    """Devices over which batches are split; -1: all that the other axes leave."""
    expert: int = 1
    """Devices over which the experts of mixture layers are split."""
    model: int = 1
    """Devices over which heads, feed-forward widths and vocabularies are split."""


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges the devices (default: all) as a mesh.

    Raises:
      UserError: the sizes don't multiply to the number of devices.
    """
    count = len(devices or jax.devices())
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) == 1:
        fixed = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = count // fixed if fixed > 0 else 0
    if min(sizes) < 1 or np.prod(sizes) != count:
        asked = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(f"the mesh {asked} doesn't fit {count} devices: the sizes must multiply to it, one may be -1")
    # Auto axes: with the default, Explicit, the logical constraints of flax.linen raise.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes the mesh and both tables of rules current, so that modules' logical names become sharding constraints."""
    # Not `with mesh:`, under which flax silently drops every constraint.
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def spec(*names: str | None) -> PartitionSpec:
    """The mesh axes of an array with these logical names."""
    return nn.logical_to_mesh_axes(names, RULES)


def init_sharded(init: Callable[[], Any], mesh: Mesh | None) -> Any:
    """Runs an initialiser that creates every weight sharded on its devices, never whole on one.

    An axis that doesn't split evenly over its devices, such as a vocabulary of odd size, is replicated.

    Args:
      init: returns a pytree, as `model.init` does, with or without nn.with_logical_partitioning around its leaves.
      mesh: None for one device.

    Returns:
      The same pytree with plain arrays as leaves.
    """
    if mesh is None:
        return nn.unbox(jax.jit(init)())
    with use_mesh(mesh):
        named, plain = jax.eval_shape(lambda: (made := init(), nn.unbox(made)))
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(named), mesh, RULES)
        shardings = jax.tree.map(_split_evenly, plain, shardings)
        return jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes instead of arrays, for `flax.linen.Module.lazy_init` with a large input."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _split_evenly(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
    def ways(axes: Any) -> int:
        return int(np.prod([sharding.mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ())]))

    axes = [axis if size % ways(axis) == 0 else None for size, axis in zip(shape.shape, sharding.spec)]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def like_params(tree: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of `params` (an optimiser's state); other leaves are replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    structure, shardings = jax.tree.structure(params), jax.tree.map(lambda x: x.sharding, params)

    def is_copy(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(lambda node: shardings if is_copy(node) else everywhere, tree, is_leaf=is_copy)


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Copies the leaves that aren't on the mesh yet, such as a step count, to all of its devices.

    Without a mesh, to this process's first device: `jax.jit` compiles separate programs for committed arrays, such as
    restored ones, and uncommitted ones.
    """
    if mesh is None:
        return jax.device_put(tree, jax.local_devices()[0])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(x: jax.Array) -> jax.Array:
        placed = isinstance(x, jax.Array) and len(x.sharding.device_set) == mesh.size
        return x if placed else jax.device_put(x, everywhere)

    return jax.tree.map(put, tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch of NumPy arrays (this host's slice, batch axis first) on the mesh, split over its batch axis.

    Raises:
      UserError: the batch doesn't split evenly over the devices.
    """
    ways = mesh.shape["data"] * mesh.shape["expert"] // jax.process_count()

    def put(x: np.ndarray) -> jax.Array:
        if np.ndim(x) == 0:
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        if len(x) % ways:
            raise UserError(
                f"a batch of {len(x)} doesn't split over {ways} devices; make its size a multiple of {ways}"
            )
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec("act_batch")), np.asarray(x))

    return jax.tree.map(put, batch)
