"""Shardings of optimizer state."""

import warnings
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxopt_lab.optim.routing import broadcast_prefix


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
      param_shardings: A tree of `NamedSharding` with the structure of the parameters, or a prefix
        of one.

    Returns:
      A tree of `NamedSharding` with the structure of `tx.init(params)`.

    Raises:
      ValueError: `param_shardings` holds anything but `NamedSharding`s, or does not match the
        parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> shardings = {"w": NamedSharding(mesh, PartitionSpec(None, "fsdp"))}
      >>> placed = state_shardings(optax.adam(1e-3), {"w": jnp.zeros((4, 4))}, shardings)
      >>> tuple(placed[0].mu["w"].spec)
      (None, 'fsdp')
    """
    leaves = jax.tree.leaves(param_shardings)
    wrong = [x for x in leaves if not isinstance(x, NamedSharding)]
    if wrong or not leaves:
        found = repr(wrong[0]) if wrong else "nothing"
        raise ValueError(f"param_shardings must hold a NamedSharding a leaf; it holds {found}")
    mesh = leaves[0].mesh
    # Only Explicit axes carry shardings in types; the layout itself is the same.
    typed_mesh = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def typed(param: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            param.shape, param.dtype, sharding=NamedSharding(typed_mesh, sharding.spec)
        )

    shardings = broadcast_prefix("param_shardings", param_shardings, abstract_params)
    leaves, treedef = jax.tree.flatten(abstract_params)
    params = treedef.unflatten(map(typed, leaves, shardings))
    with jax.sharding.use_abstract_mesh(typed_mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `init` itself will say it
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
