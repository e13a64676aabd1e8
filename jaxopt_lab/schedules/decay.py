"""Warm-up, plateau, and a decay in one of four shapes: what Optax has no schedule for.

For a constant rate and for a warm-up with half a cosine take `optax.constant_schedule` and
`optax.warmup_cosine_decay_schedule`.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.checks import COUNT, NOT_NEGATIVE, Wanted, check_choice, check_number

DecayShape = Literal["linear", "sqrt", "cosine", "square"]

_SHARE = Wanted("a share in [0, 1]", lambda x: 0 <= x <= 1)

# The warm-up starts at this fraction of the peak, so that the first step already moves.
WARMUP_START = 0.01


def warmup_stable_decay(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    *,
    decay_fraction: float = 0.2,
    decay_shape: DecayShape = "linear",
    final_fraction: float = 0.0,
) -> optax.Schedule:
    r"""Linear warm-up, a plateau at the peak, and a decay over the last part of the run (WSD).

    With $w$ warm-up steps of $T$ in total the rate rises as $s_t = 0.01 + 0.99\, t / w$ times the
    peak. The decay takes the last $n = \lfloor \mathtt{decay\_fraction} \cdot T \rfloor$ steps,
    in which $s_t = f + (1 - f)\, q(x)$ with $x = (t - T + n) / n$, $f$ = `final_fraction` and, by
    `decay_shape`, $q(x) = 1 - x$ ("linear"), $1 - \sqrt x$ ("sqrt"), $(1 + \cos \pi x) / 2$
    ("cosine") or $1 - x^2$ ("square"). From step $T$ on the rate stays at its last value. Without a
    decay ($n = 0$) it stays at the peak.

    >>> schedule = warmup_stable_decay(1.0, 100, 10, decay_fraction=0.2, decay_shape="square")
    >>> [round(float(schedule(t)), 4) for t in (0, 10, 80, 90, 100)]
    [0.01, 1.0, 1.0, 0.75, 0.0]

    Args:
      peak: The largest rate, finite and not negative.
      total_steps: $T$, number of optimizer steps, warm-up and decay included.
      warmup_steps: Length of the warm-up; 0 starts at the peak.
      decay_fraction: Share of all steps taken by the decay, in [0, 1].
      decay_shape: One of the four shapes above.
      final_fraction: Share of the peak that is left at the end, in [0, 1].

    Raises:
      ValueError: An argument is out of range or warm-up and decay overlap.

    Source: the runs in Bolatov et al., "LionMuon: Alternating Spectral and Sign Descent for
    Efficient Training", arXiv 2605.19811, have these shapes.
    """
    check_number("peak", peak, NOT_NEGATIVE)
    check_number("total_steps", total_steps, COUNT)
    within = Wanted(f"an integer in [0, {total_steps}]", lambda x: 0 <= x <= total_steps)
    check_number("warmup_steps", warmup_steps, within)
    check_number("decay_fraction", decay_fraction, _SHARE)
    check_number("final_fraction", final_fraction, _SHARE)
    check_choice("decay_shape", decay_shape, get_args(DecayShape))
    decay_steps = math.floor(decay_fraction * total_steps)
    decay_start = total_steps - decay_steps
    if warmup_steps > decay_start:
        raise ValueError(
            f"warmup_steps: got {warmup_steps}, wanted at most {decay_start}, where the decay "
            f"starts (decay_fraction {decay_fraction} of {total_steps} steps)"
        )

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        rise = WARMUP_START + (1.0 - WARMUP_START) * _as_float(count) / max(warmup_steps, 1)
        left = jnp.clip(_as_float(total_steps - count) / max(decay_steps, 1), 0.0, 1.0)
        fall = final_fraction + (1.0 - final_fraction) * _SHAPES[decay_shape](left)
        return peak * jnp.where(count < warmup_steps, rise, fall if decay_steps else 1.0)

    return schedule


# The shapes as functions of the share of the decay that is left, r = 1 - x: the difference is taken
# between integers, so the last steps keep their relative precision in float32. For the cosine,
# sin²(pi r / 2) avoids the cancellation of (1 + cos(pi x)) / 2 there.
_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda left: left,
    "sqrt": lambda left: 1.0 - jnp.sqrt(1.0 - left),
    "cosine": lambda left: jnp.sin(0.5 * jnp.pi * left) ** 2,
    "square": lambda left: left * (2.0 - left),
}


def _as_float(x: jax.typing.ArrayLike) -> jax.Array:
    # Counters are integers and would promote differently with and without 64-bit mode.
    return jnp.asarray(x, jnp.result_type(float))
