"""JAGUAR Muon with the arithmetic of its released code."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.newton_schulz import COEFFICIENTS
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.options import MeshWork
from jaxopt_lab.zeroth_order.jaguar import scale_by_jaguar
from jaxopt_lab.zeroth_order.matrix_sign import matrix_signs
from jaxopt_lab.zeroth_order.probes import Probes


def jaguar_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    b1: Scalar = 0.9,
    ns_steps: int = 10,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    """JAGUAR Muon whose Newton-Schulz iterates are rounded to bfloat16 after every operation.

    Args:
      learning_rate: As for `jaxopt_lab.zeroth_order.jaguar_muon`, and so are the others.
      eps: Size of the perturbation.
      b1: What is kept of the momentum.
      ns_steps: Iterations.
      key: As for `estimate`.
      probes: As for `scale_by_jaguar`.
    """
    polar = functools.partial(rounded_newton_schulz, steps=ns_steps)
    return optax.chain(
        scale_by_jaguar(eps=eps, b1=b1, key=key, probes=probes),
        matrix_signs(polar, 1.0, probes.matrix_axes, MeshWork()),
        optax.scale_by_learning_rate(learning_rate),
    )


def rounded_newton_schulz(x: Array, steps: int) -> Array:
    """Newton-Schulz in bfloat16 as the released code has it.

    The matrix is rounded first, then its norm, then the quotient, and then every product and sum;
    matrix products accumulate in float32. The 1e-7 that is added to the norm has no effect in
    bfloat16.
    """

    def rounded(y: Array) -> Array:
        # `reduce_precision` stays where XLA would drop a cast there and back.
        return jax.lax.reduce_precision(y.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)

    def product(left: Array, right: Array) -> Array:
        return rounded(jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST))

    ((a, b, c),) = COEFFICIENTS["quintic"].steps
    tall = x.shape[-2] > x.shape[-1]
    y = rounded(x.mT if tall else x)
    norm = jnp.sqrt(jnp.sum(jnp.square(y), axis=(-2, -1), keepdims=True))
    y = rounded(y / rounded(jnp.where(norm == 0, 1, norm)))
    for _ in range(steps):
        gram = product(y, y.mT)
        inner = rounded(rounded(b * gram) + product(rounded(c * gram), gram))
        y = rounded(rounded(a * y) + product(inner, y))
    out: Any = y.mT if tall else y
    return out
