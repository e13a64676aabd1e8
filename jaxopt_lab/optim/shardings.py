"""Shardings of optimizer state."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def state_shardings(
    tx: optax.GradientTransformation, abstract_params: optax.Params, param_shardings: Any
) -> Any:
    """A `NamedSharding` for every leaf of the state of any Optax transformation.

    The state is evaluated abstractly on parameters that carry their sharding in their type, so each
    state leaf reports how the transformation itself lays it out. Leaves that do not derive from a
    parameter (counters, keys) are replicated. Use the result as `out_shardings` of `jit(tx.init)`:
    without it XLA puts the whole state on the first device.

    Args:
      tx: Any transformation.
      abstract_params: The parameters, or `jax.ShapeDtypeStruct`s of their shapes and dtypes.
      param_shardings: A tree of `NamedSharding` with the structure of the parameters.

    Returns:
      A tree of `NamedSharding` with the structure of `tx.init(params)`.

    Raises:
      ValueError: `param_shardings` holds no sharding, or does not match the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> shardings = {"w": NamedSharding(mesh, PartitionSpec(None, "fsdp"))}
      >>> state_shardings(optax.adam(1e-3), {"w": jnp.zeros((4, 4))}, shardings)[0].mu["w"].spec
      PartitionSpec(None, 'fsdp')
    """
    leaves = jax.tree.leaves(param_shardings)
    if not leaves:
        raise ValueError("param_shardings holds no NamedSharding: the mesh is unknown")
    mesh = leaves[0].mesh
    # Only Explicit axes carry shardings in types; the layout itself is the same.
    typed_mesh = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def typed(param: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            param.shape, param.dtype, sharding=NamedSharding(typed_mesh, sharding.spec)
        )

    params = jax.tree.map(typed, abstract_params, param_shardings)
    with jax.sharding.use_abstract_mesh(typed_mesh):
        state = jax.eval_shape(tx.init, params)

    def placed(leaf: Any) -> NamedSharding:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        # The types spell out every axis; trailing None says nothing and would make equal
        # shardings compare unequal.
        entries = list(spec)
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map(placed, state)
