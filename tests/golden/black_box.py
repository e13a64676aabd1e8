"""Replay of black-box JAGUAR from recorded coordinates and minibatches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import zeroth_order as zo
from tests.golden.harness import Case, Check, NotUnderstood, Result

TOLERANCE = 1e-10
METHODS = ("jaguar_fw", "jaguar_fw_stochastic", "jaguar_gd")
SETS = {"simplex": zo.simplex, "l1": zo.l1_ball, "l2": zo.l2_ball}
HYPERPARAMETERS = {
    *("method", "set", "radius", "tau", "h0", "lr", "feedback", "batch", "eta"),
}
# The schedules of the paper, which are the defaults.
STEP_SIZES = {"fw": "4/(k+8d)", "fw_stochastic": "4/(k+8 d^1.5)"}
MOMENTUM = "4/(k+8 d^1.5)^(2/3)"
ARRAYS = {
    *("params_x", "h", "g", "coord", "batch_plus", "batch_minus", "init_batch"),
    *("prob_A", "prob_t", "prob_D", "prob_y", "prob_lam"),
}


def replay(case: Case) -> list[Result]:
    """The iterate, the memory and the momentum after every step."""
    _check_understood(case)
    with jax.enable_x64(True):
        states = _run(case)
        stored = case.arrays
        average = isinstance(states.memory, zo.AverageState)
        checks = [
            Check.of("params_x", states.x, stored["params_x"], TOLERANCE),
            Check.of(
                "h", (states.memory.inner if average else states.memory).h, stored["h"], TOLERANCE
            ),
        ]
        if "g" in stored:
            # Before the first step the average is not set: it starts from the memory.
            checks.append(Check.of("g", states.memory.average[1:], stored["g"][1:], TOLERANCE))
            checks.append(Check.of("g[0]", states.memory.inner.h[0], stored["g"][0], TOLERANCE))
    return [Result(f"{case.family}/{case.name}", tuple(checks))]


def _check_understood(case: Case) -> None:
    h, method = case.sidecar["hyperparameters"], case.sidecar["method"]
    if method not in METHODS or set(h) - HYPERPARAMETERS or set(case.arrays) - ARRAYS:
        unknown = (set(h) - HYPERPARAMETERS) | (set(case.arrays) - ARRAYS)
        raise NotUnderstood(f"method {method!r}, unknown: {', '.join(sorted(unknown))}")
    expected = {
        "method": ("fw", "fw_stochastic", "gd"),
        "set": (*SETS, None),
        "h0": ("full", "zeros"),
        "feedback": ("two_point", "one_point"),
        "eta": (MOMENTUM,),
    }
    for name, known in expected.items():
        if name in h and h[name] not in known:
            raise NotUnderstood(f"{name} {h[name]!r}")
    if h["method"] in STEP_SIZES and h["lr"] != STEP_SIZES[h["method"]]:
        raise NotUnderstood(f"lr {h['lr']!r}")


def _optimizer(h: Any) -> zo.BlackBox:
    options: Any = {"key": jax.random.key(0), "eps": h["tau"], "h0": h.get("h0", "full")}
    if "feedback" in h:
        options["feedback"] = h["feedback"]
    constraint = None if h.get("set") is None else SETS[h["set"]](h.get("radius", 1.0))
    if h["method"] == "gd":
        return zo.jaguar_gd(h["lr"], constraint=constraint, **options)
    return zo.jaguar_frank_wolfe(constraint, **options)


def _run(case: Case) -> Any:
    """States before the first and after each step."""
    stored = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    optimizer = _optimizer(case.sidecar["hyperparameters"])
    stochastic = "batch_plus" in stored
    loss = _loss(stored)

    def f(x, *sample):
        if not stochastic:
            return loss(x, None)
        filling = jnp.issubdtype(sample[0].dtype, jax.dtypes.prng_key)
        return loss(x, stored["init_batch"] if filling else sample[0])

    # The memory is filled by asking, the steps are replayed by `step`.
    state = optimizer.init(np.asarray(stored["params_x"][0]))
    while int(state.filled) < stored["params_x"].shape[1]:
        state, x = optimizer.ask(state)
        state = optimizer.tell(state, f(x, optimizer.sample_key(state)))

    def step(state: Any, given: Any):
        index, samples = given
        draws = zo.BlackBoxDraws(zo.Coordinates(index[None], jnp.ones(1)), samples)
        state = optimizer.step(state, f, draws)
        return state, state

    samples = None
    if stochastic:
        samples = jnp.stack([stored["batch_plus"], stored["batch_minus"]], 1)
    _, after = jax.lax.scan(step, state, (stored["coord"], samples))
    return jax.tree.map(lambda a, b: np.concatenate([a[None], b]), state, after)


def _loss(stored: Any) -> Any:
    if "prob_A" in stored:
        return lambda x, _: 0.5 * (x - stored["prob_t"]) @ stored["prob_A"] @ (x - stored["prob_t"])

    def logistic(x, rows):
        d, y = (a if rows is None else a[rows] for a in (stored["prob_D"], stored["prob_y"]))
        penalty = 0.5 * stored["prob_lam"] * x @ x
        return jnp.mean(jnp.log1p(jnp.exp(-y * (d @ x)))) + penalty

    return logistic
