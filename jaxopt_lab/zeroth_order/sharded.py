"""Direction parallelism: devices along one axis of a mesh evaluate different probes.

Beside it the mesh may have axes over which parameters and batch are laid out. Along the axis of
probes both are whole: each group of devices has its own copy, draws the directions of its own
probes, and sends one number a loss. Then every group adds up all directions for its own shards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.zeroth_order.engines import Engine, sequential


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded(Engine):
    """An engine that hands parts of the losses to others."""

    mesh: Mesh
    """With an axis of probes."""

    axis: str
    """Its name."""

    inner: Engine
    """How each group evaluates its own."""

    def check(self, num_directions: int) -> None:
        """Raise `ValueError` where groups, or chunks in one, do not divide the directions."""
        groups = self.mesh.shape[self.axis]
        if num_directions % groups:
            raise ValueError(
                f"num_directions: got {num_directions}, wanted a multiple of {groups}, the size of "
                f"the mesh axis {self.axis!r}"
            )
        self.inner.check(num_directions // groups)

    def map(self, fn: Callable[..., Array], *columns: Array, sides: int = 1) -> Array:
        """As for `Engine`; the numbers of all groups, on every device."""
        groups, rows = self.mesh.shape[self.axis], len(columns[0])
        size = math.ceil(rows / groups)
        # Losses that are shared, such as one in the middle, leave groups with a row less.
        last = np.minimum(np.arange(groups * size), rows - 1)
        padded = [x[last] for x in columns]

        def own(*columns: Array) -> Array:
            return self.inner.map(fn, *columns, sides=sides)

        # A batch axis in place of a shard_map: a loss may close over arrays of the mesh and pin
        # activations to it, neither of which can enter one.
        spec = NamedSharding(self.mesh, PartitionSpec(self.axis))
        whole = NamedSharding(self.mesh, PartitionSpec())
        stacked = [self._placed(x.reshape(groups, size, *x.shape[1:]), spec) for x in padded]
        found = jax.vmap(own, spmd_axis_name=self.axis)(*stacked)
        found = self._placed(self._placed(found, spec), whole)
        return found.reshape(-1, *found.shape[2:])[:rows]

    def _placed(self, x: Array, sharding: NamedSharding) -> Array:
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if types[self.axis] == AxisType.Explicit:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)


def sharded(mesh: Mesh, axis: str = "probe", *, engine: Engine = sequential()) -> Engine:
    """Probes along an axis of a mesh; they exchange one number a loss and nothing else.

    Draws are those of one device: they depend on the number of a probe and on positions in whole
    leaves, wherever they are made. Losses differ by the order of sums.

    Microbatches belong into `value_fn`, which then averages losses, not differences:

        def value_fn(params):
            return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), microbatches))

    Args:
      mesh: Auto or Explicit. Parameters and batch are laid out over other axes of it.
      axis: The one of probes, whose size divides the number of directions.
      engine: How the devices of one group evaluate their own probes.

    Raises:
      ValueError: The mesh has no such axis.

    Example:
      >>> mesh = jax.make_mesh((1,), ("probe",), axis_types=(AxisType.Auto,))
      >>> engine = sharded(mesh)
      >>> engine.map(lambda x: x**2, jax.numpy.arange(4.0))
      Array([0., 1., 4., 9.], dtype=float32)
    """
    if axis not in mesh.shape:
        raise ValueError(f"sharded: got axis {axis!r}, wanted one of {', '.join(mesh.axis_names)}")
    name, both = f"sharded over {axis!r}", engine.both_sides
    return Sharded(name, None, both_sides=both, mesh=mesh, axis=axis, inner=engine)
