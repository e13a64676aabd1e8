"""Work on whole matrices of a sharded stack: each device owns some, works, and gives them back.

A stack (batch, ...) whose matrix axes are sharded is exchanged by one all-to-all a sharded axis, so
that every device holds whole matrices of a share of the batch; after the work the way back costs
the same. Nothing is gathered. GSPMD, left to itself inside an iteration of matrix products, inserts
an all-gather a product instead.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.precision import on_gpu

AxisNames = tuple[str, ...]

# An exchange among more devices goes in two stages, unless on GPUs, which are all as near to each
# other. The compiler for TPUs takes 15 s of processor time for each among 256 chips, below 1 s
# for two among 16; on a torus both send the same bytes over the links of a row and a column.
AT_ONCE = 64


def on_whole_matrices(
    fn: Callable[..., tuple[Array, ...]],
    operands: Sequence[Array],
    specs: Sequence[PartitionSpec],
    out_specs: Sequence[PartitionSpec],
    mesh: Mesh | AbstractMesh,
    *,
    share_over: Sequence[str] = (),
    scalars: Sequence[Any] = (),
    sources: Sequence[int] | None = None,
) -> tuple[Array, ...]:
    """Apply `fn` to whole matrices, each device to its own share of the batch.

    Args:
      fn: Maps arrays (b, ...) to a tuple of arrays (b, ...); entry i of every result may depend on
        entry i of the operands of its batch only. Padding entries are zero.
      operands: Arrays with a leading batch axis. An operand that is not sharded over a mesh axis
        that another one is sharded over is sliced (no communication).
      specs: How each operand is laid out. Entries of the leading axis stay as they are: where it is
        sharded, each device works on its own share.
      out_specs: How each result shall be laid out; a result that is replicated over an exchanged
        mesh axis is all-gathered, so keep these small (one number a matrix).
      mesh: The mesh of the specs.
      share_over: Mesh axes over which all operands are replicated and the work shall be divided
        rather than repeated, at the price of one all-gather of the results.
      scalars: Further arguments of `fn`, replicated trees. Traced numbers must come this way: a
        function cannot take them along onto a mesh with Explicit axes.
      sources: For each result the index of an operand that has its batch; None: all have one.

    Raises:
      ValueError: Two operands are sharded over the same mesh axes in a different order.
    """
    batch = next((spec[0] for spec in specs if len(spec) and spec[0] is not None), None)
    moved = exchanged_axes((*specs, *out_specs))
    if batch is None and not moved and not share_over:
        return fn(*operands, *scalars)
    order = (*moved, *((name,) for name in share_over))
    owners = math.prod(mesh.shape[name] for names in order for name in names)

    def local(*arguments: Any) -> tuple[Array, ...]:
        blocks, numbers = arguments[: len(operands)], arguments[len(operands) :]
        sizes = [blocks[i].shape[0] for i in sources or [0] * len(out_specs)]
        blocks = tuple(
            jnp.pad(x, ((0, -x.shape[0] % owners),) + ((0, 0),) * (x.ndim - 1)) for x in blocks
        )
        whole = [_take(x, spec, order, mesh) for x, spec in zip(blocks, specs, strict=True)]
        results = fn(*whole, *numbers)
        back = [
            _give_back(y, spec, order, mesh) for y, spec in zip(results, out_specs, strict=True)
        ]
        return tuple(y[:size] for y, size in zip(back, sizes, strict=True))

    def with_batch(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(batch, *spec[1:])

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*map(with_batch, specs), *(PartitionSpec() for _ in scalars)),
        out_specs=tuple(with_batch(spec) for spec in out_specs),
        # Results of replicated operands are replicated by construction; the checker cannot see it.
        check_vma=False,
    )(*operands, *scalars)


def _names(entry) -> AxisNames:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def exchanged_axes(specs: Sequence[PartitionSpec]) -> list[AxisNames]:
    """Mesh axes by which matrix axes are sharded, as exchanged: one tuple an array axis."""
    found: list[AxisNames] = []
    for spec in specs:
        for entry in spec[1:]:
            if entry is not None and _names(entry) not in found:
                found.append(_names(entry))
    flat = [name for names in found for name in names]
    if len(flat) != len(set(flat)):
        raise ValueError(
            f"the operands are sharded over the same mesh axes in different ways: {tuple(specs)}"
        )
    return found


def _array_axis(spec: PartitionSpec, names: AxisNames) -> int | None:
    for axis, entry in enumerate(spec):
        if axis > 0 and entry is not None and _names(entry) == names:
            return axis
    return None


def _take(x: Array, spec: PartitionSpec, order: Sequence[AxisNames], mesh) -> Array:
    for names in order:
        axis = _array_axis(spec, names)
        if axis is not None:
            x = _all_to_all(x, names, 0, axis, mesh)
        else:
            share = x.shape[0] // math.prod(mesh.shape[name] for name in names)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * share, share)
    return x


def _give_back(y: Array, spec: PartitionSpec, order: Sequence[AxisNames], mesh) -> Array:
    for names in reversed(order):
        axis = _array_axis(spec, names)
        if axis is not None:
            y = _all_to_all(y, names, axis, 0, mesh)
        else:
            y = lax.all_gather(y, names, axis=0, tiled=True)
    return y


def _all_to_all(x: Array, names: AxisNames, split: int, concat: int, mesh) -> Array:
    """The part of `x` for each device goes there; what comes is put together in their order."""
    devices = math.prod(mesh.shape[name] for name in names)
    columns = max(n for n in range(1, math.isqrt(devices) + 1) if devices % n == 0)
    if devices <= AT_ONCE or columns == 1 or len(names) > 1 or on_gpu():
        return lax.all_to_all(x, names, split_axis=split, concat_axis=concat, tiled=True)
    # Device i is in row i // columns. The parts for a row, to its device in the same column; there
    # the parts for each column, along the row.
    grid = np.arange(devices).reshape(-1, columns)
    shape = list(x.shape)
    shape[split : split + 1] = [*grid.shape, shape[split] // devices]
    parts = jnp.moveaxis(x.reshape(shape), (split, split + 1), (0, 1))
    for axis, groups in enumerate((grid.T, grid)):
        parts = lax.all_to_all(
            parts, names, split_axis=axis, concat_axis=axis, tiled=True,
            axis_index_groups=groups.tolist(),
        )  # fmt: skip
    parts = jnp.moveaxis(parts.reshape(devices, *parts.shape[2:]), 0, concat)
    shape = list(parts.shape)
    shape[concat : concat + 2] = [shape[concat] * shape[concat + 1]]
    return parts.reshape(shape)
