"""FLOPs of the matrix products of a traced function, on one device of a mesh."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from jax import lax
from jax.interpreters import partial_eval

# Passes of a product of float32 matrices through a unit that multiplies bfloat16.
_PASSES = {lax.Precision.HIGHEST: 6, lax.Precision.HIGH: 3}

Branch = Callable[[Iterable[float]], float]


def product_flops(
    jaxpr: Any,
    devices: int = 1,
    *,
    branch: Branch = max,
    rounds: int = 1,
) -> float:
    """FLOPs of the products, in passes of bfloat16, of one device.

    What the compiler lays out counts as divided evenly, what a `shard_map` does as it is written
    there: padding and repeated work included. Loops count as often as they run. Nothing but
    products, Cholesky factors and triangular solves is counted.

    Args:
      jaxpr: As `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.
      devices: Of the mesh.
      branch: Which branch of a conditional, by its FLOPs: `max` or `min`.
      rounds: Of a loop that ends on a condition and not on a count. Of several in a row the longest
        runs, as a refresh of bases beside their start, and those inside of it once each.

    >>> import jax
    >>> x = jax.ShapeDtypeStruct((8, 4), "bfloat16")
    >>> product_flops(jax.make_jaxpr(lambda x: x @ x.T)(x))
    512.0
    """

    def flops(jaxpr: Any, share: float, branch: Branch = branch, inside: bool = False) -> float:
        total, waiting = 0.0, [0.0]
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            name, params = eqn.primitive.name, eqn.params
            if name == "cond":
                total += branch([flops(x, share, branch, inside) for x in params["branches"]])
            elif name == "while":
                found = flops(params["body_jaxpr"], share, branch, inside=True)
                if inside:
                    total += found
                else:
                    waiting.append(found)
            elif name == "shard_map":
                # Shapes inside are those of one device, as far as its axes go.
                axes = params["newly_manual_axes"]
                parts = math.prod(params["mesh"].shape[axis] for axis in axes)
                total += flops(params["jaxpr"], share * parts, branch, inside)
            elif name == "pallas_call":
                # Every block counts, also one that the kernel skips, as without it.
                blocks = math.prod(params["grid_mapping"].grid)
                total += flops(params["jaxpr"], share * blocks, max)
            elif inner := [each for value in params.values() for each in _jaxprs(value)]:
                times = params["length"] if name == "scan" else 1
                total += times * sum(flops(each, share, branch, inside) for each in inner)
            else:
                total += share * _of_equation(eqn)
        return total + rounds * max(waiting)

    whole = getattr(jaxpr, "jaxpr", jaxpr)
    # The compiler drops what nothing reads, as the loss of a step that needs its weight alone.
    used, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))
    return flops(used, 1 / devices)


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple) else (value,)
    return [x for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def _of_equation(eqn: Any) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left, out = eqn.invars[0].aval, eqn.outvars[0].aval
        flops = 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
        precision = eqn.params["precision"]
        chosen = precision[0] if isinstance(precision, tuple) else precision
        return flops * (_PASSES.get(chosen, 1) if left.dtype.itemsize == 4 else 1)
    if name == "cholesky":
        return math.prod(eqn.outvars[0].aval.shape) * eqn.outvars[0].aval.shape[-1] / 3
    if name == "triangular_solve":
        size = eqn.invars[0].aval.shape[-1]
        return 1.0 * math.prod(eqn.outvars[0].aval.shape) * size
    return 0.0
