"""SOAP with one factor an axis, for leaves of any order: Adam in the eigenbases of mode Grams.

This is what SOAP and DyKAF do, if asked to, with parameters of more than two axes for which there
is no layout. A leaf is a stack of one; the step is that of matrices.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.modes import merged_shape
from jaxopt_lab.core.numerics import wide_dtype, widened
from jaxopt_lab.core.stacks import Slot
from jaxopt_lab.core.whole_matrices import known_sharding
from jaxopt_lab.optim.kronecker.factors import GramFactors
from jaxopt_lab.optim.kronecker.leaves import Arrays, Leaves
from jaxopt_lab.optim.kronecker.step import REFUSED, EigenbasisAdam
from jaxopt_lab.optim.options import Eigenbasis


class TensorSoapState(NamedTuple):
    """State of the leaves that SOAP and DyKAF give one factor an axis; float32 or wider.

    Trees like the parameters; of factors and bases one tree for each (merged) axis.
    """

    count: Array  # shape=(), dtype=int32: gradients seen
    age: Any  # a leaf (), int32: 0 before its first gradient, then 1 + updates applied
    notfinite_count: Any  # a leaf (), int32: gradients refused: not finite, or too large
    mu: Any  # shapes of the parameters: first moment in the current eigenbases
    nu: Any  # shapes of the parameters: second moment in the eigenbases
    factors: tuple[Any, ...]  # (d, d), MaskedNode() where a leaf has no such axis or no factor
    bases: tuple[Any, ...]  # the same: eigenvectors as columns, by decreasing eigenvalue


class TensorLayout:
    """A leaf as a stack of one, whole on every device; what `Leaves` asks of a layout."""

    mesh, is_sharded = None, False

    def __init__(self, x: Any, merged: tuple[int, ...]) -> None:
        """From the leaf and its shape with axes merged."""
        self._leaf, self.sides = x, merged

    def slots(self) -> dict[str, Slot]:
        """The slots of all arrays, by name; see `LeafLayout.slots`."""

        def slot(*inner: int) -> Slot:
            return Slot(inner, inner, PartitionSpec())

        slots = {name: slot(*self.sides) for name in ("grad", "direction", "mu", "nu")}
        slots |= {name: slot() for name in ("age", "status")}
        for k, size in enumerate(self.sides):
            names = (f"{old}{what}{k}" for old in ("", "old_") for what in ("factor", "basis"))
            slots |= dict.fromkeys(names, slot(size, size)) | {f"order{k}": slot(size)}
        return slots

    def view(self, x: Array) -> Array:
        """The leaf, or an array of its shape, as a stack."""
        sharding = known_sharding(x, None)
        if sharding is not None:
            x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
        return x.reshape((1, *self.sides))

    def undo_view(self, y: Array) -> Array:
        """Inverse of `view`."""
        y = y.reshape(self._leaf.shape)
        sharding = known_sharding(self._leaf, None)
        return y if sharding is None else jax.sharding.reshard(y, sharding)


def tensor_direction(
    method: EigenbasisAdam,
    eigenbasis: Eigenbasis,
    *,
    merge_dims: bool = False,
    vectors: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of SOAP in the eigenbases of one Gram factor an axis, NaN without a step.

    With the unfolding $G_{(k)}$ of a gradient along its axis $k$ and the bases $Q_k$ in force,

    $$\tilde G = G \times_1 Q_1^\top \dotsm \times_d Q_d^\top, \qquad
    U = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
        \frac{\tilde M}{\sqrt V + \epsilon} \times_1 Q_1 \dotsm \times_d Q_d, \qquad
    X_k \leftarrow \beta X_k + (1 - \beta) G_{(k)} G_{(k)}^\top$$

    with the averages $\tilde M$ of $\tilde G$ and $V$ of its square. All else is as for matrices in
    `scale_by_soap`, with products in float32 or wider.

    Args:
      method: SOAP or DyKAF.
      eigenbasis: For `max_precond_dim`: longer axes have no factor and stay as they are.
      merge_dims: Multiply axes together from the left while the product is within that limit.
      vectors: Whether leaves of one axis have a factor.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321, and
    its released code; the same rule is in the released code of DyKAF, arXiv 2511.06477.
    """
    limit = eigenbasis.max_precond_dim
    method = replace(
        method,
        rule=GramFactors(method.rule.decay, "highest"),
        second_moment="full",
        stagger=False,
        factor_precision="highest",
        rotation_precision="highest",
    )

    def layouts_of(leaves: list[Any]) -> list[TensorLayout]:
        shapes = [merged_shape(x.shape, limit) if merge_dims and limit > 0 else x.shape
                  for x in leaves]  # fmt: skip
        return list(map(TensorLayout, leaves, shapes))

    def init(params: optax.Params) -> TensorSoapState:
        leaves, treedef = jax.tree.flatten(params)
        layouts = layouts_of(leaves)

        def modes(scale: float) -> tuple[Any, ...]:
            def side(x: Any, layout: TensorLayout, k: int) -> Any:
                size = layout.sides[k] if k < len(layout.sides) else 0
                if 0 < size <= limit and (vectors or len(x.shape) > 1):
                    return scale * jnp.eye(size, dtype=wide_dtype(x))
                return optax.MaskedNode()

            return tuple(
                treedef.unflatten([side(*pair, k) for pair in zip(leaves, layouts, strict=True)])
                for k in range(max((len(x.sides) for x in layouts), default=0))
            )

        def zeros() -> Any:
            return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x)), params)

        def counts() -> Any:
            return jax.tree.map(lambda _: jnp.zeros([], jnp.int32), params)

        return TensorSoapState(
            count=jnp.zeros([], jnp.int32),
            age=counts(),
            notfinite_count=counts(),
            mu=zeros(),
            nu=zeros(),
            factors=modes(0.0),
            bases=modes(1.0),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        layouts = layouts_of(leaves)
        arrays = _arrays(state, treedef, layouts)
        grads = [layout.view(widened(g)) for layout, g in zip(layouts, leaves, strict=True)]
        directions, arrays = method.step(state.count, Leaves.of(layouts), arrays, grads)
        undone = [layout.undo_view(d) for layout, d in zip(layouts, directions, strict=True)]
        return treedef.unflatten(undone), _stored(state, treedef, layouts, arrays)

    return optax.GradientTransformationExtraArgs(init, update)


def _arrays(state: TensorSoapState, treedef: Any, layouts: list[TensorLayout]) -> Arrays:
    """The state by name, as stacks."""

    def stacked(tree: Any) -> list[Any]:
        leaves = treedef.flatten_up_to(tree)
        return [None if isinstance(x, optax.MaskedNode) else x[None] for x in leaves]

    def viewed(tree: Any) -> list[Any]:
        return [
            layout.view(x) for layout, x in zip(layouts, treedef.flatten_up_to(tree), strict=True)
        ]

    unused = [None] * len(layouts)
    arrays: Arrays = {"age": stacked(state.age), "mu": viewed(state.mu), "nu": viewed(state.nu)}
    arrays |= {"row_nu": unused, "column_nu": unused}
    arrays |= {f"factor{k}": stacked(tree) for k, tree in enumerate(state.factors)}
    return arrays | {f"basis{k}": stacked(tree) for k, tree in enumerate(state.bases)}


def _stored(
    state: TensorSoapState, treedef: Any, layouts: list[TensorLayout], arrays: Arrays
) -> TensorSoapState:
    def unstacked(name: str) -> Any:
        return treedef.unflatten([optax.MaskedNode() if x is None else x[0] for x in arrays[name]])

    def unviewed(name: str) -> Any:
        pairs = zip(layouts, arrays[name], strict=True)
        return treedef.unflatten([layout.undo_view(x) for layout, x in pairs])

    refused = [(x[0] == REFUSED).astype(jnp.int32) for x in arrays["status"]]
    counts = zip(treedef.flatten_up_to(state.notfinite_count), refused, strict=True)
    return TensorSoapState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        age=unstacked("age"),
        notfinite_count=treedef.unflatten([a + b for a, b in counts]),
        mu=unviewed("mu"),
        nu=unviewed("nu"),
        factors=tuple(unstacked(f"factor{k}") for k in range(len(state.factors))),
        bases=tuple(unstacked(f"basis{k}") for k in range(len(state.bases))),
    )
