r"""Which law a direction follows over a horizon of n steps, and the phase diagram.

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644. The regimes are the paper's, the thresholds between them are chosen here.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxopt_lab.dynamics.landscape.closed_forms import growth_excess, is_stable

REGIMES = ("confined", "diffusive", "unstable", "transitional")
CONFINED, DIFFUSIVE, UNSTABLE, TRANSITIONAL = range(4)

# Of n |1 - rho|. Below the first the variance is linear in n within 10 %; above the second it is
# stationary within 2 %; growth by more than a factor of about e is called unstable.
DIFFUSIVE_BELOW = 0.2
CONFINED_ABOVE = 4.0
UNSTABLE_ABOVE = 1.0


class PhaseTable(NamedTuple):
    """Stability over a grid of learning rates and curvature variances."""

    growth: Float[Array, "rates variances"]  # rho
    stable: Bool[Array, "rates variances"]  # rho < 1
    langevin_stable: Bool[Array, "rates variances"]  # eta Gamma < 2 lambda


def regime_codes(
    steps: ArrayLike,
    *,
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    curvature_variance: ArrayLike = 0.0,
) -> Int[Array, "*directions"]:
    r"""Index into `REGIMES` of each direction.

    Unstable if $(\rho - 1) n > 1$, diffusive if $|1 - \rho| n < 0.2$, confined if
    $(1 - \rho) n > 4$, else transitional.

    >>> codes = regime_codes(100, learning_rate=0.1, curvature=jnp.array([1.0, 0.0, -1.0, 0.1]))
    >>> regime_names(codes)
    ['confined', 'diffusive', 'unstable', 'transitional']

    Args:
      steps: $n$.
      learning_rate: $\eta$.
      curvature: $\lambda$.
      curvature_variance: $\Gamma$.
    """
    change = growth_excess(learning_rate, curvature, curvature_variance) * jnp.asarray(steps)
    conditions = (
        change > UNSTABLE_ABOVE,
        jnp.abs(change) < DIFFUSIVE_BELOW,
        -change > CONFINED_ABOVE,
    )
    return jnp.select(conditions, (UNSTABLE, DIFFUSIVE, CONFINED), TRANSITIONAL)


def regime_names(codes: ArrayLike) -> list[str]:
    """The names of codes, in a flat list.

    >>> regime_names([0, 2])
    ['confined', 'unstable']
    """
    return [REGIMES[code] for code in np.ravel(codes)]


def phase_table(
    learning_rates: ArrayLike, curvature_variances: ArrayLike, *, curvature: ArrayLike = 1.0
) -> PhaseTable:
    r"""Growth and both stability bounds over a grid.

    >>> table = phase_table(jnp.array([0.2, 0.7]), jnp.array([2.0, 3.0]))
    >>> (table.langevin_stable & ~table.stable).tolist()
    [[False, False], [True, False]]

    Args:
      learning_rates: $\eta$ of each row.
      curvature_variances: $\Gamma$ of each column.
      curvature: $\lambda$.
    """
    eta, gamma = jnp.asarray(learning_rates)[:, None], jnp.asarray(curvature_variances)[None]
    return PhaseTable(
        1 + growth_excess(eta, curvature, gamma),
        is_stable(eta, curvature, gamma),
        is_stable(eta, curvature, gamma, truncated=True),
    )
