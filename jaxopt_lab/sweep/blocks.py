"""Differences between optimizers that were trained on the same seeds, several at once."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr

from jaxopt_lab.sweep.significance import STANDARD_ERRORS, Difference

LEVEL = 0.05
"""Largest chance that any difference between equal optimizers counts."""

PAIRED_RULE = (
    "All optimizers are trained on the same seeds, and what a seed does to all of them is taken "
    "out first. A difference of mean final held-out losses counts when it exceeds "
    f"{STANDARD_ERRORS:g} standard errors and a two-sided t-test, corrected for the number of "
    f"pairs (Holm), rejects equality at {LEVEL:.0%}; otherwise its sign is a direction only."
)


class PairedNoise(NamedTuple):
    """What is left of the losses beside the means of optimizers and of seeds."""

    deviation: float  # standard deviation of one loss
    freedom: int  # degrees of freedom that it has


def paired_noise(losses: Sequence[Sequence[float]]) -> PairedNoise:
    r"""Noise of losses that share their seeds: an optimizer's effect and a seed's effect add up.

    $$
    s^2 = \frac{\sum_{ij} (x_{ij} - \bar x_{i \cdot} - \bar x_{\cdot j} + \bar x)^2}{(k-1)(n-1)}
    $$

    Args:
      losses: For each of k optimizers the final losses of the same n seeds, in the same order.

    Raises:
      ValueError: For fewer than two optimizers or seeds, or a loss that is not finite.

    >>> paired_noise([[1.0, 2.0, 4.0], [2.0, 3.0, 5.5]])
    PairedNoise(deviation=0.2041241452319315, freedom=2)
    """
    lengths = {len(of_one) for of_one in losses}
    x = np.asarray(losses if len(lengths) == 1 else [], np.float64)
    if x.ndim != 2 or min(x.shape) < 2 or not np.isfinite(x).all():
        raise ValueError(
            f"losses: got {losses}, wanted finite losses of two or more optimizers on the same two "
            "or more seeds"
        )
    rest = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()
    freedom = (x.shape[0] - 1) * (x.shape[1] - 1)
    return PairedNoise(math.sqrt(float(np.square(rest).sum()) / freedom), freedom)


def paired_differences(
    losses: Mapping[str, Sequence[float]],
) -> dict[tuple[str, str], Difference]:
    r"""Differences of the means of all pairs, with $s \sqrt{2/n}$ as their standard error.

    Which of them count is decided together: p-values of two-sided t-tests are put in order and the
    i-th smallest of m has to be below $0.05 / (m - i + 1)$, as long as all smaller ones are (Holm).
    Both orders of a pair are returned.

    Args:
      losses: Final losses of the same seeds by optimizer.

    Raises:
      ValueError: As `paired_noise`.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.

    >>> found = paired_differences({"a": [1.0, 2.0, 4.0], "b": [2.0, 3.0, 5.5]})
    >>> found["b", "a"].counts, found["a", "b"].verdict("a")
    (True, 'a is better')
    """
    noise = paired_noise(list(losses.values()))
    seeds = len(next(iter(losses.values())))
    error = noise.deviation * math.sqrt(2 / seeds)
    means = {label: float(np.mean(values)) for label, values in losses.items()}
    pairs = list(itertools.combinations(losses, 2))
    values = {(a, b): means[a] - means[b] for a, b in pairs}
    chances = {pair: _chance(value, error, noise.freedom) for pair, value in values.items()}
    found = {}
    rejected = True
    for number, (a, b) in enumerate(sorted(pairs, key=lambda pair: chances[pair])):
        rejected &= chances[a, b] < LEVEL / (len(pairs) - number)
        value = values[a, b]
        counts = rejected and abs(value) > STANDARD_ERRORS * error
        found[a, b] = Difference(value, error, counts)
        found[b, a] = Difference(-value, error, counts)
    return found


def _chance(value: float, error: float, freedom: int) -> float:
    """Chance of a difference this large between equals."""
    if error == 0:
        return 0.0 if value else 1.0
    return float(2 * stdtr(freedom, -abs(value) / error))
