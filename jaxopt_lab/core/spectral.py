"""Spectral estimates from matrix-vector products."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def power_iteration(
    x: Float[Array, "*batch m n"],
    start: Float[Array, "*batch n"],
    *,
    iterations: int = 3,
    eps: float = 1e-7,
) -> Float[Array, "*batch"]:
    r"""Estimate the largest singular value from below.

    Each round takes $u = X v / (\lVert X v \rVert + \epsilon)$ and then
    $v = X^\top u / (\lVert X^\top u \rVert + \epsilon)$; the estimate is $\lVert X v \rVert$.

    Args:
      x: Matrices; leading axes are batch.
      start: One start vector a matrix; a Gaussian draw is never orthogonal to the leading one.
      iterations: Number of rounds (static).
      eps: Added to the norms, so that a zero matrix gives 0.
    """
    v = start[..., None]
    for _ in range(iterations):
        u = x @ v
        u = u / (jnp.linalg.norm(u, axis=-2, keepdims=True) + eps)
        v = x.mT @ u
        v = v / (jnp.linalg.norm(v, axis=-2, keepdims=True) + eps)
    return jnp.linalg.norm(x @ v, axis=(-2, -1))


def stable_rank(
    x: Float[Array, "*batch m n"], start: Float[Array, "*batch n"], *, iterations: int = 3
) -> Float[Array, "*batch"]:
    r"""Stable rank $\lVert X \rVert_F^2 / (\sigma_1^2 + 10^{-12})$, with $\sigma_1$ estimated.

    Power iteration underestimates $\sigma_1$, so this overestimates the stable rank.

    Args:
      x: Matrices; leading axes are batch.
      start: Start vectors of the power iteration.
      iterations: Rounds of the power iteration (static).
    """
    sigma = power_iteration(x, start, iterations=iterations)
    return jnp.sum(jnp.square(x), axis=(-2, -1)) / (jnp.square(sigma) + 1e-12)
