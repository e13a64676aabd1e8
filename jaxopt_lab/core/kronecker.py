r"""Kronecker approximation of a second-moment matrix, without ever forming that matrix.

For gradients $G$ of shape (m, n) the second moment $F$ of $\operatorname{vec}(G)$ (row-major) is
(mn, mn). Its rearrangement $\mathcal R(F)$, of shape (m², n²), turns Kronecker products into
rank-one matrices, $\mathcal R(L \otimes R) = \operatorname{vec}(L) \operatorname{vec}(R)^\top$, and
keeps the Frobenius norm; so the best $L \otimes R$ is the best rank-one approximation of
$\mathcal R(F)$. For one gradient the products with it are matrix products of the size of $G$:

$$
\mathcal R(\operatorname{vec} G \operatorname{vec} G^\top) \operatorname{vec} X
  = \operatorname{vec}(G X G^\top), \qquad
\mathcal R(\operatorname{vec} G \operatorname{vec} G^\top)^\top \operatorname{vec} Y
  = \operatorname{vec}(G^\top Y G)
$$

An integrator advances $(L, R)$ towards the target

$$
A = \beta \operatorname{vec}(L) \operatorname{vec}(R)^\top
  + w \, \mathcal R(\operatorname{vec} G \operatorname{vec} G^\top)
$$

and returns a balanced pair: $\lVert L \rVert = \lVert R \rVert$, both symmetric and positive
semidefinite. Everything is computed from matrices of norm at most 1 and two such weights, so that
neither tiny nor huge gradients leave the range of float32.

Source: Yudin, Grishina, Veprikov, Beznosikov and Rakhuba, "DyKAF: Dynamical Kronecker Approximation
of the Fisher Information Matrix for Gradient Preconditioning", arXiv 2511.06477; Lubich and
Oseledets, "A projector-splitting integrator for dynamical low-rank approximation"; Ceruti and
Lubich, "An unconventional robust integrator for dynamical low-rank approximation", arXiv
2010.02022.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_lab.core.numerics import Scalar, frobenius_norm
from jaxopt_lab.core.precision import ProductPrecision, congruence
from jaxopt_lab.core.spectral import leading_singular_triple

Integrator = Literal["ksl", "parallel"]
StartScale = Literal["sigma", "sqrt_sigma"]


_SIDES = (-2, -1)


def rearrange(fisher: Float[Array, "mn mn"], rows: int, columns: int) -> Float[Array, "mm nn"]:
    """The rearrangement of a small second-moment matrix, formed in full.

    Args:
      fisher: Second moment of the row-major vec of (rows, columns) matrices.
      rows: m.
      columns: n.

    Example:
      >>> left, right = jnp.eye(2), jnp.ones((3, 3))
      >>> bool(jnp.all(rearrange(jnp.kron(left, right), 2, 3) == jnp.outer(left, right)))
      True
    """
    blocks = fisher.reshape(rows, columns, rows, columns)
    return blocks.swapaxes(1, 2).reshape(rows * rows, columns * columns)


def ksl_step(
    left: Float[Array, "*batch m m"],
    right: Float[Array, "*batch n n"],
    grad: Float[Array, "*batch m n"],
    *,
    decay: Scalar,
    weight: Scalar,
    precision: ProductPrecision = "highest",
    balanced: bool = False,
) -> tuple[Float[Array, "*batch m m"], Float[Array, "*batch n n"]]:
    r"""One step of sequential projector splitting (K, S and L substeps) at rank one.

    The backward S-step cancels all but the overlap of the new left factor with the old one:

    $$
    U = \frac{A \operatorname{vec} R}{\lVert A \operatorname{vec} R \rVert}, \qquad
    L' \otimes R' = U \otimes \left(\beta \langle U, L \rangle R + w \, G^\top U G\right)
    $$

    That is an orthogonal projection of the target: the right factor is the best one for $U$.

    Args:
      left: $L$, the factor of the rows.
      right: $R$, the factor of the columns.
      grad: $G$.
      decay: $\beta$, of the product $L \otimes R$.
      weight: $w$ of the new gradient.
      precision: Of the products.
      balanced: Whether the factors are known to have equal norms, so that the norm of the smaller
        one does for both.

    Returns:
      The balanced pair $(L', R')$, symmetric up to rounding (of bfloat16 where split products
      are formed, see `precision.gram`; their symmetric parts have the accuracy of the name).
    """
    step = _Increment(left, right, grad, decay, weight, balanced)
    x = step.rows(precision)
    u_size = frobenius_norm(x, _SIDES)
    # Of x, so that norm and overlap are found in one reading of these matrices.
    overlap = _divide(_divide(_inner(x, left), u_size), step.left_size)
    u = _divide(x, u_size)
    seen = congruence(step.grad_unit, u, precision, transpose=True)
    n = _divide(step.old * overlap * right, step.right_size) + step.new * seen
    size = frobenius_norm(n, _SIDES)
    root = step.root_scale * jnp.sqrt(size)
    return root * u, root * _divide(n, size)


def parallel_step(
    left: Float[Array, "*batch m m"],
    right: Float[Array, "*batch n n"],
    grad: Float[Array, "*batch m n"],
    *,
    decay: Scalar,
    weight: Scalar,
    precision: ProductPrecision = "highest",
    balanced: bool = False,
) -> tuple[Float[Array, "*batch m m"], Float[Array, "*batch n n"]]:
    r"""One step of basis update and Galerkin: both factors from the old ones, then one number.

    $$
    U \propto A \operatorname{vec} R, \qquad V \propto A^\top \operatorname{vec} L, \qquad
    L' \otimes R' = \left(\operatorname{vec}(U)^\top A \operatorname{vec}(V)\right) U \otimes V
    $$

    What the released code of DyKAF runs; never more accurate than `ksl_step` from the same state.
    Arguments and results as there.
    """
    step = _Increment(left, right, grad, decay, weight, balanced)
    u = _unit(step.rows(precision))
    v = _unit(step.columns(precision))
    kept = _divide(_inner(left, u), step.left_size) * _divide(_inner(right, v), step.right_size)
    gained = _inner(u, congruence(step.grad_unit, v, precision))
    # Not negative but for rounding; a floor rather than 0, which no factor would ever leave.
    fit = jnp.maximum(step.old * kept + step.new * gained, jnp.finfo(left.dtype).eps)
    root = step.root_scale * jnp.sqrt(fit)
    return root * u, root * v


INTEGRATORS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "ksl": ksl_step,
    "parallel": parallel_step,
}


def nearest_kronecker(
    grad: Float[Array, "*batch m n"], scale: StartScale = "sigma"
) -> tuple[Float[Array, "*batch m m"], Float[Array, "*batch n n"]]:
    r"""The best Kronecker approximation of one gradient's second moment.

    With the leading singular triple $(\sigma, u, v)$ of $G$ it is $\sigma u u^\top \otimes
    \sigma v v^\top$: "sigma". The released code has $\sqrt\sigma$ in place of both $\sigma$:
    "sqrt_sigma".

    Args:
      grad: $G$; a zero matrix gives zero factors.
      scale: What multiplies the outer products.
    """
    sigma, u, v = leading_singular_triple(grad)
    size = sigma if scale == "sigma" else jnp.sqrt(sigma)

    def outer(x: Array) -> Array:
        return size[..., None, None] * x[..., :, None] * x[..., None, :]

    return outer(u), outer(v)


def rank_one_step(
    row: Float[Array, "*batch m"],
    column: Float[Array, "*batch n"],
    squares: Float[Array, "*batch m n"],
    *,
    decay: Scalar,
) -> tuple[Float[Array, "*batch m"], Float[Array, "*batch n"]]:
    r"""`parallel_step` for $V \approx l r^\top$, towards $\beta l r^\top + (1 - \beta) P$.

    Args:
      row: $l$, positive.
      column: $r$, positive.
      squares: $P$, non-negative.
      decay: $\beta$.

    Returns:
      The balanced pair $(l', r')$.
    """
    l_size, r_size = _length(row), _length(column)
    l_unit, r_unit = _divide(row, l_size), _divide(column, r_size)
    largest = jnp.max(squares, axis=(-2, -1), keepdims=True)
    p_unit = _divide(squares, largest)
    kept = decay * l_size * r_size
    gained = (1 - decay) * largest[..., 0]
    total = kept + gained
    old, new = _divide(kept, total), _divide(gained, total)
    x = old * l_unit + new * jnp.einsum("...mn,...n->...m", p_unit, r_unit, precision="highest")
    y = old * r_unit + new * jnp.einsum("...mn,...m->...n", p_unit, l_unit, precision="highest")
    x, y = _divide(x, _length(x)), _divide(y, _length(y))
    overlaps = jnp.sum(x * l_unit, -1, keepdims=True) * jnp.sum(y * r_unit, -1, keepdims=True)
    fit = jnp.einsum("...m,...mn,...n->...", x, p_unit, y, precision="highest")[..., None]
    root = jnp.sqrt(total * (old * overlaps + new * fit))
    return root * x, root * y


def symmetric(x: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The symmetric part."""
    return (x + x.mT) / 2


