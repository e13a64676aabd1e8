"""Where arrays live on a mesh: logical axes, and the rules that put them onto mesh axes.

Every axis of a parameter or an activation has a logical name. `ShardingRules` says for each name
which mesh axes split it, `Placement` joins the rules to a mesh, and parameters (`partition_specs`)
and activations (`constrain`) are laid out by the same ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxis = Literal["data", "fsdp", "tensor"]
BATCH_AXES: tuple[MeshAxis, ...] = ("data", "fsdp")
"""What splits the rows of a batch: fsdp is data parallelism whose parameters are also split."""
STREAM = ("batch", "length", "stream")
"""Logical axes of the residual stream."""
LOGITS = ("batch", None, "vocab")
"""Logical axes of the logits."""


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axes that split each logical axis; none: it is whole on every device.

    The defaults are Megatron's column and row split inside a layer (heads, hidden units and
    vocabulary over `tensor`), and fsdp on the side of the residual stream. A mesh axis is dropped
    where it does not divide the array, where an axis before it in the same array has taken it, and
    in activations where it already splits the batch. Three logical axes have no rule: `batch` lies
    over data and fsdp, which is what these mesh axes are; `layer` is never split, since its length
    need not divide and a matrix optimizer wants whole layers side by side; nor is `stream`, the
    width of the residual stream, for which XLA's partitioner has made wrong products.

    >>> ShardingRules(embed=("fsdp", "tensor"), hidden=()).axes_of("embed")
    ('fsdp', 'tensor')
    """

    embed: tuple[MeshAxis, ...] = ("fsdp",)
    """Of parameters: the side of a matrix or table on the residual stream."""
    vocab: tuple[MeshAxis, ...] = ("tensor",)
    """Entries of the vocabulary: rows of the token table, columns of the head, logits."""
    heads: tuple[MeshAxis, ...] = ("tensor",)
    """Attention heads, of kernels, biases and activations; a head is never cut."""
    kv_heads: tuple[MeshAxis, ...] = ("tensor",)
    """Heads of keys and values in the kernels and biases of grouped queries."""
    hidden: tuple[MeshAxis, ...] = ("tensor",)
    """Hidden units of an MLP, of kernels, biases and activations."""
    position: tuple[MeshAxis, ...] = ()
    """Rows of a learned position table."""
    length: tuple[MeshAxis, ...] = ()
    """Positions of the residual stream; `tensor` is Megatron's sequence parallelism, which keeps a
    part of the activations between layers on each device."""

    def axes_of(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis.

        Raises:
            ValueError: there is no such logical axis; names it.
        """
        if name in (None, "layer", "stream"):
            return ()
        if name == "batch":
            return BATCH_AXES
        known = [field.name for field in fields(self)]
        if name not in known:
            names = ", ".join(["batch", "layer", "stream", *known])
            raise ValueError(f"logical axis: got {name!r}, expected one of {names}")
        return getattr(self, name)


DEFAULT_RULES = ShardingRules()


@dataclass(frozen=True)
class Placement:
    """A mesh, and the rules by which arrays lie on it.

    Args:
        mesh: with axes among data, fsdp and tensor; one that is absent splits nothing.
        rules: of every array.

    Raises:
        ValueError: a rule has a mesh axis that nobody knows; names both.
    """

    mesh: Mesh
    rules: ShardingRules = DEFAULT_RULES

    def __post_init__(self) -> None:
        """Checks the names of mesh axes."""
        known = dict.fromkeys((*self.mesh.axis_names, "data", "fsdp", "tensor"))
        for field in fields(self.rules):
            for axis in getattr(self.rules, field.name):
                if axis not in known:
                    wanted = f"expected axes of the mesh: {', '.join(known)}"
                    raise ValueError(f"rules.{field.name}: got mesh axis {axis!r}, {wanted}")


OnMesh: TypeAlias = Mesh | Placement | None
"""Where activations are pinned to: a mesh alone has the default rules; None pins nothing."""


def placement(mesh: Mesh | Placement) -> Placement:
    """A mesh with its rules."""
    return mesh if isinstance(mesh, Placement) else Placement(mesh)


def is_single_cpu(mesh: OnMesh) -> bool:
    """Whether arrays lie on one CPU device, and nowhere else.

    Without a mesh only where there is no other device: a traced array does not tell where it is.
    """
    devices = jax.devices() if mesh is None else placement(mesh).mesh.devices.ravel()
    return len(devices) == 1 and devices[0].platform == "cpu"


def spec_for(
    axes: tuple[str | None, ...],
    counts: tuple[int, ...],
    mesh_sizes: Mapping[str, int],
    rules: ShardingRules = DEFAULT_RULES,
) -> PartitionSpec:
    """PartitionSpec of one array.

    Args:
        axes: logical name of each axis, None for an axis that is never sharded.
        counts: how many indivisible pieces each axis has; its length, except for fused heads.
        mesh_sizes: size of each mesh axis; one that is missing, 1, or does not divide is dropped.
        rules: mesh axes of each logical axis.

    Raises:
        ValueError: there is no such logical axis; names it.

    >>> tuple(spec_for(("vocab", "embed"), (64, 30), {"fsdp": 4, "tensor": 2}))
    ('tensor', None)
    """
    entries, used = [], set[str]()
    for name, count in zip(axes, counts, strict=True):
        kept: tuple[str, ...] = ()
        for axis in rules.axes_of(name):
            size = mesh_sizes.get(axis, 1)
            if size > 1 and axis not in used and count % (_size(kept, mesh_sizes) * size) == 0:
                kept += (axis,)
                used.add(axis)
        entries.append(kept[0] if len(kept) == 1 else kept or None)
    return PartitionSpec(*entries)


def _size(axes: tuple[str, ...], mesh_sizes: Mapping[str, int]) -> int:
    return math.prod(mesh_sizes[axis] for axis in axes)


def constrain(
    x: jax.Array,
    mesh: OnMesh,
    axes: tuple[str | None, ...],
    counts: tuple[int, ...] | None = None,
) -> jax.Array:
    """Pins an activation to the mesh, so that the compiler moves weights and not activations."""
    if mesh is None:
        return x
    placed = placement(mesh)
    if placed.mesh.size == 1:
        return x
    spec = spec_for(axes, counts or x.shape, dict(placed.mesh.shape), placed.rules)
    return jax.lax.with_sharding_constraint(x, NamedSharding(placed.mesh, spec))


def gathered(x: jax.Array, mesh: OnMesh) -> jax.Array:
    """The whole array on every device.

    For the weights in both passes of a custom rule: the compiler then gathers them once, where it
    would gather slices of them one by one, and the transposed weights again.
    """
    return constrain(x, mesh, (None,) * x.ndim)


def free_axes(mesh: OnMesh) -> dict[str, int]:
    """Axes of the mesh over which arrays may still be spread here, and their sizes.

    Those of a `jax.shard_map` around the caller are taken.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    sizes = {} if mesh is None else placement(mesh).mesh.shape
    return {axis: size for axis, size in sizes.items() if axis not in manual}


def free_spec(mesh: OnMesh, axes: tuple[str | None, ...], counts: tuple[int, ...]) -> PartitionSpec:
    """As `spec_for`, over the axes of the mesh that are free here."""
    rules = DEFAULT_RULES if mesh is None else placement(mesh).rules
    return spec_for(axes, counts, free_axes(mesh), rules)


def on_each_device(
    function: Callable[..., Any],
    arrays: Sequence[jax.Array],
    mesh: OnMesh,
    specs: tuple[PartitionSpec, ...],
    results: Any,
) -> Any:
    """Calls a function on the part of every array that a device has; nothing is exchanged.

    Compilers cannot split a kernel. Autodiff sums the gradient of an array over all devices that
    have the same part of it, which is right but an exchange; a custom rule around this needs none.

    Args:
        function: of as many arrays.
        arrays: to be split.
        mesh: over whose free axes they lie; None: one device has all of them.
        specs: how each array lies there, as from `free_spec`.
        results: the same of what the function returns.
    """
    free = free_axes(mesh)
    if mesh is None or not free or placement(mesh).mesh.size == 1:
        return function(*arrays)
    context, mesh = jax.sharding.get_abstract_mesh(), placement(mesh).mesh
    if AxisType.Explicit in mesh.axis_types:
        arrays = [
            jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
    return jax.shard_map(
        function,
        mesh=context if context.manual_axes else mesh,
        in_specs=specs,
        out_specs=results,
        axis_names=set(free),
        check_vma=False,
    )(*arrays)
