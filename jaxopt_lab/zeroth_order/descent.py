r"""Gradient descent on estimates, projected onto a set if there is one."""

from jaxtyping import Array

from jaxopt_lab.core.checks import POSITIVE, check_number
from jaxopt_lab.zeroth_order.ask_tell import BlackBox, ask_tell
from jaxopt_lab.zeroth_order.averaging import Schedule, averaged
from jaxopt_lab.zeroth_order.constraints import ConstraintSet, check_constraint
from jaxopt_lab.zeroth_order.coordinate_memory import coordinate_memory
from jaxopt_lab.zeroth_order.differences import Estimator, Feedback


def jaguar_gd(
    learning_rate: Schedule,
    *,
    key: Array,
    constraint: ConstraintSet | None = None,
    eps: float = 1e-3,
    feedback: Feedback = "deterministic",
    averaging: Schedule = 1.0,
    num_coordinates: int = 1,
    h0: str = "full",
    sega: bool = False,
    refill: float = 0.0,
) -> BlackBox:
    r"""Minimise a black box by gradient descent with JAGUAR's memory of differences.

    $$h_i \leftarrow \frac{f(x + \tau e_i) - f(x - \tau e_i)}{2 \tau}, \qquad
    x \leftarrow \operatorname{proj}_Q(x - \gamma h)$$

    for one random coordinate an iteration. With smoothness $L$, $\gamma \le 1 / (4 d L)$ is always
    safe; $1 / (d L)$ has worked as well.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      key: A typed threefry key.
      constraint: The set, with a projection; None: the whole space.
      eps: $\tau$, see `jaguar_frank_wolfe`.
      feedback: See `jaguar_frank_wolfe`.
      averaging: $\eta$, the weight of a new estimate in their average; 1 is no average.
      num_coordinates: Coordinates an iteration, distinct; all of them is the full method.
      h0: "full": the memory is filled by the first 2 d values. "zeros": it is not.
      sega: Use the unbiased estimate of SEGA instead of $h$; wants smaller steps.
      refill: Probability with which the memory is filled again, by 2 d values, before an iteration.

    Raises:
      ValueError: An argument is out of its range, or the set has no projection.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> opt = jaguar_gd(0.1, key=jax.random.key(0))
      >>> state, x = opt.ask(opt.init({"a": jnp.zeros(2), "b": 1.0}))
      >>> x["a"].tolist()[1], x["b"].item()
      (0.0, 1.0)
      >>> state = opt.tell(state, 0.5)

    Source: Veprikov, Bogdanov, Minashkin and Beznosikov, "New Aspects of Black Box Conditional
    Gradient: Variance Reduction and One Point Feedback", arXiv 2409.10442.
    """
    estimator = coordinate_memory(
        eps=eps,
        num_coordinates=num_coordinates,
        feedback=feedback,
        h0=h0,
        sega=sega,
        refill=refill,
    )
    if averaging != 1:
        estimator = averaged(estimator, averaging)
    return gradient_descent(learning_rate, estimator, key=key, constraint=constraint)


def gradient_descent(
    learning_rate: Schedule,
    estimator: Estimator,
    *,
    key: Array,
    constraint: ConstraintSet | None = None,
) -> BlackBox:
    r"""Gradient descent with any estimator: the baselines.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      estimator: For instance `random_directions()` or `full_coordinates()`.
      key: A typed threefry key.
      constraint: The set, with a projection; None: the whole space.

    Raises:
      ValueError: An argument is out of its range, or the set has no projection.
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, POSITIVE)
    project = None if constraint is None else check_constraint(constraint, "project").project

    def move(x: Array, direction: Array, count: Array, d: int) -> Array:
        del d
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        new = x - rate * direction
        return new if project is None else project(new)

    return ask_tell(estimator, move, key, constraint)
