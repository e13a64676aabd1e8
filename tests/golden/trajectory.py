"""Run an optimizer of the public API over a stored trajectory and compare what comes out.

The static part of a replay (factory, options, layouts) is an argument of one jitted scan, numbers
and rates are traced: cases that differ in numbers alone share a compiled function.
"""

import functools
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.golden.harness import Case, Check, NotUnderstood

Tree = dict[str, Any]


class Plan(NamedTuple):
    """How to build the optimizer of a case."""

    factory: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any]  # static keyword arguments, hashable
    numbers: Mapping[str, float]  # traced keyword arguments
    rates: Mapping[str, np.ndarray]  # keyword arguments that become schedules: (T,) rates
    layouts: Mapping[str, Any] | None = None  # matrix_axes, one entry a parameter


class Replay(NamedTuple):
    """What our run produced; leading axis T, after each step."""

    params: Tree
    grads: Tree  # as seen at each step
    losses: np.ndarray | None  # of the closed-loop quadratic, before each step
    states: Any  # optimizer states after each step


def replay(plan: Plan, case: Case, dtype, grads: str | None = None) -> Replay:
    """Replay a case in a dtype, with the gradients of a prefix or on the quadratic (None)."""
    names = list(case.sidecar["param_shapes"])
    arrays = case.arrays

    def tree(prefix: str, to=dtype) -> Tree:
        missing = [f"{prefix}.{p}" for p in names if f"{prefix}.{p}" not in arrays]
        if missing:
            raise NotUnderstood(f"array {missing[0]} is missing")
        return {p: jnp.asarray(np.asarray(arrays[f"{prefix}.{p}"], to)) for p in names}

    quadratic = None if grads else (tree("quad_H"), tree("quad_target"))
    draws = {p: jnp.asarray(arrays[f"probe.{p}"], dtype) for p in names if f"probe.{p}" in arrays}
    options, numbers = dict(plan.options), dict(plan.numbers)
    if dtype == np.float32:
        # As in the released code, 1 - beta is formed in double precision and then rounded.
        options, numbers = options | numbers, {}
    out = _compiled(dtype == np.float32)(
        plan.factory,
        tuple(sorted(options.items())),
        None if plan.layouts is None else tuple(plan.layouts.items()),
        int(case.sidecar["steps"]),
        {name: jnp.asarray(value, dtype) for name, value in numbers.items()},
        {name: jnp.asarray(values, dtype) for name, values in plan.rates.items()},
        tree("init"),
        None if grads is None else tree(grads),
        quadratic,
        draws,
    )
    # On to NumPy: comparisons need no compiler. Typed keys have no NumPy form and are not compared.
    return Replay(*jax.tree.map(_to_numpy, out))


def _to_numpy(x: jax.Array) -> Any:
    return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


@functools.cache
def _compiled(round_every_op: bool) -> Callable:
    # Compiled for a few milliseconds of work.
    compiler = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if round_every_op:
        # XLA lets the backend contract a*b + c into one rounding, the released code rounds twice.
        # The older instruction set has no such instruction; elsewhere nothing may be compiled.
        if platform.machine() not in ("x86_64", "AMD64"):
            return jax.disable_jit()(_run)
        compiler["xla_cpu_max_isa"] = "AVX"
    return jax.jit(_run, static_argnums=(0, 1, 2, 3), compiler_options=compiler)


def _run(factory, options, layouts, steps, numbers, rates, params, grads, quadratic, draws):
    schedules = {name: lambda count, r=r: r[count] for name, r in rates.items()}
    axes = {} if layouts is None else {"matrix_axes": dict(layouts)}
    tx = optax.with_extra_args_support(factory(**dict(options), **numbers, **schedules, **axes))

    def step(carry: Any, given: Any):
        params, state = carry
        grad, draw = given
        loss = jnp.zeros(())
        if quadratic is not None:
            grad, loss = _quadratic(*quadratic, params)
        updates, state = tx.update(grad, state, params, **({"draws": draw} if draw else {}))
        params = optax.apply_updates(params, updates)
        return (params, state), (params, grad, loss, state)

    _, out = jax.lax.scan(step, (params, tx.init(params)), (grads, draws), length=steps)
    return out


def _quadratic(hessians: Tree, targets: Tree, params: Tree) -> tuple[Tree, jax.Array]:
    """Gradient and value of sum_p <p - target, H (p - target)> / 2 with H on axis 0."""
    gaps = {p: params[p] - targets[p] for p in params}
    grads = {p: jnp.tensordot(hessians[p], gap, 1) for p, gap in gaps.items()}
    return grads, sum((0.5 * jnp.vdot(gaps[p], grads[p]) for p in params), jnp.zeros(()))


def compare_params(
    case: Case, ours: Mapping[str, Any], prefix: str, tolerance: float
) -> list[Check]:
    """One check a parameter, over all steps."""
    checks = []
    for name, values in ours.items():
        key = f"{prefix}.{name}"
        if key not in case.arrays:
            raise NotUnderstood(f"array {key} is missing")
        checks.append(Check.of(key, values, case.arrays[key], tolerance))
    return checks


def final_state(replayed: Replay) -> Any:
    """The optimizer state after the last step."""
    return jax.tree.map(lambda x: x[-1], replayed.states)


def find_states(states: Any, kind: type) -> list[Any]:
    """All states of a type inside a chain or partition."""
    nodes = jax.tree.leaves(states, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]
