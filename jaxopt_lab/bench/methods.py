"""The optimizers that are timed, by name."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from jaxopt_lab.core.flops import power_iteration_flops, total_flops, two_sided_flops
from jaxopt_lab.core.newton_schulz import newton_schulz_flops
from jaxopt_lab.optim.kronecker.dykaf import dykaf
from jaxopt_lab.optim.kronecker.shampoo import shampoo
from jaxopt_lab.optim.kronecker.soap import soap
from jaxopt_lab.optim.lion_muon.lion_muon import lion_muon
from jaxopt_lab.optim.options import Eigenbasis, InverseRoot, MeshWork, NewtonSchulz
from jaxopt_lab.schedules.adaptive_warmup import adaptive_warmup

# The rate changes nothing about the time of a step; a small one keeps the numbers ordinary.
RATE = 1e-6
DECAY = 0.1
_NS_STEPS = 5
# More than any benchmark takes.
_RUN_STEPS = 10**6

DEFAULT_METHODS = (
    "adamw",
    "lion",
    "muon",
    "lion_muon_p1",
    "lion_muon_p2",
    "lion_muon_p5",
    "lion_muon_pinf",
    "lion_muon_p2_adaptive",
    "soap_f10",
    "dykaf_f10",
    "shampoo_f10",
)
_LION_MUON = re.compile(r"lion_muon_p(\d+|inf)(_adaptive)?")
_KRONECKER = re.compile(r"(soap|dykaf|shampoo)_f([1-9]\d*)(_stagger)?")


@dataclass(frozen=True)
class Method:
    """An optimizer to time."""

    name: str
    build: Callable[..., optax.GradientTransformation]
    """From the tree of matrix axes and, on a mesh, the tree of parameter shardings."""
    period: int
    """Steps after which the cost of a step repeats."""
    period_flops: Callable[[Any, Any], float]
    """FLOPs of matrix products that a period cannot do without, from parameters and axes."""


def method(name: str) -> Method:
    """Looks up an optimizer.

    Args:
      name: "adamw", "lion", "muon" (all Optax), "lion_muon_pN" with a period N, "inf" included and
        "_adaptive" appended for a warm-up that follows the loss, or "soap_fN", "dykaf_fN",
        "shampoo_fN" with N steps from one refresh to the next, "_stagger" appended for a share of
        them at every step.

    Raises:
      ValueError: If there is none of that name.

    >>> method("lion_muon_p5").period
    5
    """
    if name == "adamw":
        return Method(name, _adamw, 1, _no_products)
    if name == "lion":
        return Method(name, _lion, 1, _no_products)
    if name == "muon":
        return Method(name, _muon, 1, _newton_schulz)
    kronecker = _KRONECKER.fullmatch(name)
    if kronecker is not None:
        return _kronecker(name, kronecker[1], int(kronecker[2]), kronecker[3] is not None)
    match = _LION_MUON.fullmatch(name)
    if match is None or match[1] == "0":
        raise ValueError(
            f"optimizer: {name!r} is not one of adamw, lion, muon, lion_muon_pN (N >= 1 or inf; "
            "_adaptive), soap_fN, dykaf_fN, shampoo_fN (N >= 1; _stagger)"
        )
    return _lion_muon(name, match[1], match[2] is not None)


def _lion_muon(name: str, given: str, adaptive: bool) -> Method:
    never = given == "inf"
    period = math.inf if never else int(given)

    def build(axes: Any, param_shardings: Any = None) -> optax.GradientTransformation:
        tx = lion_muon(
            RATE,
            period=period,
            weight_decay=DECAY,
            matrix_axes=axes,
            newton_schulz=NewtonSchulz(steps=_NS_STEPS),
            mesh=MeshWork(param_shardings),
        )
        return _with_warmup(tx, axes) if adaptive else tx

    return Method(
        name, build, 1 if never else int(period), _no_products if never else _newton_schulz
    )


def _with_warmup(
    tx: optax.GradientTransformationExtraArgs, axes: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer and an adaptive warm-up, with a loss made up from the step."""
    warmup = adaptive_warmup(RATE, _RUN_STEPS, 1.0, matrix_axes=axes, relative=True)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        inner, outer = state
        updates, inner = tx.update(updates, inner, params)
        # It does not fall far enough to end the warm-up.
        loss = 4.0 - outer.count / _RUN_STEPS
        updates, outer = warmup.update(updates, outer, params, value=loss)
        return updates, (inner, outer)

    def init(params):
        return tx.init(params), warmup.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


# Two-sided products that a step cannot do without: gradient into the eigenbases and direction back,
# or gradient to direction; and those of the factors.
_KRONECKER_METHODS = {"soap": (soap, 2 + 1), "dykaf": (dykaf, 2 + 2), "shampoo": (shampoo, 1 + 1)}


def _kronecker(name: str, family: str, frequency: int, stagger: bool) -> Method:
    factory, products = _KRONECKER_METHODS[family]

    def build(axes: Any, param_shardings: Any = None) -> optax.GradientTransformation:
        if family == "shampoo":
            return shampoo(
                RATE,
                precondition_frequency=frequency,
                weight_decay=DECAY,
                matrix_axes=axes,
                inverse_root=InverseRoot(stagger=stagger),
                mesh=MeshWork(param_shardings),
            )
        return factory(
            RATE,
            precondition_frequency=frequency,
            weight_decay=DECAY,
            matrix_axes=axes,
            eigenbasis=Eigenbasis(stagger=stagger),
            mesh=MeshWork(param_shardings),
        )

    def period_flops(params: Any, axes: Any) -> float:
        rotation = total_flops(params, axes, two_sided_flops)
        every_step = frequency * products * rotation
        if family == "shampoo":  # what its roots take depends on how they are found
            return every_step
        # The first moment goes from the old bases to the new ones.
        return every_step + total_flops(params, axes, _refresh) + 2 * rotation

    return Method(name, build, frequency, period_flops)


def _adamw(axes: Any, param_shardings: Any = None) -> optax.GradientTransformation:
    return optax.adamw(RATE, weight_decay=DECAY)


def _lion(axes: Any, param_shardings: Any = None) -> optax.GradientTransformation:
    return optax.lion(RATE, weight_decay=DECAY)


def _muon(axes: Any, param_shardings: Any = None) -> optax.GradientTransformation:
    return optax.contrib.muon(
        RATE,
        ns_steps=_NS_STEPS,
        weight_decay=DECAY,
        adam_weight_decay=DECAY,
        muon_weight_dimension_numbers=axes,
    )


def _no_products(params: Any, axes: Any) -> float:
    return 0.0


def _newton_schulz(params: Any, axes: Any) -> float:
    """Every method with a spectral step takes one of them in a period."""
    return total_flops(params, axes, functools.partial(newton_schulz_flops, steps=_NS_STEPS))


def _refresh(m: int, n: int) -> float:
    return power_iteration_flops(m) + power_iteration_flops(n)
