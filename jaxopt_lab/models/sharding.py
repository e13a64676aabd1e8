"""Where arrays live on a mesh with axes data, fsdp and tensor.

A rule maps the logical name of an axis to mesh axes. Matrix axes on the side of the residual
stream go to ``fsdp``, heads, hidden units and vocabulary to ``tensor`` (Megatron's column and row
split), the batch to ``data`` and ``fsdp`` together. The layer axis is never sharded: its length
need not divide, and a matrix optimizer wants whole layers side by side.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...]]

DEFAULT_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "hidden": "tensor",
}


def spec_for(
    axes: tuple[str | None, ...],
    counts: tuple[int, ...],
    mesh_sizes: Mapping[str, int],
    rules: Rules = DEFAULT_RULES,
) -> PartitionSpec:
    """PartitionSpec of one array.

    Args:
        axes: logical name of each axis, None for an axis that is never sharded.
        counts: how many indivisible pieces each axis has; its length, except for fused heads.
        mesh_sizes: size of each mesh axis; one that is missing, 1, or does not divide is dropped.
        rules: logical name to mesh axis or axes.

    >>> tuple(spec_for(("vocab", "embed"), (64, 30), {"fsdp": 4, "tensor": 2}))
    ('tensor', None)
    """
    entries = []
    for name, count in zip(axes, counts, strict=True):
        wanted = rules.get(name, ()) if name is not None else ()
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        kept: tuple[str, ...] = ()
        for axis in wanted:
            pieces = math.prod(mesh_sizes[a] for a in kept) * mesh_sizes.get(axis, 1)
            if mesh_sizes.get(axis, 1) > 1 and count % pieces == 0:
                kept += (axis,)
        entries.append(kept[0] if len(kept) == 1 else kept or None)
    return PartitionSpec(*entries)


def constrain(
    x: jax.Array,
    mesh: Mesh | None,
    axes: tuple[str | None, ...],
    counts: tuple[int, ...] | None = None,
) -> jax.Array:
    """Pins an activation to the mesh, so that the compiler moves weights and not activations."""
    if mesh is None or mesh.size == 1:
        return x
    spec = spec_for(axes, counts or x.shape, dict(mesh.shape))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
