r"""Closed forms along one eigendirection: growth, variance after n steps, stationary law, bounds.

With curvature $\lambda$, its variance $\Gamma$ and the variance $d$ of the slope, all of a batch,
the variance along a direction of a critical point obeys $\Pi' = \rho \Pi + \eta^2 d$ with

$$
\rho = (1 - \eta \lambda)^2 + \eta^2 \Gamma, \qquad
\rho - 1 = -2 \eta \lambda + \eta^2 (\lambda^2 + \Gamma)
$$

The excess $\rho - 1$ is always formed as on the right: near 1 the difference has no digits left.
The Langevin equation of the same noise, observed at the times $n \eta$ and cut off after second
order, has no $\eta^2 \lambda^2$: `truncated=True`. Everything is elementwise and broadcasts.

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644.
"""

import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, ArrayLike


def growth_excess(
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    curvature_variance: ArrayLike = 0.0,
    *,
    truncated: bool = False,
) -> Array:
    r"""$\rho - 1$, negative where the variance converges.

    >>> round(float(growth_excess(0.1, 1.0, 0.5)), 6)
    -0.185

    Args:
      learning_rate: $\eta$.
      curvature: $\lambda$.
      curvature_variance: $\Gamma$.
      truncated: Leave $\eta^2 \lambda^2$ out.
    """
    eta, lam, gamma = as_floats(learning_rate, curvature, curvature_variance)
    squares = gamma if truncated else lam**2 + gamma
    return eta * (eta * squares - 2 * lam)


def powers_less_one(excess: ArrayLike, steps: ArrayLike) -> Array:
    r"""$\rho^n - 1$ from $\rho - 1$, to full relative accuracy also near $\rho = 1$.

    >>> powers_less_one(jnp.array([-1.0, -3.0, 1.0]), 3).tolist()
    [-1.0, -9.0, 7.0]

    Args:
      excess: $\rho - 1$, any number: below -1 the powers alternate.
      steps: $n$, integers.
    """
    excess, n = as_floats(excess, steps)
    alternates = excess < -1
    return jnp.where(alternates, _power(excess, n) - 1, jnp.expm1(_exponent(excess, n)))


def geometric_sum(excess: ArrayLike, steps: ArrayLike) -> Array:
    r"""$1 + \rho + \dots + \rho^{n-1} = (\rho^n - 1) / (\rho - 1)$, and $n$ at $\rho = 1$.

    >>> geometric_sum(jnp.array([0.0, -1.0, 1.0]), 3).tolist()
    [3.0, 1.0, 7.0]

    Args:
      excess: $\rho - 1$.
      steps: $n$, integers.
    """
    excess, n = as_floats(excess, steps)
    info = jnp.finfo(excess.dtype)
    # Below this the sum is n to the last digit, and the quotient of subnormals is not.
    unit = jnp.abs(excess) < info.tiny / info.eps
    return jnp.where(unit, n, powers_less_one(excess, n) / jnp.where(unit, 1.0, excess))


def mean_at(
    steps: ArrayLike,
    *,
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    drift: ArrayLike = 0.0,
    mean: ArrayLike = 0.0,
) -> Array:
    r"""$\mu(n) = (1 - \eta \lambda)^n \mu_0 - \eta \bar g \sum_{k<n} (1 - \eta \lambda)^k$.

    It converges iff $|1 - \eta \lambda| < 1$.

    >>> float(mean_at(2, learning_rate=0.5, curvature=1.0, mean=4.0, drift=1.0))
    0.25

    Args:
      steps: $n$.
      learning_rate: $\eta$.
      curvature: $\lambda$.
      drift: $\bar g$, the mean slope at the origin.
      mean: $\mu_0$.
    """
    n, eta, lam, drift, mean = as_floats(steps, learning_rate, curvature, drift, mean)
    excess = -eta * lam
    return _power(excess, n) * mean - eta * drift * geometric_sum(excess, n)


def variance_at(
    steps: ArrayLike,
    *,
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    gradient_variance: ArrayLike,
    curvature_variance: ArrayLike = 0.0,
    mean: ArrayLike = 0.0,
    variance: ArrayLike = 0.0,
    truncated: bool = False,
) -> Array:
    r"""Variance after n steps near a critical point, without correlation of slope and curvature.

    The mean $\mu_k = (1 - \eta \lambda)^k \mu_0$ is a source of variance through $\Gamma$; with
    $q = 1 - \eta \lambda$ in the exact case its sum is a difference of powers:

    $$
    \Pi(n) = \rho^n \Pi_0 + \eta^2 d \frac{\rho^n - 1}{\rho - 1} + \mu_0^2 (\rho^n - q^{2n})
    $$

    >>> float(variance_at(2, learning_rate=0.5, curvature=1.0, gradient_variance=4.0))
    1.25

    Args:
      steps: $n$.
      learning_rate: $\eta$.
      curvature: $\lambda$.
      gradient_variance: $d$.
      curvature_variance: $\Gamma$.
      mean: $\mu_0$.
      variance: $\Pi_0$.
      truncated: The Langevin counterpart; the mean stays exact.
    """
    n, eta, lam, d, gamma, mean, variance = as_floats(
        steps, learning_rate, curvature, gradient_variance, curvature_variance, mean, variance
    )
    excess = growth_excess(eta, lam, gamma, truncated=truncated)
    own = _power(excess, n) * variance + eta**2 * d * geometric_sum(excess, n)
    return own + eta**2 * gamma * mean**2 * _mixed_sum(excess, growth_excess(eta, lam), n)


