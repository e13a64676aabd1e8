"""Signum and normalized SGD: heavy-ball momentum, normalised entry by entry or leaf by leaf."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.checks import check_choice, check_decays, check_rates
from jaxopt_lab.core.numerics import Scalar, frobenius_unit, widened
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import finite_entries, guarded
from jaxopt_lab.optim.options import Routing
from jaxopt_lab.optim.rates import decayed_weights

Norm = Literal["sign", "frobenius"]

_KEYWORDS = dict.fromkeys(
    ("dampening", "init_buffer"), "jaxopt_lab.parity.lion_muon.released_heavy_ball"
)


@explains_keywords(**_KEYWORDS)
def scale_by_normalized_heavy_ball(
    *, norm: Norm, momentum: Scalar = 0.95, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Heavy-ball direction, normalised.

    $$B_t = \mu B_{t-1} + G_t, \qquad D_t = B_t \text{ or } G_t + \mu B_t,$$

    followed by $\operatorname{sign}(D)$ or $D / \lVert D \rVert_F$ for each leaf. The sign leaves
    out the entries of a gradient that are not finite, or whose square is not; the norm the whole
    leaf.

    Args:
      norm: "sign" or "frobenius".
      momentum: $\mu$.
      nesterov: Use $G + \mu B$.

    Returns:
      A transformation with state `optax.TraceState`.

    Raises:
      ValueError: `norm` is unknown.
    """
    check_decays(momentum=momentum)
    return guarded(normalized_direction(norm, optax.trace(momentum, nesterov)))


def normalized_direction(
    norm: Norm, trace: optax.GradientTransformation, eps: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """What `trace` returns, normalised; NaN where it is refused, and the state stays as it was."""
    check_choice("norm", norm, get_args(Norm))

    def normalized(d: jax.Array) -> jax.Array:
        return jnp.sign(d) if norm == "sign" else frobenius_unit(d, range(d.ndim), eps=eps)

    def step(g: jax.Array, d: jax.Array, new: jax.Array, old: jax.Array):
        new = new.astype(old.dtype)
        # A narrow buffer may overflow where the gradient does not.
        usable = finite_entries(g) & jnp.isfinite(new)
        u = normalized(jnp.where(usable, d, jnp.nan))
        return u, jnp.where(jnp.isnan(u), old, new)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        new: Any
        d, new = trace.update(jax.tree.map(widened, updates), state, params)
        leaves = map(jax.tree.leaves, (updates, d, new.trace, state.trace))
        out = [step(*arrays) for arrays in zip(*leaves, strict=True)]
        u, kept = (
            jax.tree.unflatten(jax.tree.structure(updates), [x[k] for x in out]) for k in range(2)
        )
        return u, new._replace(trace=kept)

    return optax.GradientTransformationExtraArgs(trace.init, update)


@explains_keywords(**_KEYWORDS)
def signum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Sign of a heavy-ball momentum, for all leaves; momentum 0 is signSGD.

    Args:
      learning_rate: A number or a schedule.
      momentum: Heavy-ball coefficient.
      nesterov: Look ahead by one step of the buffer.
      weight_decay: Decoupled decay.
      mask: Which leaves decay.

    Raises:
      ValueError: The rate is NaN, infinite or negative.

    Example:
      >>> tx = signum(0.1)
      >>> w = jnp.array([3.0, -2.0])
      >>> tx.update(w, tx.init(w), w)[0].tolist()
      [-0.10000000149011612, 0.10000000149011612]

    Source: Bernstein, Wang, Azizzadenesheli and Anandkumar, "signSGD", arXiv 1802.04434.

    Differs from the released code in: the buffer starts at zero, not at the parameters.
    """
    return _ready("sign", learning_rate, momentum, nesterov, weight_decay, mask)


@explains_keywords(**_KEYWORDS)
def normalized_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Heavy-ball momentum divided by its Frobenius norm, leaf by leaf.

    Args:
      learning_rate: A number or a schedule.
      momentum: Heavy-ball coefficient.
      nesterov: Look ahead by one step of the buffer.
      weight_decay: Decoupled decay.
      mask: Which leaves decay.

    Raises:
      ValueError: The rate is NaN, infinite or negative.

    Example:
      >>> tx = normalized_sgd(0.5)
      >>> w = jnp.array([3.0, 4.0])
      >>> [round(float(x), 3) for x in tx.update(w, tx.init(w), w)[0]]
      [-0.3, -0.4]

    Source: Cutkosky and Mehta, "Momentum Improves Normalized SGD", arXiv 2002.03305.

    Differs from the released code in: the buffer starts at zero, not at the parameters; nothing is
    added to the norm (released: 1e-8).
    """
    return _ready("frobenius", learning_rate, momentum, nesterov, weight_decay, mask)


def _ready(
    norm: Norm, learning_rate: Any, momentum: Scalar, nesterov: bool, weight_decay: Any, mask: Any
) -> optax.GradientTransformationExtraArgs:
    check_rates(learning_rate=learning_rate)
    check_decays(momentum=momentum)
    return guarded(
        normalized_direction(norm, optax.trace(momentum, nesterov)),
        decayed_weights(weight_decay, mask, Routing()),
        optax.scale_by_learning_rate(learning_rate),
    )
