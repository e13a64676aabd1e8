"""Runs both checks; see README.md for the protocol.

python experiments/zeroth_order/known_answers/run.py
"""

import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.step import apply_updates

RESULTS = pathlib.Path(__file__).parent / "results"
DIMENSION, START_VALUE, STEPS, SEGMENT = 50, 12.29, 20_000, 500
VARIANTS, RUNS = ("axes", "rotated"), 10
TIMES = (1, 3, 10, 30, 100, 300, 1000)
SIZES = ((50, 5), (200, 2), (200, 5), (200, 10), (1000, 5))
ALIGNMENT_SEEDS, ALIGNMENT_EPS = 20, 1e-2

# (rate, kept momentum, standard deviation of the noise) and the reference after 1e3, 5e3, 2e4
# steps; None where it gives no number.
Cell = tuple[float, float, float]
METHODS: dict[str, dict[Cell, tuple[float | None, ...]]] = {
    "MeZO": {(1e-2, 0, 0): (0.021, 0.0, 0.0)},
    "ZO-SignSGD, elementwise": {
        (1e-2, 0, 0): (0.46, 0.031, 3.7e-4),
        (3e-3, 0, 0): (6.2, 2.8e-3, 4e-5),
    },
    "ZO-SignSGD, scalar": {
        (1e-2, 0, 0): (0.079, 0.019, 2.6e-4),
        (3e-3, 0, 0): (5.0, 1.7e-3, 3e-5),
    },
    "JAGUAR SignSGD": {
        (1e-2, 0.9, 0): (18.0, 13.9, 0.25),
        (1e-2, 0.5, 0): (7.0, 6.5, 0.083),
        (1e-2, 0.0, 0): (5.5, 5.4, 0.060),
        (3e-3, 0.5, 0): (0.70, 0.56, 0.0065),
        (3e-3, 0.0, 0): (0.67, 0.49, 0.0059),
        (1e-3, 0.0, 0): (1.33, 0.047, 6.4e-4),
        (3e-3, 0.9, 1): (None, None, 0.93),
        (3e-3, 0.5, 1): (None, None, 0.64),
        (3e-3, 0.0, 1): (None, None, 0.88),
    },
}


def main() -> None:
    """Writes what is not there yet."""
    jax.config.update("jax_enable_x64", True)
    RESULTS.mkdir(exist_ok=True)
    for name, run in (("quadratic", quadratic), ("alignment", alignment)):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            start = time.process_time()
            result = run() | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
            result["cpu_seconds"] = round(time.process_time() - start, 1)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {result['cpu_seconds']} s of CPU", flush=True)


def method(name: str, rate: Any, kept: Any, key: jax.Array) -> optax.GradientTransformation:
    """A method of the table; rate and momentum may be traced."""
    schedule = optax.cosine_decay_schedule(1.0, STEPS, alpha=0.1)

    def scheduled(count: Any) -> Any:
        return rate * schedule(count)

    if name == "MeZO":
        return zo.mezo(scheduled, key=key)
    if name == "JAGUAR SignSGD":
        single = zo.Probes(zo.single_coordinate())
        return zo.jaguar_signsgd(scheduled, b1=kept, key=key, probes=single)
    return zo.zo_signsgd(scheduled, rule="scalar" if "scalar" in name else "elementwise", key=key)


def quadratic() -> dict[str, Any]:
    """f along every run, all cells, variants and seeds of a method in one program."""
    found = []
    for name, cells in METHODS.items():
        # Lanes: every cell with every variant and every number of a run.
        lanes = [(*cell, v, r) for cell in cells for v in VARIANTS for r in range(RUNS)]
        problems = [problem(variant, number) for *_, variant, number in lanes]
        columns = [np.array([lane[i] for lane in lanes]) for i in (0, 1, 2, 4)]
        matrices, starts = (np.stack(x) for x in zip(*problems, strict=True))
        curves = np.asarray(_descend(name)(*columns, matrices, starts))
        for lane, curve in zip(lanes, curves, strict=True):
            names = ("rate", "kept", "noise", "variant", "run")
            row = dict(zip(names, lane, strict=True))
            found.append({"method": name, **row, "f": [float(f"{x:.5g}") for x in curve]})
        print(f"{name}: {len(lanes)} runs", flush=True)
    return {"every": SEGMENT, "runs": found}


