r"""What an estimator of black-box optimization is: values near the iterate in, a direction out.

A *probe* is one direction $v_b$ along which the function is looked at. It takes two values,
$D_b = (f(x + \tau v_b) - f(x - \tau v_b)) / 2 \tau$, or one, $D_b = f(x + \tau v_b) / \tau$.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxopt_lab.core.checks import POSITIVE, Wanted, check_number

Feedback = Literal["deterministic", "two_point", "one_point", "single"]
FEEDBACKS: tuple[Feedback, ...] = get_args(Feedback)
PROBABILITY = Wanted("a number in [0, 1]", lambda x: 0 <= x <= 1)


class Found(NamedTuple):
    """What an iteration found out.

    Attributes:
      differences: $D_b$; 0 where it is not finite.
      before: The same at the estimator's other point; () without one.
      finite: Whether $D_b$ is, at both points.
      count: Number of the iteration.
      x: The point, flat.
    """

    differences: Float[Array, " b"]
    before: Any
    finite: Bool[Array, " b"]
    count: Int[Array, ""]
    x: Float[Array, " d"]


class Estimator(NamedTuple):
    r"""How differences become a direction; functions of flat points of $d$ entries.

    Attributes:
      feedback: See `jaguar_frank_wolfe`.
      eps: $\tau$.
      num_probes: `d -> B`, probes an iteration.
      init: `(d, dtype) -> memory`.
      draw: `(key, d) -> probes`, what is random in an iteration.
      point: `(x, probes, b, offset) -> x + offset v_b`.
      estimate: `(memory, probes, found) -> (direction, memory)`.
      fill: `(memory, coordinates, differences, finite) -> memory`; None without such a memory.
      fill_first: Whether the memory is filled before the first iteration.
      refill: Probability with which it is filled again before an iteration.
      other: `(memory, x) -> point`, a second point at which the same probes are taken, with the
        same samples; None without one.
    """

    feedback: Feedback
    eps: float
    num_probes: Callable[[int], int]
    init: Callable[[int, Any], Any]
    draw: Callable[[Array, int], Any]
    point: Callable[[Array, Any, Array, Array], Array]
    estimate: Callable[[Any, Any, Found], tuple[Array, Any]]
    fill: Callable[[Any, Array, Array, Array], Any] | None = None
    fill_first: bool = False
    refill: float = 0.0
    other: Callable[[Any, Array], Array] | None = None

    @property
    def values_each(self) -> int:
        """Values a probe and point."""
        return 1 if self.feedback == "single" else 2

    def num_values(self, d: int) -> int:
        """Values an iteration."""
        return self.num_probes(d) * self.values_each * (1 if self.other is None else 2)


def differences(
    values: Float[Array, "2 n"], eps: float, each: int
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """Differences of values in two parts, 0 where one is not finite; and whether they are finite.

    Args:
      values: High and low parts, see `parts`; with two values a probe these are neighbours.
      eps: Distance from the iterate.
      each: Values a probe.
    """
    high, low = values
    if each == 1:
        found = (high + low) / eps
    else:
        # Of the high parts first: they are close to each other, so that this is exact.
        found = ((high[::2] - high[1::2]) + (low[::2] - low[1::2])) / (2 * eps)
    finite = jnp.isfinite(found)
    return jnp.where(finite, found, 0), finite


def parts(value: Any, dtype: Any, source: str) -> Array:
    """A value as the sum of two numbers of `dtype`.

    Differences of values that come in float64 keep their digits where JAX computes in float32.

    Args:
      value: A number, or an array without axes.
      dtype: Of the parts.
      source: For the message.

    Raises:
      ValueError: It is something else.
    """
    xp: Any = jnp if isinstance(value, jax.Array) else np
    array = xp.asarray(value)
    real = any(jnp.issubdtype(array.dtype, kind) for kind in (np.bool_, np.integer, np.floating))
    if array.ndim or not real:
        came = f"an array of shape {array.shape}" if array.ndim else repr(value)
        raise ValueError(f"{source}: the value is {came}; wanted one real number")
    with np.errstate(over="ignore", invalid="ignore"):
        high = array.astype(dtype)
        return jnp.stack([jnp.asarray(high), jnp.asarray((array - high).astype(dtype))])


def check_probing(feedback: str, eps: float) -> None:
    """Check what all estimators take.

    Raises:
      ValueError: The feedback is unknown, or `eps` is not a positive number.
    """
    if feedback not in FEEDBACKS:
        raise ValueError(f"feedback is {feedback!r}; choose one of {', '.join(FEEDBACKS)}")
    check_number("eps", eps, POSITIVE)
