r"""Frank-Wolfe: moves to points that a linear minimisation oracle returns, without projections."""

from jaxtyping import Array

from jaxopt_lab.core.checks import Wanted, check_number
from jaxopt_lab.zeroth_order.ask_tell import BlackBox, ask_tell
from jaxopt_lab.zeroth_order.averaging import Schedule, averaged
from jaxopt_lab.zeroth_order.constraints import ConstraintSet, check_constraint
from jaxopt_lab.zeroth_order.coordinate_memory import coordinate_memory
from jaxopt_lab.zeroth_order.differences import Estimator, Feedback

_SHARE = Wanted("a number in (0, 1], where 1 is the way to the oracle", lambda x: 0 < x <= 1)


def jaguar_frank_wolfe(
    constraint: ConstraintSet,
    *,
    key: Array,
    step_size: Schedule | None = None,
    eps: float = 1e-3,
    feedback: Feedback = "deterministic",
    averaging: Schedule | None = None,
    num_coordinates: int = 1,
    h0: str = "full",
    sega: bool | None = None,
    refill: float = 0.0,
) -> BlackBox:
    r"""Minimise a black box over a convex set: Frank-Wolfe with JAGUAR's memory of differences.

    An iteration asks for two values and refreshes one random coordinate of a memory $h$,

    $$h_i \leftarrow \frac{f(x + \tau e_i) - f(x - \tau e_i)}{2 \tau}, \qquad
    s = \operatorname*{argmin}_{s \in Q} \langle s, h \rangle, \qquad
    x \leftarrow x + \gamma (s - x).$$

    With stochastic feedback, $s$ minimises along an average of unbiased estimates,
    $g \leftarrow (1 - \eta) g + \eta (h^{old} + d (D_i - h^{old}_i) e_i)$.

    Iterates stay in the set; points asked for lie up to $\tau$ outside of it. What is asked for and
    told, and how to run thousands of iterations in one program, is described in `BlackBox`.

    Args:
      constraint: The set, with a linear minimisation oracle.
      key: A typed threefry key.
      step_size: $\gamma$, a number or a schedule, at most 1. None: $4 / (k + 8 d)$, stochastic
        $4 / (k + 8 d^{3/2})$.
      eps: $\tau$, in the units of the point. Too large is biased, too small drowns in noise. Of
        size $\Delta$, that wants $\sqrt{2 \Delta / L}$ at worst, $L$ the smoothness, and
        $(3 \Delta / M)^{1/3}$ where third derivatives are at most $M$.
      feedback: "deterministic"; "two_point": both values of a pair from one sample; "one_point":
        from independent samples; "single": one value an iteration, at a random side, from a sample
        of its own, $h_i = \pm f(x \pm \tau e_i) / \tau$. The memory is first filled by pairs of one
        sample.
      averaging: $\eta$, the weight of a new estimate, a number or a schedule; 1 is no average.
        None: $4 / (k + 8 d^{3/2})^{2/3}$ for stochastic feedback, 1 for deterministic.
      num_coordinates: Coordinates an iteration, distinct; all of them is the full method.
      h0: "full": the memory is filled by the first 2 d values. "zeros": it is not.
      sega: Use the unbiased estimate instead of $h$. None: with stochastic feedback.
      refill: Probability with which the memory is filled again, by 2 d values, before an iteration.

    Raises:
      ValueError: An argument is out of its range, or the set has no oracle.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import zeroth_order as zo
      >>> target = jnp.array([0.1, 0.7, 0.2])
      >>> opt = zo.jaguar_frank_wolfe(zo.l2_ball(), key=jax.random.key(0))
      >>> f = lambda x: float(jnp.sum((x - target) ** 2))
      >>> state, values = opt.minimize(f, jnp.zeros(3), num_calls=400)
      >>> bool(jnp.abs(state.x - target).max() < 0.05)
      True

    Source: Veprikov, Bogdanov, Minashkin and Beznosikov, "New Aspects of Black Box Conditional
    Gradient: Variance Reduction and One Point Feedback", arXiv 2409.10442.

    Differs from the released code in: the momentum averages corrected estimates (a script
    overwrites the memory first, which leaves an average of h: `sega=False`); with a single value
    the memory is overwritten whatever the sign.
    """
    stochastic = feedback != "deterministic"
    estimator = coordinate_memory(
        eps=eps,
        num_coordinates=num_coordinates,
        feedback=feedback,
        h0=h0,
        sega=stochastic if sega is None else sega,
        refill=refill,
    )
    if stochastic or averaging is not None:
        estimator = averaged(estimator, averaging)
    return _ready(estimator, constraint, key, step_size, 1.5 if stochastic else 1.0)


def frank_wolfe(
    estimator: Estimator,
    constraint: ConstraintSet,
    *,
    key: Array,
    step_size: Schedule | None = None,
) -> BlackBox:
    r"""Frank-Wolfe with any estimator: the baselines.

    Args:
      estimator: For instance `random_directions()`, or `averaged(sega(), 0.1)`.
      constraint: The set, with a linear minimisation oracle.
      key: A typed threefry key.
      step_size: $\gamma$, a number or a schedule, at most 1. None: $4 / (k + 8 d)$.

    Raises:
      ValueError: An argument is out of its range, or the set has no oracle.

    Source: Jaggi, "Revisiting Frank-Wolfe: Projection-Free Sparse Convex Optimization", ICML 2013.
    """
    return _ready(estimator, constraint, key, step_size, 1.0)


def _ready(
    estimator: Estimator,
    constraint: ConstraintSet,
    key: Array,
    step_size: Schedule | None,
    power: float,
) -> BlackBox:
    oracle = check_constraint(constraint, "lmo").lmo
    assert oracle is not None
    if step_size is not None and not callable(step_size):
        check_number("step_size", step_size, _SHARE)

    def move(x: Array, direction: Array, count: Array, d: int) -> Array:
        if step_size is None:
            gamma = 4 / (count + 8 * d**power)
        else:
            gamma = step_size(count) if callable(step_size) else step_size
        return x + gamma * (oracle(direction, x) - x)

    return ask_tell(estimator, move, key, constraint)
