r"""LoRSum: the best rank-r approximation of a sum of low-rank matrices, without forming the sum.

Matrices are kept as products $P Q$ of a tall and a wide factor, in the orientation of a kernel
(inputs, outputs). The gradient of a kernel is such a product as well: $X^\top S$ with the inputs
$X$ of its layer and the gradients $S$ at its outputs, one row for each token.

Everything is computed in float32 or wider, at full precision of the products. All functions take
one matrix; `jax.vmap` makes them work on stacks.

Source: "Beyond SGD, Without SVD: Proximal Subspace Iteration LoRA with Diagonal Fractional K-FAC",
arXiv 2602.16456, and its released code, zeligism/PSI-LoRA.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from jaxopt_lab.core.numerics import Scalar, widened
from jaxopt_lab.core.precision import matmul

_SQUARE_ROOT_STEPS = 6
_SMALLEST_EIGENVALUE = 1e-12


class Pair(NamedTuple):
    """The matrix `left @ right`."""

    left: Float[Array, "n k"]
    right: Float[Array, "k m"]


class Metric(NamedTuple):
    """Positive weights of the rows and the columns of a matrix: diagonals, or dense matrices."""

    rows: Float[Array, "n *n"]
    columns: Float[Array, "m *m"]


def low_rank_sum(
    pairs: Sequence[Pair],
    coefficients: Sequence[Scalar],
    *,
    sweeps: int = 1,
    proximal: Scalar = 0.0,
    jitter: float = 1e-6,
    metric: Metric | None = None,
    start: Literal["left", "right"] = "left",
) -> Pair:
    r"""LoRSum, and F-LoRSum with a metric: sweeps of regularised alternating least squares.

    With $T = c_0 A_0 B_0 + \sum_{j \geq 1} c_j M_r^{-1} P_j Q_j M_c^{-1}$ it descends on

    $$\tfrac12 \lVert M_r^{1/2} (A B - T) M_c^{1/2} \rVert^2
      + \tfrac{\lambda}{2} \lVert M_r^{1/2} (A - A_0) \rVert^2
      + \tfrac{\lambda}{2} \lVert (B - B_0) M_c^{1/2} \rVert^2$$

    from $(A_0, B_0)$, the first pair, minimising over one factor at a time:

    $$A \leftarrow \Big(\lambda A_0 + c_0 A_0 (B_0 M_c B^\top) + \sum_j c_j M_r^{-1} P_j (Q_j
      B^\top)\Big) (B M_c B^\top + (\lambda + \epsilon) I)^{-1}$$

    and likewise $B$ with the new $A$. Without regularisation this is subspace iteration with $T$.

    Args:
      pairs: The centre $(A_0, B_0)$, of rank r, and the other terms of the sum, of any ranks.
      coefficients: One number a pair.
      sweeps: Rounds over both factors; 0 updates both from the old ones (Jacobi).
      proximal: $\lambda$, the pull towards the centre, which stays where it is for all sweeps.
      jitter: $\epsilon$, added to every matrix before its Cholesky decomposition, dense metrics
        included. 0 is exact, and fails for factors that are rank-deficient with $\lambda = 0$.
      metric: $M_r$ and $M_c$; None: identities.
      start: The factor that moves first.

    Returns:
      The new pair, in the wide dtype. NaN where a matrix had no Cholesky decomposition.

    Raises:
      ValueError: Another number of coefficients than of pairs, or negative sweeps.

    >>> eye, sigma = jnp.eye(3), jnp.diag(jnp.array([3.0, 1.0, 0.5]))
    >>> start = Pair(jnp.ones((3, 1)), jnp.ones((1, 3)))
    >>> found = low_rank_sum([start, Pair(sigma, eye)], [0.0, 1.0], sweeps=20)
    >>> jnp.round(found.left @ found.right, 4).diagonal().tolist()
    [3.0, 0.0, 0.0]
    """
    if len(pairs) != len(coefficients):
        raise ValueError(f"got {len(coefficients)} coefficients for {len(pairs)} pairs")
    if sweeps < 0:
        raise ValueError(f"sweeps: got {sweeps}, wanted an integer >= 0")
    centre, *others = (Pair(*map(widened, pair)) for pair in pairs)
    rows, columns = (None, None) if metric is None else metric
    c0, *rest = coefficients

    # Only the other terms are divided by the metric, each on the side that the sub-problem leaves;
    # their products with a factor, that is, which are smaller than they are.
    def left(b: Array) -> Array:
        weighted = jnp.matrix_transpose(_times(jnp.matrix_transpose(b), columns))
        total = proximal * centre.left
        total += c0 * _dot(centre.left, _dot(centre.right, weighted, bt=True))
        if rest:
            parts = [
                c * _dot(p, _dot(q, b, bt=True)) for c, (p, q) in zip(rest, others, strict=True)
            ]
            total += _divided(sum(parts[1:], parts[0]), rows, jitter)
        gram = _dot(b, weighted, bt=True)
        return jnp.matrix_transpose(_solved(gram, jnp.matrix_transpose(total), proximal + jitter))

    def right(a: Array) -> Array:
        weighted = _times(a, rows)
        total = proximal * centre.right
        total += c0 * _dot(_dot(weighted, centre.left, at=True), centre.right)
        if rest:
            parts = [
                c * _dot(_dot(a, p, at=True), q) for c, (p, q) in zip(rest, others, strict=True)
            ]
            divided = _divided(jnp.matrix_transpose(sum(parts[1:], parts[0])), columns, jitter)
            total += jnp.matrix_transpose(divided)
        return _solved(_dot(weighted, a, at=True), total, proximal + jitter)

    if sweeps == 0:
        return Pair(left(centre.right), right(centre.left))
    a, b = centre
    for _ in range(sweeps):
        if start == "left":
            a = left(b)
            b = right(a)
        else:
            b = right(a)
            a = left(b)
    return Pair(a, b)


def pseudo_inverses(pair: Pair, shift: Scalar) -> Pair:
    r"""$(B^\top (B B^\top + \mu I)^{-1})$ and $((A^\top A + \mu I)^{-1} A^\top)$ of a pair.

    The first takes a matrix from the right to the coordinates of `left`, the second from the left
    to those of `right`.

    Args:
      pair: $A$ and $B$.
      shift: $\mu$.
    """
    a, b = map(widened, pair)
    of_right = jnp.matrix_transpose(_solved(_dot(b, b, bt=True), b, shift))
    of_left = _solved(_dot(a, a, at=True), jnp.matrix_transpose(a), shift)
    return Pair(of_right, of_left)


def preconditioned(pair: Pair, gradient: Pair, shift: Scalar) -> Pair:
    r"""$(g_A (B B^\top + \mu I)^{-1}, (A^\top A + \mu I)^{-1} g_B)$: scaled gradient descent.

    Source: Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
    arXiv 2402.02347.
    """
    (a, b), (g_a, g_b) = map(widened, pair), map(widened, gradient)
    left = _solved(_dot(b, b, bt=True), jnp.matrix_transpose(g_a), shift)
    return Pair(jnp.matrix_transpose(left), _solved(_dot(a, a, at=True), g_b, shift))


def product_norm_squared(pair: Pair) -> Float[Array, ""]:
    r"""$\lVert P Q \rVert_F^2$, from the smaller of the Gram matrices and the product.

    $P Q$ is formed at least as accurately as TF32: in a norm rounding errors of entries average
    out. Those of the Gram matrices would not, where the terms of $P Q$ cancel.
    """
    p, q = map(widened, pair)
    if _product_is_smaller(pair):
        return jnp.sum(jnp.square(matmul(p, q, "tf32")))
    return jnp.sum(_dot(p, p, at=True) * _dot(q, q, bt=True))


def kfac_statistics(gradient: Pair, factor: Scalar, *, dense: bool = False) -> Metric:
    r"""Second moments of layer inputs and output gradients: $X^\top X / b$ and $f S^\top S$.

    Args:
      gradient: $(X^\top, S)$ with b rows of X and S.
      factor: f; b where the loss is a mean over the rows, 1 / b where it is their sum. The result
        is the same for both.
      dense: Whole matrices instead of their diagonals.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv 1503.05671.
    """
    x, s = map(widened, gradient)
    count = x.shape[1]
    if dense:
        return Metric(_dot(x, x, bt=True) / count, factor * _dot(s, s, at=True))
    # Over the rows of X, which is often a transposed view, as over those of S.
    of_x, of_s = (jnp.sum(jnp.square(y), 0) for y in (jnp.matrix_transpose(x), s))
    return Metric(of_x / count, factor * of_s)


def shampoo_statistics(gradient: Pair, factor: Scalar, *, dense: bool = False) -> Metric:
    r"""$f G G^\top$ and $f G^\top G$ of $G = X^\top S$; diagonals do without G where it is large.

    Args:
      gradient: $(X^\top, S)$.
      factor: As in `kfac_statistics`.
      dense: Whole matrices instead of their diagonals.

    Source: Gupta et al., "Shampoo", arXiv 1802.09568.
    """
    x, s = map(widened, gradient)
    if dense or _product_is_smaller(gradient):
        g = _dot(x, s)
        if dense:
            return Metric(factor * _dot(g, g, bt=True), factor * _dot(g, g, at=True))
        return Metric(*(factor * jnp.sum(jnp.square(g), axis) for axis in (1, 0)))
    rows = jnp.sum(x * _dot(x, _dot(s, s, bt=True)), 1)
    return Metric(factor * rows, factor * jnp.sum(s * _dot(_dot(x, x, at=True), s), 0))


def damped_power(metric: Metric, damping: Scalar, power: float) -> Metric:
    r"""$(d + \delta)^p$ of diagonals, $(D + \delta I)^p$ of dense matrices.

    A dense square root comes from six coupled Newton-Schulz iterations, as in the released code;
    other powers of dense matrices from eigenvalues of at least 1e-12.
    """
    return Metric(*(_damped_power(widened(d), damping, power) for d in metric))


def _damped_power(d: Array, damping: Scalar, power: float) -> Array:
    if d.ndim == 1:
        return (d + damping) ** power
    shifted = d + damping * jnp.eye(d.shape[0], dtype=d.dtype)
    if power == 1:
        return shifted
    if power == 0.5:
        return _newton_schulz_root(shifted)
    values, vectors = jnp.linalg.eigh((shifted + shifted.T) / 2)
    powers = jnp.maximum(values, _SMALLEST_EIGENVALUE) ** power
    return _dot(vectors * powers, vectors, bt=True)


def _newton_schulz_root(d: Array) -> Array:
    # The released code scales back with the norm alone, not with what it divided by.
    eye = jnp.eye(d.shape[0], dtype=d.dtype)
    d = d + 1e-6 * eye
    norm = jnp.sqrt(jnp.sum(jnp.square(d)))
    y, z = d / (norm + 1e-6), eye
    for _ in range(_SQUARE_ROOT_STEPS):
        step = (3 * eye - _dot(z, y)) / 2
        y, z = _dot(y, step), _dot(step, z)
    return jnp.sqrt(norm) * y


def _product_is_smaller(pair: Pair) -> bool:
    (n, k), m = pair.left.shape, pair.right.shape[1]
    return k * (n + m) > n * m


def _times(x: Float[Array, "n k"], metric: Array | None) -> Array:
    if metric is None:
        return x
    return metric[:, None] * x if metric.ndim == 1 else _dot(metric, x)


def _divided(x: Float[Array, "n k"], metric: Array | None, jitter: float) -> Array:
    if metric is None:
        return x
    return x / metric[:, None] if metric.ndim == 1 else _solved(metric, x, jitter)


def _solved(matrix: Array, right: Array, shift: Scalar) -> Array:
    # The right side is hundreds of columns wide and the matrix small. Batched triangular solves of
    # that shape are slow (25 times the products on a CPU), so the Cholesky factor is inverted.
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    inverse = solve_triangular(jnp.linalg.cholesky(matrix + shift * eye), eye, lower=True)
    return _dot(inverse, _dot(inverse, right), at=True)


def product(a: Array, b: Array) -> Array:
    """The product of two matrices as it is formed here: float32 or wider, at full precision."""
    return _dot(a, b)


def _dot(a: Array, b: Array, *, at: bool = False, bt: bool = False) -> Array:
    return matmul(a, b, "highest", transpose_a=at, transpose_b=bt)
