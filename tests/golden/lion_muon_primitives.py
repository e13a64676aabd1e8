"""Cases of the LionMuon family that are functions rather than trajectories."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.core.newton_schulz import COEFFICIENTS, newton_schulz
from jaxopt_lab.core.spectral import power_iteration, stable_rank
from jaxopt_lab.parity.lion_muon import newton_schulz_rounded
from jaxopt_lab.schedules import warmup_stable_decay
from tests.golden.harness import Case, Check, NotUnderstood, Result

TOLERANCE = 1e-12


def recognise(case: Case) -> Callable[[Case], Result] | None:
    """The comparison of a case without an optimizer, told by what its sidecar and arrays hold."""
    if "optimizer_class" in case.sidecar:
        return None
    if "configs" in case.sidecar:
        return _schedules
    if "coefficients" in case.sidecar:
        return _newton_schulz
    if any(name.endswith(".v0") for name in case.arrays):
        return _stable_rank
    raise NotUnderstood("no optimizer class, and not a primitive that is known")


def _schedules(case: Case) -> Result:
    checks = []
    with jax.enable_x64(True):
        for name, config in case.sidecar["configs"].items():
            unknown = set(config) - {"scheduler", "lr", "iterations", "warmup", "fd", "fs", "dt"}
            if unknown or config["scheduler"] not in ("cos", "wsd"):
                raise NotUnderstood(f"schedule {name}: {config}")
            span = config["lr"], config["iterations"], config["warmup"]
            if config["scheduler"] == "cos":
                lr, steps, warmup = span
                start = 0.01 * lr if warmup else lr
                schedule = optax.warmup_cosine_decay_schedule(start, lr, warmup, steps)
            else:
                schedule = warmup_stable_decay(
                    *span,
                    decay_fraction=config["fd"],
                    decay_shape=config.get("dt", "linear"),
                    final_fraction=config.get("fs", 0.0),
                )
            wanted = case.arrays[name]
            got = schedule(jnp.arange(len(wanted)))
            checks.append(Check.of(name, got, wanted, TOLERANCE))
    return Result(f"{case.family}/{case.name}", tuple(checks))


def _newton_schulz(case: Case) -> Result:
    if not np.allclose(case.sidecar["coefficients"], COEFFICIENTS["quintic"].steps[0]):
        raise NotUnderstood(f"coefficients {case.sidecar['coefficients']}")
    eps = case.sidecar["eps"]
    checks = []
    for name, wanted in case.arrays.items():
        if "_" not in name:
            continue
        precision, source, steps = name.split("_")
        x, steps = case.arrays[source], int(steps.removeprefix("steps"))
        if precision == "f64":
            with jax.enable_x64(True):
                got = newton_schulz(jnp.asarray(x), steps=steps, eps=eps)
            checks.append(Check.of(name, got, wanted, TOLERANCE))
        elif precision == "bf16":
            # The stored inputs are (rows, columns) as released, and ours their transposes.
            got = newton_schulz_rounded(jnp.asarray(x.T, jnp.float32), steps=steps, eps=eps).T
            checks.append(Check.of(name, got, wanted, 0.0))
        else:
            raise NotUnderstood(f"array {name}")
    return Result(f"{case.family}/{case.name}", tuple(checks))


def _stable_rank(case: Case) -> Result:
    checks = []
    with jax.enable_x64(True):
        for name, wanted in case.arrays.items():
            matrix, _, quantity = name.partition(".")
            if quantity in ("X", "v0"):
                continue
            if not quantity.startswith("it"):
                raise NotUnderstood(f"array {name}")
            x, start = (jnp.asarray(case.arrays[f"{matrix}.{key}"]) for key in ("X", "v0"))
            rounds = int(quantity.removeprefix("it"))
            sigma = float(power_iteration(x, start, iterations=rounds, eps=1e-7))
            square = float(jnp.sum(x * x))
            got = math.sqrt(square) / (sigma + 1e-12), square / (sigma**2 + 1e-12)
            checks.append(Check.of(name, got, wanted, TOLERANCE))
            # Ours adds nothing to the norms, so that the scale does not matter.
            ours = float(stable_rank(x, start, iterations=rounds))
            checks.append(Check.of(name, ours, wanted[1], 1e-5, relative=True))
    return Result(f"{case.family}/{case.name}", tuple(checks))
