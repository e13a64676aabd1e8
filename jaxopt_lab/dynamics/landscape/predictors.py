r"""What the recursion predicts for the variance of a network along its eigendirections.

The released code compares with the stationary variance, $\eta d / 2|\lambda|$ (`stationary_proxy`),
which most directions of a network do not reach within any run: their $2 \eta |\lambda| n$ is small.
The default here is the variance after n steps (`finite_time_variance`).

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644, and its released code ("Eq. 32 proxy").
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int

from jaxopt_lab.dynamics.landscape.closed_forms import variance_at
from jaxopt_lab.dynamics.landscape.independent import coupled_variances, direction_moments

_PROXY_EPSILON = 1e-6


def stationary_proxy(
    *,
    learning_rate: float,
    curvature: Float[ArrayLike, "k"],
    gradient_variance: Float[ArrayLike, "k"],
    epsilon: float = _PROXY_EPSILON,
) -> Float[np.ndarray, "k"]:
    r"""P1, the released code's $\Pi_i = \eta d_i / (2 |\lambda_i| + \epsilon)$.

    >>> stationary_proxy(learning_rate=0.5, curvature=[1.0], gradient_variance=[4.0]).round(4)
    array([1.])

    Args:
      learning_rate: η.
      curvature: λ.
      gradient_variance: d of a batch.
      epsilon: Keeps flat directions finite.
    """
    scale = 2 * np.abs(np.asarray(curvature, np.float64)) + epsilon
    return learning_rate * np.asarray(gradient_variance, np.float64) / scale


def finite_time_variance(
    steps: Int[ArrayLike, "*records"],
    *,
    learning_rate: float,
    curvature: Float[ArrayLike, "k"],
    gradient_variance: Float[ArrayLike, "k"],
    curvature_variance: Float[ArrayLike, "k *k"] | None = None,
    drift: Float[ArrayLike, "k"] | None = None,
) -> Float[np.ndarray, "*records k"]:
    r"""P2, the variance after n steps from one point.

    $$
    \Pi_i(n) = \eta^2 d_i \frac{\rho_i^n - 1}{\rho_i - 1}, \qquad
    \rho_i = (1 - \eta \lambda_i)^2 + \eta^2 \Gamma_i
    $$

    Off a critical point the mean moves, and with it a part $\eta^2 \Gamma \mu(n)^2$ of the noise.

    >>> law = {"learning_rate": 0.5, "curvature": [1.0], "gradient_variance": [4.0]}
    >>> finite_time_variance([1, 2], **law).tolist()
    [[1.0], [1.25]]

    Args:
      steps: n, one or several.
      learning_rate: η.
      curvature: λ.
      gradient_variance: d of a batch.
      curvature_variance: Γ of a batch: None leaves it out, a vector is its diagonal, a matrix feeds
        every direction by all others.
      drift: Mean gradient at the start; None is a critical point.

    Returns:
      Float64; the records lead.

    Raises:
      ValueError: Negative steps, or shapes that do not fit.
    """
    steps = np.asarray(steps)
    curvature, d = np.asarray(curvature, np.float64), np.asarray(gradient_variance, np.float64)
    gamma = np.zeros_like(d) if curvature_variance is None else np.asarray(curvature_variance)
    slope = np.zeros_like(d) if drift is None else np.asarray(drift, np.float64)
    if d.ndim != 1 or curvature.shape != d.shape or slope.shape != d.shape:
        raise ValueError(
            f"curvature, gradient_variance, drift: got shapes {curvature.shape}, {d.shape}, "
            f"{slope.shape}, expected one length"
        )
    if gamma.shape not in (d.shape, d.shape * 2):
        raise ValueError(
            f"curvature_variance: got shape {gamma.shape}, expected {d.shape} or {d.shape * 2}"
        )
    if not np.issubdtype(steps.dtype, np.integer) or steps.size == 0 or steps.min() < 0:
        raise ValueError(f"steps: got {steps}, expected integers, none negative")
    with jax.enable_x64(True):
        common = {"learning_rate": learning_rate, "curvature": jnp.asarray(curvature)}
        if gamma.ndim == 1 and drift is None:
            found = variance_at(
                steps[..., None], gradient_variance=d, curvature_variance=gamma, **common
            )
            return np.asarray(found)
        follow = coupled_variances if gamma.ndim == 2 else direction_moments
        moments = follow(
            steps=int(steps.max()),
            gradient_variance=jnp.asarray(d),
            curvature_variance=jnp.asarray(gamma, jnp.float64),
            drift=jnp.asarray(slope),
            **common,
        )
        return np.asarray(moments.variance)[steps]
