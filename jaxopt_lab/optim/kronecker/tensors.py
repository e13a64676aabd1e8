"""SOAP with one factor an axis, for leaves of any order: Adam in the eigenbases of mode Grams.

This is what SOAP and DyKAF do, if asked to, with parameters of more than two axes for which there
is no layout. A leaf is a stack of one; the step is that of matrices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.numerics import wide_dtype
from jaxopt_lab.optim.kronecker.factors import GramFactors
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.kronecker.transform import direction_of_step
from jaxopt_lab.optim.matrix_leaves import LeafLayout, MatrixLeaves
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

    def by_name(self) -> dict[str, Any]:
        """As of `EigenbasisAdamState`."""
        trees: dict[str, Any] = {"age": self.age, "mu": self.mu, "nu": self.nu}
        trees |= dict.fromkeys(("nu.0", "nu.1"), optax.MaskedNode())
        trees |= {f"factor.{k}": tree for k, tree in enumerate(self.factors)}
        return trees | {f"basis.{k}": tree for k, tree in enumerate(self.bases)}

    def with_names(self, trees: Mapping[str, Any], **others: Any) -> "TensorSoapState":
        """As of `EigenbasisAdamState`."""
        others |= {name: trees[name] for name in ("age", "mu", "nu")}
        order = range(len(self.factors))
        factors, bases = ([trees[f"{what}.{k}"] for k in order] for what in ("factor", "basis"))
        return self._replace(factors=tuple(factors), bases=tuple(bases), **others)


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
    precisions = dict.fromkeys(("factor_precision", "rotation_precision"), "highest")
    basis = replace(eigenbasis, second_moment="full", stagger=False, **precisions)
    rule = GramFactors(method.rule.decay, "highest")
    method = replace(method, rule=rule, eigenbasis=basis)

    def leaves_of(tree: Any) -> MatrixLeaves:
        leaves, treedef = jax.tree.flatten(tree)
        merges = merge_dims and limit > 0
        layouts = [_layout(x, limit if merges else 0) for x in leaves]
        return MatrixLeaves.with_sides(layouts, treedef)

    def init(params: optax.Params) -> TensorSoapState:
        layouts, _, treedef = leaves_of(params)

        def modes(scale: float) -> tuple[Any, ...]:
            def side(x: LeafLayout, k: int) -> Any:
                size = x.sides[k] if k < len(x.sides) else 0
                if 0 < size <= limit and (vectors or len(x.shape) > 1):
                    return scale * jnp.eye(size, dtype=x.dtype)
                return optax.MaskedNode()

            order = max((len(x.sides) for x in layouts), default=0)
            return tuple(treedef.unflatten([side(x, k) for x in layouts]) for k in range(order))

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

    return direction_of_step(method, leaves_of, init)


def merged_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Multiply axes together from the left while the product is at most `limit`; 1 is left out.

    Args:
      shape: Of an array in C order.
      limit: Largest product; an axis that is longer stays alone.

    Example:
      >>> merged_shape((2, 3, 2, 2), 15), merged_shape((6, 40), 15), merged_shape((40, 1), 15)
      ((12, 2), (6, 40), (40,))
    """
    merged: list[int] = []
    for d in shape:
        if merged and merged[-1] * d <= limit:
            merged[-1] *= d
        elif d != 1:
            merged.append(d)
    return tuple(merged or shape[:1])


def _layout(x: Any, limit: int) -> LeafLayout:
    """A leaf as one entry, with neighbouring axes merged up to a limit, whole on every device."""
    sides = merged_shape(x.shape, limit) if limit else x.shape
    axes = MatrixAxes((), tuple(range(len(x.shape))), ())
    return LeafLayout(x, axes, sides=sides, gathers=True)
