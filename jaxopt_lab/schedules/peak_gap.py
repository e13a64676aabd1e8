r"""The gap at which a warm-up ends: where the rate comes closest to a target form.

500 candidates $d$ between 0.01 and $\Delta_0 - 0.01$ are scored by an integral of the squared
distance between the rate $\eta$ with its peak at $d$ (`gap_rate.fit_curvature`) and a target that
rises from 0 to $\eta_{\max}$ at $d$ and falls to $\eta_{\max}/r$ at $\Delta_0$, under the weight
$e^{-\kappa\sigma (x - d)^2/2}$. The first candidate with the best score wins.

Everything is formed in the distance $v = |x - d|$ on either side of the peak and as what is missing
to $\eta_{\max}$: near the peak both the rate and its target are $\eta_{\max}$ less something tiny,
and with narrow weights that is all the integral sees.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar

CANDIDATES = 500
CHUNK = 50  # candidates scored together where they are scored in turn
MARGIN = 0.01  # distance of the candidates from both ends of the interval
NODES = 16  # of each Gauss-Legendre panel
UNIFORM_PANELS = 16  # on each side of the peak
# Panels end at these multiples of the weight's width and of the peak's, which may be far narrower
# than the interval.
WEIGHT_BREAKS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
PEAK_BREAKS = tuple(4.0**k for k in range(7))


def exact_peak_gap(
    initial_gap: Scalar,
    kappa_sigma: Scalar,
    div_factor: Scalar,
    *,
    chunk: int | None = CHUNK,
) -> Array:
    """The best candidate, by quadrature that resolves the weight and the peak.

    Independent of the peak rate. Works under `jit` and `vmap`; about half a million evaluations.

    >>> round(float(exact_peak_gap(7.78, 46.848, 100.0)), 3)
    2.498

    Args:
      initial_gap: The first loss less the target loss, above 0.02.
      kappa_sigma: `warmup_kappa` times the width parameter, usually 0.001.
      div_factor: The peak rate over the rate at the initial gap.
      chunk: Candidates scored together, which bounds the memory; None scores all at once, in
        straight-line code.
    """
    gaps = peak_gap_candidates(initial_gap)
    return gaps[
        jnp.argmin(peak_gap_scores(gaps, initial_gap, kappa_sigma, div_factor, chunk=chunk))
    ]


def peak_gap_candidates(initial_gap: Scalar) -> Array:
    """The grid of peak gaps, shape (500,)."""
    step = (initial_gap - 2 * MARGIN) / (CANDIDATES - 1)
    return MARGIN + step * jnp.arange(CANDIDATES)


def peak_gap_scores(
    gaps: Array,
    initial_gap: Scalar,
    kappa_sigma: Scalar,
    div_factor: Scalar,
    *,
    chunk: int | None = CHUNK,
) -> Array:
    r"""The scores of peak gaps; the smallest is best.

    The mean over $[0, \Delta_0]$ of $w (\eta - \tau)^2$, with the weight $w$, and $\eta$ and its
    target $\tau$ over $\eta_{\max}$; $\tau$ is half a cosine up to $d$ and a line above it.

    Args:
      gaps: Peak gaps $d$, shape (n,), inside the interval from 0 to the initial gap.
      initial_gap: As in `exact_peak_gap`.
      kappa_sigma: As in `exact_peak_gap`.
      div_factor: As in `exact_peak_gap`.
      chunk: As in `exact_peak_gap`.
    """

    def score(gap: Array) -> Array:
        sharpness = kappa_sigma * jnp.square(initial_gap)
        peak, above = gap / initial_gap, (initial_gap - gap) / initial_gap
        bend = (div_factor - 1) / jnp.square(above)
        rise, fall = _Side(-1.0, peak, peak, bend), _Side(1.0, peak, above, bend)
        return _square_distance(
            rise, sharpness, lambda share: jnp.square(jnp.sin(jnp.pi / 2 * share))
        ) + _square_distance(fall, sharpness, lambda share: (1 - 1 / div_factor) * share)

    return jax.vmap(score)(gaps) if chunk is None else jax.lax.map(score, gaps, batch_size=chunk)


class _Side(NamedTuple):
    """One side of a candidate's peak: scalars, gaps as shares of the initial gap."""

    sign: float  # of x - d
    peak: Array  # d
    length: Array  # from the peak to the end of the interval
    bend: Array  # c of the rate x / (x + c (x - d)^2)


def _square_distance(side: _Side, sharpness: Scalar, target: Callable[[Array], Array]) -> Array:
    """The integral over a side; `target` gives 1 - tau from the share of the way to its end."""
    breaks = _breaks(side, sharpness)
    start, half = breaks[:-1, None], (breaks[1:, None] - breaks[:-1, None]) / 2
    rule = np.polynomial.legendre.leggauss(NODES)
    nodes, weights = (jnp.asarray(x, half.dtype)[None] for x in rule)
    v = start + half * (1 + nodes)  # (panels, nodes)
    bent = side.bend * v * v
    missing = bent / (side.peak + side.sign * v + bent)  # 1 - eta
    distance = missing - target(v / side.length)
    return jnp.sum(half * weights * jnp.exp(-sharpness / 2 * v * v) * jnp.square(distance))


def _breaks(side: _Side, sharpness: Scalar) -> Array:
    """Where panels meet, as distances from the peak, sorted: (panels + 1,)."""
    uniform = side.length * np.arange(UNIFORM_PANELS + 1) / UNIFORM_PANELS
    of_peak = jnp.asarray(PEAK_BREAKS) * jnp.sqrt(side.peak / side.bend)
    of_weight = jnp.asarray(WEIGHT_BREAKS) / jnp.sqrt(sharpness)
    breaks = jnp.concatenate([uniform, of_peak, of_weight])
    return jnp.sort(jnp.minimum(breaks, side.length))


# Compiled once for all: outside `jit` every loop would be compiled anew.
@jax.jit
def exact_where(
    wanted: Array, known: Array, initial_gap: Array, kappa_sigma: Array, div_factor: Array
) -> Array:
    """The best candidate where it is wanted, else the peak gap that is known; scalars all."""

    def at_once(wanted: Array, known: Array, *numbers: Array) -> Array:
        return jnp.where(wanted, exact_peak_gap(*numbers, chunk=None).astype(known.dtype), known)

    def if_wanted(wanted: Array, known: Array, *numbers: Array) -> Array:
        return searched_if(wanted, known, numbers, exact_peak_gap)

    # Piecewise constant in everything, so there is no derivative to take.
    numbers = jax.lax.stop_gradient((initial_gap, kappa_sigma, div_factor))
    # On a GPU the host reads the predicate of a loop, at every step, and so waits for all that was
    # dispatched before. There the search itself is a few small kernels; on a CPU it takes longer
    # than many a step.
    return jax.lax.platform_dependent(
        wanted, known, *numbers, cuda=at_once, rocm=at_once, default=if_wanted
    )


def searched_if(
    wanted: Array, known: Array, numbers: tuple[Array, ...], find: Callable[..., Array]
) -> Array:
    """`find(*numbers)` where wanted, else what is known; runs `find` only if it is wanted."""

    def search(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # Tied to the carry, or the compiler moves the search out of the loop and always runs it.
        tied, _ = jax.lax.optimization_barrier((numbers, carry))
        return jnp.zeros_like(carry[0]), find(*tied).astype(known.dtype)

    # A loop of one pass rather than a cond: when runs are vmapped a cond becomes a select and
    # would search at every step, a loop runs while there is a run that wants it.
    return jax.lax.while_loop(lambda carry: carry[0], search, (wanted, known))[1]