def problem(variant: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and the start of a run."""
    random = np.random.default_rng(number)
    values = np.linspace(0.1, 1, DIMENSION)
    basis = np.eye(DIMENSION)
    if variant == "rotated":
        basis = np.linalg.qr(random.normal(size=(DIMENSION, DIMENSION)))[0]
    matrix, start = basis * values @ basis.T, random.normal(size=DIMENSION)
    return matrix, start * np.sqrt(START_VALUE / (0.5 * start @ matrix @ start))


def _descend(name: str) -> Callable[..., jax.Array]:
    def run(
        rate: Any, kept: Any, noise: Any, number: jax.Array, matrix: jax.Array, start: jax.Array
    ) -> jax.Array:
        key = jax.random.key(number)
        tx, of_noise = method(name, rate, kept, key), jax.random.fold_in(key, 2**31)

        def f(x: jax.Array) -> jax.Array:
            return 0.5 * x @ matrix @ x

        def step(carry: Any, count: jax.Array) -> tuple[Any, None]:
            x, state = carry
            tilt = noise * jax.random.normal(jax.random.fold_in(of_noise, count), x.shape)
            unused: Any = None
            updates, state = tx.update(unused, state, x, value_fn=lambda y: f(y) + tilt @ y)
            return (apply_updates(x, updates), state), None

        def segment(carry: Any, counts: jax.Array) -> tuple[Any, jax.Array]:
            carry, _ = jax.lax.scan(step, carry, counts)
            return carry, f(carry[0])

        counts = jnp.arange(STEPS).reshape(-1, SEGMENT)
        _, values = jax.lax.scan(segment, (start, tx.init(start)), counts)
        return values

    return jax.jit(jax.vmap(run))


def alignment() -> dict[str, Any]:
    """Cosines of the policy's mean and minus the gradient, (seeds, times) for every case."""
    cases = [{"d": d, "candidates": k, "released": False} for d, k in SIZES]
    cases.append({"d": 200, "candidates": 5, "released": True})
    for case in cases:
        seeds = jnp.arange(ALIGNMENT_SEEDS)
        cosines = np.asarray(jax.jit(jax.vmap(_cosines(**case)))(seeds))
        case["cosines"] = np.round(cosines[:, [t - 1 for t in TIMES]], 4).tolist()
        print(f"d = {case['d']}, K = {case['candidates']}", flush=True)
    return {"times": TIMES, "cases": cases}


def _cosines(d: int, candidates: int, released: bool) -> Callable[[jax.Array], jax.Array]:
    def run(seed: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        slope = jax.random.normal(jax.random.fold_in(key, 2**31), (d,))
        stay = optax.set_to_zero()
        tx = zo.ldsd(
            stay, candidates=candidates, policy_rate=1.0, eps=ALIGNMENT_EPS, key=key,
        )  # fmt: skip

        def step(state: Any, count: jax.Array) -> tuple[Any, jax.Array]:
            drawn = {}
            if released:
                of_step = jax.random.fold_in(jax.random.fold_in(key, 2**31 + 1), count)
                drawn["draws"] = _released(state.mean, slope, of_step, candidates)
            unused: Any = None
            _, state = tx.update(unused, state, jnp.zeros(d), value_fn=lambda x: x @ slope, **drawn)
            mean = zo.policy_mean(state)
            return state, -mean @ slope / (jnp.linalg.norm(mean) * jnp.linalg.norm(slope))

        return jax.lax.scan(step, tx.init(jnp.zeros(d)), jnp.arange(TIMES[-1]))[1]

    return run


def _released(mean: jax.Array, slope: jax.Array, key: jax.Array, candidates: int) -> zo.Draws:
    """One generator, seeded as the winner's, runs on from candidate to candidate in the update."""
    noise, other = jax.random.normal(key, (2, candidates, mean.size))
    scored = mean + noise
    update = mean + other.at[0].set(noise[jnp.argmin(scored @ slope)])
    return zo.Draws(scored, policy=update)


def reached(f: Sequence[float]) -> list[float]:
    """f after 1e3, 5e3 and 2e4 steps of a curve."""
    return [f[steps // SEGMENT - 1] for steps in (1_000, 5_000, 20_000)]


if __name__ == "__main__":
    main()
