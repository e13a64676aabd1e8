"""Matrix views of parameter leaves.

A leaf becomes a stack of matrices by naming its reduction and its output axes; all other axes are
batch. The layout is any object with `reduction_axis` and `output_axis` (an int or a sequence of
ints each), such as `optax.contrib.MuonDimensionNumbers`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Shaped


@runtime_checkable
class MatrixLayout(Protocol):
    """Which axes of a leaf form the rows and which the columns of its matrices."""

    @property
    def reduction_axis(self) -> Sequence[int] | int: ...  # noqa: D102
    @property
    def output_axis(self) -> Sequence[int] | int: ...  # noqa: D102


class MatrixAxes(NamedTuple):
    """A layout resolved for one leaf: non-negative axes, every axis in exactly one group."""

    batch: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(number of matrices, rows, columns) of a leaf of this shape."""
        batch, rows, columns = (math.prod(shape[a] for a in axes) for axes in self)
        return batch, rows, columns


def resolve_layout(shape: Sequence[int], layout: MatrixLayout) -> MatrixAxes:
    """Resolve negative axes and check that the layout fits the shape.

    Args:
      shape: Shape of the leaf.
      layout: Which axes are rows (reduction) and columns (output).

    Raises:
      ValueError: An axis is out of range or named twice, or a side is empty.
    """
    ndim = len(shape)

    def normalise(axes: Any) -> tuple[int, ...]:  # integers of NumPy as well
        axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise ValueError(f"axis {axis} of {layout} is outside a leaf of shape {shape}")
        return tuple(int(axis) % ndim for axis in axes)

    reduction, output = normalise(layout.reduction_axis), normalise(layout.output_axis)
    used = reduction + output
    if not reduction or not output or len(set(used)) != len(used):
        raise ValueError(
            f"{layout} must name at least one reduction and one output axis, each axis once; "
            f"got reduction {reduction} and output {output} for a leaf of shape {tuple(shape)}"
        )
    batch = tuple(axis for axis in range(ndim) if axis not in used)
    return MatrixAxes(batch, reduction, output)


def batch_first(x: Shaped[Array, "..."], axes: MatrixAxes) -> Shaped[Array, "batch ..."]:
    """View a leaf as (batch, *reduction axes, *output axes); only the batch axes are merged.

    The inner axes stay apart because a sharded one among them could not be merged without moving
    data: (d, heads, head_dim) with sharded heads, say.
    """
    inner = tuple(x.shape[a] for a in axes.reduction + axes.output)
    moved = x.transpose(axes.batch + axes.reduction + axes.output)
    return moved.reshape((math.prod(x.shape[a] for a in axes.batch), *inner))
