"""Replay of the Shampoo family: our rule with what only the released code does."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.optim import Graft, InverseRoot, ShampooState
from jaxopt_lab.parity.shampoo import distributed_shampoo
from tests.golden.harness import Case, Check, NotUnderstood, Result
from tests.golden.trajectory import find_states

# Of factors and roots, relative to their largest entry (`tolerance_note` of the sidecars).
STATE_TOLERANCE = 1e-11
# Of parameters with full-rank factors.
PARAM_TOLERANCE = 1e-10

# Hyperparameters of the released class -> our option, where nothing but the name differs.
RENAMED = {
    "epsilon": "eps",
    "weight_decay": "weight_decay",
    "weight_decay_type": "weight_decay_type",
    "precondition_frequency": "precondition_frequency",
    "use_bias_correction": "bias_correction",
    "beta3": "b3",
    "momentum": "momentum",
    "dampening": "dampening",
    "use_nesterov": "nesterov",
}
TRANSLATED = {"lr", "betas", "start_preconditioning_step", "grafting", "inverse_exponent_override"}
TRANSLATED |= {"max_preconditioner_dim"}
METHOD, CLASS = "distributed shampoo", "DistributedShampoo"
PARAM_ARRAYS = {"param_init", "grads", "params"}


def replay(case: Case) -> list[Result]:
    """All comparisons of one case, in one result."""
    chosen = options(case)
    names = list(case.sidecar["params"])
    _check_arrays(case, names)
    with jax.enable_x64(True):
        init, grads = (
            {p: jnp.asarray(case.arrays[f"{p}/{what}"], "float64") for p in names}
            for what in ("param_init", "grads")
        )
        params, final = _run(tuple(chosen.items()), init, grads)
        (state,) = find_states(final, ShampooState)
        checks = [
            Check.of(
                f"{p}/params",
                params[p],
                case.arrays[f"{p}/params"],
                float(case.sidecar["params"][p]["tol"]),
            )
            for p in names
        ]
        checks += _compare_factors(case, state)
    return [Result(f"{case.family}/{case.name}", tuple(checks))]


def options(case: Case) -> dict[str, Any]:
    """Keyword arguments of `distributed_shampoo` for a case.

    Raises:
      NotUnderstood: The sidecar describes something else, or has a hyperparameter without a
        counterpart here.
    """
    sidecar = case.sidecar
    source = sidecar.get("source", {})
    if sidecar.get("method") != METHOD or not str(source.get("cls")).startswith(CLASS):
        raise NotUnderstood(f"method {sidecar.get('method')!r} of class {source.get('cls')!r}")
    if not str(sidecar.get("dtype")).startswith("float64"):
        raise NotUnderstood(f"dtype {sidecar.get('dtype')!r}")
    h = dict(sidecar["hyperparameters"])
    unknown = sorted(set(h) - set(RENAMED) - TRANSLATED)
    if unknown:
        raise NotUnderstood(f"unknown hyperparameters {', '.join(unknown)}")
    missing = [name for name in ("lr", "betas", "epsilon") if name not in h]
    if missing:
        raise NotUnderstood(f"hyperparameter {missing[0]} is missing")
    chosen = {ours: h[theirs] for theirs, ours in RENAMED.items() if theirs in h}
    # The released class holds the rate in float32.
    chosen["learning_rate"] = float(np.float32(h["lr"]))
    chosen["b1"], chosen["b2"] = h["betas"]
    chosen["start_preconditioning_step"] = _start(h)
    chosen["graft"] = _graft(h.get("grafting"))
    override = h.get("inverse_exponent_override") or {}
    if not isinstance(override, Mapping):
        raise NotUnderstood(f"inverse_exponent_override {override!r}")
    chosen["inverse_root"] = InverseRoot(
        exponent={int(order): float(p) for order, p in override.items()},
        method="eigh",
        max_precond_dim=h.get("max_preconditioner_dim", 1024),
    )
    if chosen.get("b3") in (-1, -1.0):
        chosen["b3"] = None
    if chosen.get("weight_decay_type", "decoupled") not in ("decoupled", "l2"):
        raise NotUnderstood(f"weight_decay_type {chosen['weight_decay_type']!r}")
    return chosen


def _start(h: Mapping[str, Any]) -> int | None:
    start = h.get("start_preconditioning_step", -1)
    if start == -1 or start == "= precondition_frequency":
        return None
    if isinstance(start, int) and start > 0:
        return start
    raise NotUnderstood(f"start_preconditioning_step {start!r}")


def _graft(grafting: Any) -> Graft:
    if grafting is None:
        return Graft(kind=None)
    if not isinstance(grafting, Mapping) or set(grafting) - {"type", "beta2", "epsilon"}:
        raise NotUnderstood(f"grafting {grafting!r}")
    kind = str(grafting.get("type", "adam")).lower()
    if kind not in ("adam", "adagrad", "rmsprop", "sgd"):
        raise NotUnderstood(f"grafting of type {kind!r}")
    names = {"beta2": "b2", "epsilon": "eps"}
    numbers = {ours: grafting[theirs] for theirs, ours in names.items() if theirs in grafting}
    return Graft(kind, **numbers)  # pyright: ignore[reportArgumentType]


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def _run(chosen: tuple[tuple[str, Any], ...], params: Any, grads: Any) -> tuple[Any, Any]:
    tx = distributed_shampoo(**dict(chosen))

    def step(carry: Any, grad: Any):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), path = jax.lax.scan(step, (params, tx.init(params)), grads)
    return path, state


def _check_arrays(case: Case, names: list[str]) -> None:
    for key in case.arrays:
        p, _, what = key.partition("/")
        known = what in PARAM_ARRAYS or what.endswith("_final")
        if p not in names or not known:
            raise NotUnderstood(f"unknown array {key}")
    for p in names:
        for what in sorted(PARAM_ARRAYS):
            if f"{p}/{what}" not in case.arrays:
                raise NotUnderstood(f"array {p}/{what} is missing")


def _compare_factors(case: Case, state: ShampooState) -> list[Check]:
    """Factors and roots of every block at the end; ours are padded with zeros at the edges."""
    checks = []
    fields = {"factor": state.factors, "inv_root": state.roots}
    for key, wanted in case.arrays.items():
        p, *block, what = key.split("/")
        if not block:
            continue
        kind = what.removesuffix("_final").rstrip("0123456789")
        mode = what.removesuffix("_final").removeprefix(kind)
        number = block[0].removeprefix("block_")
        if kind not in fields or not mode.isdigit() or not number.isdigit() or len(block) > 1:
            raise NotUnderstood(f"unknown array {key}")
        got = np.asarray(fields[kind][int(mode)][p])[int(number)]
        d = len(wanted)
        scale = np.abs(wanted).max()
        # Round-off decides about the null directions of a rank-deficient factor, in its root as in
        # the parameters, whose tolerance says by how much.
        tolerance = STATE_TOLERANCE * max(1.0, case.sidecar["params"][p]["tol"] / PARAM_TOLERANCE)
        checks.append(Check.of(key, got[:d, :d] / scale, wanted / scale, tolerance))
    return checks
