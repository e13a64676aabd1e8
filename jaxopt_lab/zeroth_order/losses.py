"""The loss as a function, `value_fn` or `probe_fn`: what it has to be, and its errors."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array

from jaxopt_lab.core.checks import POSITIVE, check_number

ValueFn = Callable[[Any], Array]
# Primitives that draw; directions are made of others.
_RANDOM = ("random_bits", "rng_bit_generator", "rng_uniform")

_BEHIND_A_MASK = (
    "behind optax.partition or optax.masked the parameters have holes, so value_fn cannot be "
    "called. Estimate in front of it:\n"
    "    optax.chain(zeroth_order.estimate(..., trainable=mask), optax.partition(...))\n"
    "or fill the holes: value_fn=zeroth_order.fill_masked(value_fn, params)"
)


class FilledValueFn:
    """A loss that takes trees with holes; see `fill_masked`."""

    def __init__(self, value_fn: ValueFn, params: optax.Params) -> None:
        """Keeps both."""
        self._value_fn, self._params = value_fn, params

    def __call__(self, params: optax.Params) -> Array:
        """The loss at `params`, its holes filled."""

        def filled(mine: Any, whole: Any) -> Any:
            return whole if isinstance(mine, optax.MaskedNode) else mine

        whole = jax.tree.map(filled, params, self._params, is_leaf=_is_masked)
        return self._value_fn(whole)


def fill_masked(value_fn: ValueFn, params: optax.Params) -> ValueFn:
    """A loss for a transformation behind `optax.partition` or `optax.masked`.

    Args:
      value_fn: Loss of whole parameters.
      params: The parameters that fill what is hidden from the transformation.

    Example:
      >>> params = {"a": jnp.ones(()), "b": jnp.ones(())}
      >>> value_fn = fill_masked(lambda p: p["a"] + p["b"], params)
      >>> float(value_fn({"a": 2.0, "b": optax.MaskedNode()}))
      3.0
    """
    return FilledValueFn(value_fn, params)


def check_value_fn(value_fn: ValueFn | None, params: optax.Params | None, eps: Any = None) -> None:
    """Raise where a loss cannot be evaluated, before it is.

    Args:
      value_fn: The loss.
      params: Where it is to be evaluated.
      eps: Size of the perturbations.

    Raises:
      ValueError: There is no loss, the parameters have holes, or as for `check_loss`.
    """
    if value_fn is None or params is None:
        missing = "the parameters" if params is None else "the loss as a function of them"
        raise ValueError(
            f"a zero-order update needs params and value_fn; {missing} is missing:\n"
            "    value_fn = lambda params: loss(params, batch)\n"
            "    updates, state = tx.update(None, state, params, value_fn=value_fn)"
        )
    has_holes = any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
    if has_holes and not isinstance(value_fn, FilledValueFn):
        raise ValueError(_BEHIND_A_MASK)
    check_loss("value_fn", value_fn, params, eps)


def check_loss(name: str, loss: ValueFn, params: optax.Params, eps: Any = None) -> None:
    """Raise where a function cannot serve as a loss.

    Args:
      name: What the user calls it.
      loss: From parameters to a number.
      params: Where it is to be evaluated.
      eps: Size of the perturbations.

    Raises:
      ValueError: The loss is no scalar, depends on values while it is traced, draws random numbers,
        or no digit is left of its differences.
    """
    if not callable(loss):
        raise ValueError(f"{name}: got {loss!r}, wanted a function of the parameters")
    try:
        program, value = jax.make_jaxpr(loss, return_shape=True)(params)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ValueError(
            f"{name} cannot be traced by jax: it looks at values in Python. Write it in jax, or "
            f"ask for points and tell their losses, as the black-box methods do ({error})"
        ) from error
    dtype: Any = getattr(value, "dtype", bool)
    if getattr(value, "shape", None) != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: got {value}, wanted one floating-point number")
    if _draws(program.jaxpr):
        raise ValueError(
            f"{name} draws random numbers, as dropout does: it must give the same value each time. "
            "Switch dropout off (deterministic=True, model.eval(), no key for the adapters), and "
            "draw what belongs to the batch outside of it"
        )
    if isinstance(eps, int | float) and (digits := _digits(eps, dtype)) <= 0:
        raise ValueError(
            f"eps is {eps} and the loss is {dtype}: a difference of losses of size 1 has "
            f"{digits:.1f} decimal digits. Compute the loss in float32"
        )


def check_eps(eps: Any, params: optax.Params) -> None:
    """Raise `ValueError` where a perturbation is rounded away in a leaf of size 1."""
    check_number("eps", eps, POSITIVE)
    if isinstance(eps, jax.Array):
        return  # it may be traced
    for path, x in tree_leaves_with_path(params):
        if (digits := _digits(eps, x.dtype)) <= 0:
            raise ValueError(
                f"eps is {eps} and leaf {keystr(path)} is {x.dtype}, which near 1 keeps "
                f"{digits:.1f} decimal digits of such a perturbation. Take eps above "
                f"{float(jnp.finfo(x.dtype).eps):.1g}, or parameters of more digits"
            )


def _draws(program: Any) -> bool:
    """Whether a program draws random numbers, the programs inside of its operations included."""
    for operation in program.eqns:
        inner = jax.tree.leaves(list(operation.params.values()), is_leaf=_is_program)
        if operation.primitive.name in _RANDOM or any(map(_draws, filter(_is_program, inner))):
            return True
    return False


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns")


def _digits(eps: float, dtype: Any) -> float:
    return math.log10(eps / float(jnp.finfo(dtype).eps))


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