def stationary_variance(
    *,
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    gradient_variance: ArrayLike,
    curvature_variance: ArrayLike = 0.0,
    truncated: bool = False,
) -> Array:
    r"""$\Pi^\infty = \eta d / (2 \lambda - \eta \lambda^2 - \eta \Gamma)$, infinite without one.

    Truncated it is $\eta d / (2 \lambda - \eta \Gamma)$ wherever that is positive, which is a
    formal value: below a growth of -1, say at $\Gamma = 0$ and $\eta \lambda > 1$, the truncated
    recursion oscillates and diverges all the same.

    >>> float(stationary_variance(learning_rate=1.0, curvature=1.0, gradient_variance=3.0))
    3.0

    Args:
      learning_rate: $\eta$.
      curvature: $\lambda$.
      gradient_variance: $d$.
      curvature_variance: $\Gamma$.
      truncated: The Langevin counterpart.
    """
    eta, lam, d, gamma = as_floats(learning_rate, curvature, gradient_variance, curvature_variance)
    # Minus (rho - 1) / eta, so that its sign is that of the bound, rounding included.
    restoring = 2 * lam - eta * (gamma if truncated else lam**2 + gamma)
    stable = restoring > 0
    return jnp.where(stable, eta * d / jnp.where(stable, restoring, 1.0), jnp.inf)


def stability_bound(
    learning_rate: ArrayLike, curvature: ArrayLike, *, truncated: bool = False
) -> Array:
    r"""The curvature variance at which the variance stops converging.

    $\Gamma = \lambda (2 - \eta \lambda) / \eta$; for the Langevin equation $2 \lambda / \eta$.

    >>> [float(stability_bound(0.5, 1.0, truncated=t)) for t in (False, True)]
    [3.0, 4.0]

    Args:
      learning_rate: $\eta$.
      curvature: $\lambda$.
      truncated: The Langevin counterpart.
    """
    eta, lam = as_floats(learning_rate, curvature)
    return lam * (2 if truncated else 2 - eta * lam) / eta


def is_stable(
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    curvature_variance: ArrayLike = 0.0,
    *,
    truncated: bool = False,
) -> Array:
    r"""Whether $\rho < 1$; for the Langevin equation $\eta \Gamma < 2 \lambda$, on that side only.

    >>> [bool(is_stable(0.7, 1.0, 2.0, truncated=t)) for t in (False, True)]
    [False, True]

    Args:
      learning_rate: $\eta$.
      curvature: $\lambda$.
      curvature_variance: $\Gamma$.
      truncated: The Langevin counterpart.
    """
    return growth_excess(learning_rate, curvature, curvature_variance, truncated=truncated) < 0


def in_mismatch_region(
    learning_rate: ArrayLike, curvature: ArrayLike, curvature_variance: ArrayLike
) -> Array:
    r"""$\lambda (2 - \eta \lambda) < \eta \Gamma < 2 \lambda$: SGD diverges, Langevin does not say.

    >>> in_mismatch_region(0.7, 1.0, jnp.array([1.0, 2.0, 3.0])).tolist()
    [False, True, False]
    """
    truncated = growth_excess(learning_rate, curvature, curvature_variance, truncated=True)
    return (growth_excess(learning_rate, curvature, curvature_variance) > 0) & (truncated < 0)


def gaussian_lyapunov(
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    curvature_variance: ArrayLike = 0.0,
    *,
    num_points: int = 4096,
) -> Array:
    r"""$\mathrm E \log |1 - \eta h|$ for normal $h$ of mean $\lambda$ and variance $\Gamma$.

    The growth rate of a typical path. It can be negative while $\rho > 1$: then most paths look
    tame, few rare ones carry the variance, and that of a sample falls short of the true one.

    >>> round(float(gaussian_lyapunov(0.6, 1.0, 2.4)), 2)
    -0.62

    Args:
      learning_rate: $\eta$.
      curvature: $\lambda$.
      curvature_variance: $\Gamma$.
      num_points: Quantiles of $h$ to average over; the error is about the inverse of it.
    """
    eta, lam, gamma = as_floats(learning_rate, curvature, curvature_variance)
    levels = (jnp.arange(num_points, dtype=eta.dtype) + 0.5) / num_points
    h = lam[..., None] + jnp.sqrt(gamma)[..., None] * ndtri(levels)
    return jnp.mean(jnp.log(jnp.abs(1 - eta[..., None] * h)), -1)


