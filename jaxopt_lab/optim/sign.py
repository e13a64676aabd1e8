"""Signum and normalized SGD: elementwise and tensor-wise normalised heavy-ball descent."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.rates import check_rates, scaled_rate
from jaxopt_lab.optim.routing import float_leaves

InitBuffer = Literal["zeros", "params"]


class HeavyBallState(NamedTuple):
    """State of `scale_by_normalized_heavy_ball`."""

    count: Array  # shape=(), dtype=int32: steps taken
    trace: optax.Updates  # the buffer: shapes and dtypes of the parameters


def scale_by_normalized_heavy_ball(
    *,
    norm: Literal["sign", "frobenius"],
    momentum: Scalar = 0.95,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    init_buffer: InitBuffer = "zeros",
    first_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Heavy-ball direction, normalised.

    .. math::
      B_t = \mu B_{t-1} + (1 - d) G_t, \qquad D_t = B_t \text{ or } G_t + \mu B_t,

    followed by $\operatorname{sign}(D)$ or $D / (\lVert D \rVert_F + 10^{-8})$ for each leaf.

    Args:
      norm: "sign" or "frobenius".
      momentum: $\mu$.
      dampening: $d$.
      nesterov: Use $G + \mu B$.
      init_buffer: What $B_{-1}$ is. The released code starts from the parameters (a defect, kept
        for parity): the already decayed ones, hence `first_decay`.
      first_decay: Fraction by which step 0 decays the parameters, rate times weight decay; only
        read with `init_buffer="params"`.

    Raises:
      ValueError: `norm` or `init_buffer` is unknown.
    """
    if norm not in ("sign", "frobenius"):
        raise ValueError(f"norm is {norm!r}; choose 'sign' or 'frobenius'")
    if init_buffer not in ("zeros", "params"):
        raise ValueError(f"init_buffer is {init_buffer!r}; choose 'zeros' or 'params'")

    def init(params: optax.Params) -> HeavyBallState:
        zeros = optax.tree.zeros_like(float_leaves(params))
        return HeavyBallState(jnp.zeros([], jnp.int32), zeros)

    def direction(gradient: Array, trace: Array, start: Array) -> tuple[Array, Array]:
        wide = jnp.promote_types(gradient.dtype, jnp.float32)
        g = gradient.astype(wide)
        new = momentum * (trace.astype(wide) + start) + (1 - dampening) * g
        d = g + momentum * new if nesterov else new
        if norm == "sign":
            u = jnp.sign(d)
        else:
            u = d / (jnp.sqrt(jnp.sum(jnp.square(d))) + 1e-8)
        return u.astype(gradient.dtype), new.astype(trace.dtype)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        g, treedef = jax.tree.flatten(float_leaves(updates))
        starts = [jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32)) for x in g]
        if init_buffer == "params":
            if params is None:
                raise ValueError('init_buffer="params" needs update(grads, state, params)')
            decay = first_decay(state.count) if callable(first_decay) else first_decay
            kept = jnp.where(state.count == 0, 1 - decay, 0.0)
            starts = [
                kept * w.astype(s.dtype)
                for w, s in zip(jax.tree.leaves(params), starts, strict=True)
            ]
        pairs = [
            direction(x, b, s)
            for x, b, s in zip(g, jax.tree.leaves(state.trace), starts, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        traces = treedef.unflatten([b for _, b in pairs])
        return treedef.unflatten([u for u, _ in pairs]), HeavyBallState(count, traces)

    return optax.GradientTransformationExtraArgs(init, update)


def _ready(
    norm: Literal["sign", "frobenius"],
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    momentum: Scalar,
    dampening: Scalar,
    nesterov: bool,
    init_buffer: InitBuffer,
) -> optax.GradientTransformationExtraArgs:
    check_rates(learning_rate=learning_rate)
    direction = scale_by_normalized_heavy_ball(
        norm=norm,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        init_buffer=init_buffer,
        first_decay=scaled_rate(learning_rate, weight_decay),
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: Scalar = 0.0,
    momentum: Scalar = 0.95,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    init_buffer: InitBuffer = "zeros",
) -> optax.GradientTransformationExtraArgs:
    """Sign of a heavy-ball momentum, for all leaves; momentum 0 is signSGD.

    Args:
      learning_rate: A number or a schedule.
      weight_decay: Decoupled decay.
      momentum: Heavy-ball coefficient.
      dampening: Damping of the gradient in the buffer.
      nesterov: Look ahead by one step of the buffer.
      init_buffer: "zeros", or "params" for parity with the released code.

    Raises:
      ValueError: The rate is NaN, infinite or negative, or `init_buffer` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = signum(0.1)
      >>> w = jnp.array([3.0, -2.0])
      >>> tx.update(w, tx.init(w), w)[0].tolist()
      [-0.10000000149011612, 0.10000000149011612]

    Source: Bernstein, Wang, Azizzadenesheli and Anandkumar, "signSGD", arXiv 1802.04434.

    Differs from the released code in: the buffer starts at zero, not at the parameters.
    """
    return _ready("sign", learning_rate, weight_decay, momentum, dampening, nesterov, init_buffer)


def normalized_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: Scalar = 0.0,
    momentum: Scalar = 0.95,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    init_buffer: InitBuffer = "zeros",
) -> optax.GradientTransformationExtraArgs:
    """Heavy-ball momentum divided by its Frobenius norm, leaf by leaf.

    Args:
      learning_rate: A number or a schedule.
      weight_decay: Decoupled decay.
      momentum: Heavy-ball coefficient.
      dampening: Damping of the gradient in the buffer.
      nesterov: Look ahead by one step of the buffer.
      init_buffer: "zeros", or "params" for parity with the released code.

    Raises:
      ValueError: The rate is NaN, infinite or negative, or `init_buffer` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = normalized_sgd(0.5)
      >>> w = jnp.array([3.0, 4.0])
      >>> [round(float(x), 3) for x in tx.update(w, tx.init(w), w)[0]]
      [-0.3, -0.4]

    Source: Cutkosky and Mehta, "Momentum Improves Normalized SGD", arXiv 2002.03305.

    Differs from the released code in: the buffer starts at zero, not at the parameters.
    """
    return _ready(
        "frobenius", learning_rate, weight_decay, momentum, dampening, nesterov, init_buffer
    )