class _Increment:
    """The target of a step in units in which nothing under- or overflows.

    A = root_scale^2 * (old * unit old approximation + new * unit increment), old + new = 1.
    The factors enter products as they are and the small results are scaled: a scaled copy of them
    would cost as much memory traffic as the product.
    """

    def __init__(
        self,
        left: Array,
        right: Array,
        grad: Array,
        decay: Scalar,
        weight: Scalar,
        balanced: bool,
    ):
        self.left, self.right = left, right
        if balanced:
            smaller = left if left.shape[-1] <= right.shape[-1] else right
            self.left_size = self.right_size = frobenius_norm(smaller, _SIDES)
        else:
            self.left_size, self.right_size = (
                frobenius_norm(left, _SIDES),
                frobenius_norm(right, _SIDES),
            )
        largest = jnp.max(jnp.abs(grad), axis=(-2, -1), keepdims=True, initial=0)
        # At least the norm, and a reading of the gradient less.
        size = largest * math.sqrt(grad.shape[-2] * grad.shape[-1])
        self.grad_unit = _divide(grad, size)
        # Roots, so that the squares of tiny and of huge gradients are never formed.
        kept = jnp.sqrt(decay) * jnp.sqrt(self.left_size) * jnp.sqrt(self.right_size)
        gained = jnp.sqrt(weight) * size
        self.root_scale = jnp.hypot(kept, gained)
        self.old = jnp.square(_divide(kept, self.root_scale))
        self.new = jnp.square(_divide(gained, self.root_scale))

    def rows(self, precision: ProductPrecision) -> Array:
        """A vec(R) up to a positive factor."""
        seen = congruence(self.grad_unit, self.right, precision)
        return _divide(self.old * self.left, self.left_size) + _divide(
            self.new * seen, self.right_size
        )

    def columns(self, precision: ProductPrecision) -> Array:
        """A^T vec(L) up to a positive factor."""
        seen = congruence(self.grad_unit, self.left, precision, transpose=True)
        return _divide(self.old * self.right, self.right_size) + _divide(
            self.new * seen, self.left_size
        )


def _inner(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=(-2, -1), keepdims=True)


def _length(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def _divide(x: Array, size: Array) -> Array:
    """Quotient, and 0 where the size is 0, or subnormal: its inverse may overflow."""
    normal = size >= jnp.finfo(size.dtype).tiny
    return x * jnp.where(normal, 1 / jnp.where(normal, size, 1), 0)


def _unit(x: Array) -> Array:
    return _divide(x, frobenius_norm(x, _SIDES))