def diffusion_coefficient(learning_rate: ArrayLike, gradient_variance: ArrayLike) -> Array:
    r"""$\mathcal D = \eta d / 2$: flat directions spread as $2 \mathcal D t$, $t = \eta n$.

    >>> float(diffusion_coefficient(0.5, 4.0))
    1.0
    """
    eta, d = as_floats(learning_rate, gradient_variance)
    return eta * d / 2


def drift_spreading(
    steps: ArrayLike,
    *,
    learning_rate: ArrayLike,
    gradient_variance: ArrayLike,
    curvature_variance: ArrayLike,
    drift: ArrayLike,
) -> Array:
    r"""A flat direction with a mean slope: the variance grows as the cube of the time.

    $$
    \Pi(n) \approx \eta^2 d n + \tfrac13 \eta^4 \Gamma \bar g^2 n^3
    $$

    The mean $-\eta \bar g n$ runs away and the curvature noise acts on it. The variance already
    there is not fed back: `independent.direction_moments` has all of it.

    >>> kwargs = {"gradient_variance": 0.02, "curvature_variance": 0.8, "drift": 0.5}
    >>> round(float(drift_spreading(900, learning_rate=0.02, **kwargs)), 2)
    7.78

    Args:
      steps: $n$.
      learning_rate: $\eta$.
      gradient_variance: $d$.
      curvature_variance: $\Gamma$.
      drift: $\bar g$.
    """
    n, eta, d, gamma, drift = as_floats(
        steps, learning_rate, gradient_variance, curvature_variance, drift
    )
    return eta**2 * d * n + eta**4 * gamma * drift**2 * n**3 / 3


def proportional_noise_variance(
    steps: ArrayLike, *, learning_rate: ArrayLike, curvature: ArrayLike, noise_ratio: ArrayLike
) -> Array:
    r"""The variance for noise that tracks the curvature, $d = \gamma \lambda$.

    $\frac{\eta \gamma}{2} (1 - (1 - \eta \lambda)^{2 n})$, which tends to $\eta \gamma / 2$ in
    every direction. It lacks the factor $2 / (2 - \eta \lambda)$ of `variance_at`.

    Args:
      steps: $n$.
      learning_rate: $\eta$.
      curvature: $\lambda$.
      noise_ratio: $\gamma$.
    """
    n, eta, lam, ratio = as_floats(steps, learning_rate, curvature, noise_ratio)
    return -eta * ratio / 2 * powers_less_one(growth_excess(eta, lam), n)


def _exponent(excess: Array, n: Array) -> Array:
    r"""$n \log |\rho|$."""
    log = jnp.log1p(jnp.where(excess < -1, -excess - 2, excess))
    # The logarithm of 0 times no steps would be nan.
    return jnp.where(n == 0, 0.0, n * log)


def _power(excess: Array, n: Array) -> Array:
    r"""$\rho^n$, for any sign of $\rho$."""
    size = jnp.exp(_exponent(excess, n))
    return jnp.where((excess < -1) & (n % 2 == 1), -size, size)


def _mixed_sum(first: Array, second: Array, n: Array) -> Array:
    r"""$\sum_{k<n} a^{n-1-k} b^k = (a^n - b^n) / (a - b)$ from the excesses $a - 1$, $b - 1$."""
    first_leads = jnp.abs(1 + first) >= jnp.abs(1 + second)
    # The larger one in front, so that neither factor overflows where the product does not.
    lead, other = jnp.where(first_leads, first, second), jnp.where(first_leads, second, first)
    base = 1 + lead
    ratio = jnp.where(base == 0, -1.0, (other - lead) / jnp.where(base == 0, 1.0, base))
    return _power(lead, jnp.maximum(n - 1, 0)) * geometric_sum(ratio, n)


def as_floats(*values: ArrayLike) -> list[Array]:
    """Arrays of one floating type, that of the arrays among them; numbers follow.

    >>> [x.dtype.name for x in as_floats(0.5, jnp.float16(1), 2)]
    ['float16', 'float16', 'float16']
    """
    given = [v if isinstance(v, int | float) else jnp.asarray(v) for v in values]
    dtype = jnp.result_type(float, *given)
    return [jnp.asarray(v).astype(dtype) for v in given]
