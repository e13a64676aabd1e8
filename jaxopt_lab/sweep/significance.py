"""The rule by which a difference between two optimizers counts, stated before the runs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STANDARD_ERRORS = 2.0
"""A difference of means counts when it exceeds so many standard errors."""

_NORMAL_95 = 1.959963984540054  # of a normal distribution 95 % lies within so many deviations

RULE = (
    "A difference of mean final held-out losses counts when it exceeds "
    f"{STANDARD_ERRORS:g} standard errors, s * sqrt(1/n1 + 1/n2), with n1 and n2 the numbers of "
    "seeds and s the standard deviation between seeds pooled over all optimizers."
)


class Difference(NamedTuple):
    """Mean of the first optimizer minus mean of the second, against the seed noise."""

    value: float
    standard_error: float
    counts: bool

    @property
    def standard_errors(self) -> float:
        """The difference in units of its standard error; infinite where there is no noise."""
        if self.standard_error:
            return self.value / self.standard_error
        return math.copysign(math.inf, self.value) if self.value else 0.0

    def verdict(self, first: str) -> str:
        """In words, of two losses; a difference that does not count has a direction alone.

        >>> difference([4.0, 4.5], [4.75, 5.0], noise=0.25).verdict("SOAP")
        'SOAP is better'
        """
        if not self.counts:
            return "direction only"
        return f"{first} is {'better' if self.value < 0 else 'worse'}"


def seed_noise(losses: Sequence[Sequence[float]]) -> float:
    r"""Standard deviation between seeds, pooled over optimizers.

    $$
    s^2 = \frac{\sum_i \sum_j (x_{ij} - \bar x_i)^2}{\sum_i (n_i - 1)}
    $$

    Args:
      losses: For each optimizer the final losses of its seeds; non-finite ones do not count, and
        an optimizer with a single finite seed says nothing about noise.

    Raises:
      ValueError: If no optimizer has two finite losses.

    >>> seed_noise([[1.0, 3.0], [5.0, 5.0, 8.0]])
    1.632993161855452
    """
    finite = [_finite(group) for group in losses]
    freedom = sum(len(group) - 1 for group in finite if len(group) > 1)
    if not freedom:
        raise ValueError(f"losses: got {losses}, expected two finite seeds of some optimizer")
    squares = sum(float(np.square(g - g.mean()).sum()) for g in finite if len(g) > 1)
    return math.sqrt(squares / freedom)


def difference(first: Sequence[float], second: Sequence[float], noise: float) -> Difference:
    r"""Compares the mean losses of two optimizers with the noise between seeds.

    The difference counts when $|\bar x_1 - \bar x_2| > 2 s \sqrt{1/n_1 + 1/n_2}$.

    Args:
      first: Final losses of the seeds of one optimizer.
      second: Those of the other; the numbers may differ.
      noise: Standard deviation between seeds, from `seed_noise`.

    Raises:
      ValueError: If a loss is missing or not finite: a diverged run has no mean to compare.

    Source: the rule of the optimizer track of modded-nanogpt (KellerJordan/modded-nanogpt).

    >>> difference([4.0, 4.5], [4.75, 5.0], noise=0.25)
    Difference(value=-0.625, standard_error=0.25, counts=True)
    """
    for name, group in (("first", first), ("second", second)):
        if not len(group) or not np.isfinite(np.asarray(group, np.float64)).all():
            raise ValueError(f"{name}: got {list(group)}, expected finite losses of some seeds")
    if not noise >= 0:
        raise ValueError(f"noise: got {noise}, expected a standard deviation")
    value = float(np.mean(first) - np.mean(second))
    error = noise * math.sqrt(1 / len(first) + 1 / len(second))
    return Difference(value, error, abs(value) > STANDARD_ERRORS * error)


class Interval(NamedTuple):
    """A number, and an interval that covers the true one in 95 % of all samples of rows."""

    value: float
    low: float
    high: float


def accuracy_interval(correct: Sequence[bool] | np.ndarray) -> Interval:
    r"""Share of correct answers with Wilson's interval.

    $$
    \frac{\hat p + z^2 / 2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}}{1 + z^2 / n}
    $$

    with $z = 1.96$. It stays within [0, 1] and has a width where all answers are right. It is about
    the rows alone; the noise between seeds comes on top.

    Args:
      correct: Of each row, whether the answer was right.

    Raises:
      ValueError: If there is no row.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22,
    1927.

    >>> [round(x, 4) for x in accuracy_interval([True] * 8 + [False] * 2)]
    [0.8, 0.4902, 0.9433]
    """
    n = len(correct)
    if not n:
        raise ValueError("correct: got no row, wanted some")
    p, z = float(np.mean(correct)), _NORMAL_95
    center, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return Interval(p, (center - half) / scale, (center + half) / scale)


def paired_accuracy(
    first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray
) -> Interval:
    r"""Accuracy of the first model minus that of the second, on the same rows.

    Only rows count where one is right and the other wrong: $b$ for the first, $c$ for the second.
    With $b^* = b + 1/2$, $c^* = c + 1/2$, $n^* = n + 2$ the interval is

    $$
    \frac{b^* - c^*}{n^*} \pm \frac{z}{n^*} \sqrt{b^* + c^* - \frac{(b^* - c^*)^2}{n^*}} .
    $$

    Args:
      first: Of each row, whether the first model's answer was right.
      second: Of the same rows in the same order, those of the other.

    Raises:
      ValueError: If these are not equally many rows, or none.

    Source: Agresti, Min, "Simple Improved Confidence Intervals for Comparing Matched Proportions",
    Statistics in Medicine 24, 2005.

    >>> first, second = [True] * 90 + [False] * 10, [True] * 85 + [False] * 15
    >>> [round(x, 4) for x in paired_accuracy(first, second)]
    [0.05, 0.0029, 0.0951]
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or not len(a):
        raise ValueError(
            f"second: got {len(b)} rows, wanted those of first: {len(a)}, at least one"
        )
    n = len(a)
    wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
    more, adjusted = wins - losses, n + 2
    half = _NORMAL_95 * math.sqrt(wins + losses + 1 - more**2 / adjusted)
    return Interval(more / n, (more - half) / adjusted, (more + half) / adjusted)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    return array[np.isfinite(array)]
