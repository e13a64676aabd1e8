"""Replay of LoRSum, F-LoRSum, their variants and preconditioned LoRA, in a closed loop."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import lora
from tests.golden.harness import Case, Check, NotUnderstood, Result

TOLERANCE = 1e-10
KNOWN = {
    *("lr", "lookahead_iters", "lmbd", "momentum", "dampening", "rank_multiplier", "betas"),
    *("damping", "metric_type", "init_metric_scale", "kfac_metric", "metric_power"),
    *("loss_reduction", "beta2_warmup", "max_grad_norm", "solve_jitter", "lambda_effective"),
    *("start_turn", "lora_scale_alpha_over_r"),
}
ARRAYS = {
    *("W0", "W_star", "X", "Y", "S", "gA", "gB", "A0", "B0", "A", "B", "loss"),
    *("M_A", "M_B", "D_in", "D_out"),
}


class Plan(NamedTuple):
    tx: optax.GradientTransformationExtraArgs
    held: Mapping[str, str]  # array pairs of the file -> name in our state
    constant: bool = False  # whether the released code leaves its momentum where it started


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    plan = _plan(case)
    unknown = set(case.arrays) - ARRAYS
    if unknown:
        raise NotUnderstood(f"unknown arrays {', '.join(sorted(unknown))}")
    with jax.enable_x64(True):
        ours = _run(plan, case)
    arrays = case.arrays
    checks = [
        Check.of("A", ours["a"], np.swapaxes(arrays["A"], 1, 2), TOLERANCE),
        Check.of("B", ours["b"], np.swapaxes(arrays["B"], 1, 2), TOLERANCE),
        Check.of("S", ours["s"], arrays["S"], TOLERANCE),
        Check.of("loss", ours["loss"], arrays["loss"], TOLERANCE),
        Check.of("gA", ours["g_a"], np.swapaxes(arrays["gA"], 1, 2), TOLERANCE),
        Check.of("gB", ours["g_b"], np.swapaxes(arrays["gB"], 1, 2), TOLERANCE),
    ]
    for prefix, name in plan.held.items():
        for side, suffix in enumerate(("_A", "_B") if prefix == "M" else ("_in", "_out")):
            wanted = arrays[prefix + suffix]
            wanted = np.swapaxes(wanted, 1, 2) if prefix == "M" else wanted
            checks.append(Check.of(prefix + suffix, ours[name][side], wanted, TOLERANCE))
    if plan.constant:
        for name in ("M_A", "M_B"):
            still = np.broadcast_to(arrays[name][:1], arrays[name].shape)
            checks.append(Check.of(f"{name} stays", arrays[name], still, 0.0))
    return [Result(f"{case.family}/{case.name}", tuple(checks))]


def _plan(case: Case) -> Plan:
    numbers = dict(case.sidecar["hyperparameters"])
    unknown = set(numbers) - KNOWN
    if unknown:
        raise NotUnderstood(f"unknown hyperparameters: {', '.join(sorted(unknown))}")
    if numbers["lora_scale_alpha_over_r"] != 1 or not numbers["start_turn"].startswith("in"):
        raise NotUnderstood("another scale than 1, or another first factor than A")
    build = BUILD.get(case.sidecar["variant"])
    if build is None:
        raise NotUnderstood(f"unknown variant {case.sidecar['variant']!r}")
    projection = lora.LowRankSum(
        sweeps=numbers["lookahead_iters"],
        momentum_rank=numbers.get("rank_multiplier", 1.0),
        jitter=numbers["solve_jitter"],
    )
    return build(numbers, projection)


def _plain(numbers: Mapping[str, Any], projection: lora.LowRankSum) -> Plan:
    tx = lora.lorsum(
        numbers["lr"],
        rho=numbers["lmbd"],
        momentum=numbers["momentum"],
        dampening=numbers["dampening"],
        clip=numbers.get("max_grad_norm"),
        projection=projection,
    )
    return Plan(tx, {"M": "momentum"})


def _scaled(numbers: Mapping[str, Any], projection: lora.LowRankSum) -> Plan:
    (b1, b2), rate, rho = numbers["betas"], numbers["lr"], numbers["lmbd"]
    constant = b1 == 0 or projection.sweeps == 0
    if projection.sweeps == 0:
        # With no sweep the released code never updates its momentum, which starts at zero: what is
        # left is a step of 1 - b1 times the rate without momentum, with the same proximal weight.
        rate, rho = (1 - b1) * rate, rho / (1 - b1)
    tx = lora.scaled_lorsum(
        rate,
        b1=None if constant else b1,
        b2=b2,
        damping=numbers["damping"],
        rho=rho,
        clip=numbers.get("max_grad_norm"),
        metric=lora.FactorMetric(
            kind="kfac" if numbers["kfac_metric"] else "shampoo",
            form=numbers["metric_type"],
            power=numbers["metric_power"],
            init=numbers["init_metric_scale"],
            warmup=numbers["beta2_warmup"],
            loss=numbers["loss_reduction"],
        ),
        projection=projection,
    )
    held = {"D": "metric"} if constant else {"D": "metric", "M": "momentum"}
    return Plan(tx, held, constant)


def _projected(numbers: Mapping[str, Any], projection: lora.LowRankSum) -> Plan:
    tx = lora.projected_lorsum(
        numbers["lr"],
        rho=numbers["lmbd"],
        momentum=numbers["momentum"],
        dampening=numbers["dampening"],
        projection=projection,
    )
    return Plan(tx, {})


def _fista(numbers: Mapping[str, Any], projection: lora.LowRankSum) -> Plan:
    tx = lora.extrapolated_lorsum(
        numbers["lr"], rho=numbers["lmbd"], momentum=numbers["momentum"], projection=projection
    )
    return Plan(tx, {})


def _preconditioned(numbers: Mapping[str, Any], projection: lora.LowRankSum) -> Plan:
    tx = lora.preconditioned(
        numbers["lr"],
        rho=numbers["lmbd"],
        momentum=numbers["momentum"],
        jitter=projection.jitter,
    )
    return Plan(tx, {})


BUILD: dict[str, Callable[[Mapping[str, Any], lora.LowRankSum], Plan]] = {
    "plain": _plain,
    "scaled": _scaled,
    "proj": _projected,
    "fista": _fista,
    "precond": _preconditioned,
}


def _run(plan: Plan, case: Case) -> dict[str, Any]:
    arrays = {name: jnp.asarray(x, jnp.float64) for name, x in case.arrays.items()}
    mean = case.sidecar["loss_reduction"] == "mean"
    adapter = {"w": {"a": arrays["A0"].T, "b": arrays["B0"].T}}
    state = plan.tx.init(adapter)
    if "M" in plan.held:
        start = [arrays["M_A"][0].T, arrays["M_B"][0].T]
        state = optax.tree.set(state, of_pairs=_started(state, start))

    def step(carry, given):
        (adapter, state), (x, y) = carry, given
        a, b = adapter["w"]["a"], adapter["w"]["b"]
        residual = x @ arrays["W0"].T + (x @ a) @ b - y
        s = residual / len(x) if mean else residual
        loss = 0.5 * jnp.sum(jnp.square(residual)) / (len(x) if mean else 1)
        grads = {"w": {"a": x.T @ (s @ b.T), "b": (x @ a).T @ s}}
        taps = {"w": lora.Tap(x, s)}
        updates, new_state = plan.tx.update(grads, state, adapter, taps=taps)
        new = optax.apply_updates(adapter, updates)
        held = {} if not plan.held else optax.tree.get(new_state, "of_pairs")
        kept = {name: (tree["w"]["a"], tree["w"]["b"]) for name, tree in held.items()}
        out = {"s": s, "loss": loss, "g_a": grads["w"]["a"], "g_b": grads["w"]["b"]}
        return (new, new_state), (out, new["w"], kept)

    _, (out, factors, kept) = jax.jit(
        lambda: jax.lax.scan(step, (adapter, state), (arrays["X"], arrays["Y"]))
    )()

    def with_start(first, rest):
        return np.concatenate([np.asarray(first)[None], np.asarray(rest)])

    ours = {name: np.asarray(x) for name, x in out.items()}
    ours |= {name: with_start(adapter["w"][name], factors[name]) for name in "ab"}
    if plan.held:
        starts = optax.tree.get(state, "of_pairs")
        for name, sides in kept.items():
            first = (starts[name]["w"]["a"], starts[name]["w"]["b"])
            ours[name] = [with_start(f, r) for f, r in zip(first, sides, strict=True)]
    return ours


def _started(state: Any, start: list[jax.Array]) -> dict[str, Any]:
    held = dict(optax.tree.get(state, "of_pairs"))
    return held | {"momentum": {"w": {"a": start[0], "b": start[1]}}}
