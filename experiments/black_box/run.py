"""Runs the black-box comparison and writes results/*.json; see README.md for claim and protocol.

nice -n 10 python experiments/black_box/run.py && python experiments/black_box/report.py
"""

import argparse
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from methods import DESCENT, DETERMINISTIC, build, descent_cells, frank_wolfe_cells, stochastic
from problems import Problem, classification, gap_of, optimum, quadratic

from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.report.files import write_result

RESULTS = pathlib.Path(__file__).parent / "results"
TUNING_SEED, FINAL_SEEDS = 0, (1, 2, 3, 4, 5)
CALLS = {"deterministic": 10_000, "stochastic": 10_000, "descent": 20_000, "noise": 10_000}
RECORDS = 200
FEEDBACKS = ("two_point", "one_point")
NOISES, NOISE_SEEDS = (1e-6, 1e-4, 1e-2), (1, 2, 3)
DISTANCES = tuple(float(x) for x in np.logspace(-4, 0.5, 10))


def main() -> None:
    """Runs the methods that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the results whose name contains this")
    chosen = parser.parse_args().only
    RESULTS.mkdir(exist_ok=True)
    jax.config.update("jax_enable_x64", True)
    for name, (make, estimators, kind) in jobs().items():
        path = RESULTS / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if chosen not in name or set(estimators) <= set(known.get("methods", ())):
            continue
        started = time.process_time()
        save(path, compare(make, estimators, kind, known.get("methods", {})), started, known)
    if chosen in "noise" and not (RESULTS / "noise.json").exists():
        started = time.process_time()
        save(RESULTS / "noise.json", noise_sweep(), started, {})


def save(path: pathlib.Path, result: dict[str, Any], started: float, known: dict[str, Any]) -> None:
    """Writes a result with the time it took, that of the part known before included."""
    spent = known.get("cpu_seconds", 0.0) + time.process_time() - started
    result["cpu_seconds"] = round(spent, 1)
    write_result(path, result, digits=9)
    print(f"{path.stem}: {result['cpu_seconds']} s of CPU", flush=True)


def jobs() -> dict[str, tuple[Any, Any, str]]:
    """Every comparison by name: problem, methods, kind."""
    without_momentum = {name: DETERMINISTIC[name] for name in DESCENT}
    result: dict[str, Any] = {
        "descent-quadratic": (functools.partial(quadratic, None), without_momentum, "descent")
    }
    for name in ("simplex", "l1", "l2"):
        make = functools.partial(quadratic, name)
        result[f"fw-quadratic-{name}"] = make, DETERMINISTIC, "deterministic"
        for loss in ("logistic", "svm", "tanh"):
            for data in ("a9a", "mushroom") if loss != "tanh" else ("mushroom",):
                make = functools.partial(classification, data, loss, name)
                methods = DETERMINISTIC if loss == "logistic" else without_momentum
                result[f"fw-{data}-{loss}-{name}"] = make, methods, "deterministic"
        for feedback in FEEDBACKS if name != "l1" else ():
            make = functools.partial(classification, "a9a", "logistic", name)
            result[f"{feedback}-a9a-logistic-{name}"] = make, stochastic(feedback), "stochastic"
    return result


def compare(make: Any, estimators: Any, kind: str, known: dict[str, Any]) -> dict[str, Any]:
    """Every method: all cells on the tuning seed, then the best on the final seeds."""
    problem = make()
    d = problem.x0.size
    best, certificate = (0.0, 0.0) if problem.constraint is None else optimum(problem)
    cells = descent_cells(d, problem.smoothness) if kind == "descent" else frank_wolfe_cells(d)
    methods = {
        name: tuned(problem, estimator, cells, best, CALLS[kind], kind == "stochastic")
        for name, estimator in estimators.items()
        if name not in known
    }
    return {
        "d": d, "smoothness": problem.smoothness, "optimum": best, "certificate": certificate,
        "start": float(problem.f(jnp.asarray(problem.x0))), "methods": known | methods,
    }  # fmt: skip


def tuned(
    problem: Problem,
    make: Any,
    cells: list[float],
    best_value: float,
    num_calls: int,
    sampled: bool,
) -> dict[str, Any]:
    """Values and Frank-Wolfe gaps over oracle calls."""
    lanes = max(len(cells), len(FINAL_SEEDS))
    program = jax.jit(jax.vmap(run_of(problem, make, num_calls, sampled)))
    padded = jnp.asarray((cells + cells)[:lanes])
    values = np.asarray(program(padded, jnp.full(lanes, TUNING_SEED))[1])[: len(cells)]
    # The mean over the last tenth: stochastic iterates move.
    finals = np.nan_to_num(values[:, -RECORDS // 10 :].mean(1), nan=np.inf)
    best = int(np.argmin(finals))
    seeds = jnp.asarray((FINAL_SEEDS + FINAL_SEEDS)[:lanes])
    calls, values, gaps = map(np.asarray, program(jnp.full(lanes, cells[best]), seeds))
    kept = slice(0, len(FINAL_SEEDS))
    return {
        "cell": cells[best], "rim": best in (0, len(cells) - 1), "tuning": finals - best_value,
        "calls": calls[0], "excess": values[kept] - best_value, "gaps": gaps[kept],
    }  # fmt: skip


def run_of(problem: Problem, make: Any, calls: int, sampled: bool):
    """One run as a function of cell and seed, that records about 200 points."""
    estimator, d = make(), problem.x0.size
    steps = (calls - 2 * d * estimator.fill_first) // estimator.num_values(d)
    stride = max(1, steps // RECORDS)
    f = problem.sampled if sampled else problem.f
    if estimator.feedback != "deterministic" and not sampled:
        raise ValueError("a deterministic problem with stochastic feedback")

    def run(cell: jax.Array, seed: jax.Array):
        opt = build(estimator, problem, cell, seed)

        def record(state: Any, _: None):
            step = lambda s, _: (opt.step(s, f), None)  # noqa: E731
            state = jax.lax.scan(step, state, length=stride)[0]
            return state, (state.x, state.calls)

        state = opt.init(jnp.asarray(problem.x0))
        _, (points, count) = jax.lax.scan(record, state, length=steps // stride)
        gaps = jnp.zeros(len(points))
        if problem.constraint is not None:
            gaps = jax.lax.map(functools.partial(gap_of, problem), points)
        return count, jax.lax.map(problem.f, points), gaps

    return run


def noise_sweep() -> dict[str, Any]:
    """JAGUAR at its default step, bounded noise: final values over noise, distance and seed."""
    problem = classification("mushroom", "logistic", "l2")
    best, _ = optimum(problem)
    d = problem.x0.size
    steps = (CALLS["noise"] - 2 * d) // 2

    def run(level: jax.Array, distance: jax.Array, seed: jax.Array):
        f = lambda x, key: problem.f(x) + level * jax.random.uniform(key, minval=-1, maxval=1)  # noqa: E731
        opt = zo.jaguar_frank_wolfe(
            problem.constraint, key=jax.random.key(seed), eps=distance, feedback="one_point",
            sega=False, averaging=1.0, step_size=lambda k: 4 / (k + 8 * d),
        )  # fmt: skip
        state = opt.init(jnp.asarray(problem.x0))
        state = jax.lax.scan(lambda s, _: (opt.step(s, f), None), state, length=steps)[0]
        return problem.f(state.x)

    grid = jnp.meshgrid(*map(jnp.asarray, (NOISES, DISTANCES, NOISE_SEEDS)), indexing="ij")
    flat = [axis.ravel() for axis in grid]
    values = jax.jit(jax.vmap(run))(*flat).reshape(grid[0].shape)
    return {
        "optimum": best, "smoothness": problem.smoothness, "d": d, "noises": list(NOISES),
        "coordinate_smoothness": 0.25 * float(np.max(np.mean(np.square(columns()), 0))),
        "distances": list(DISTANCES), "excess": values - best,
    }  # fmt: skip


def columns() -> np.ndarray:
    """Features of the problem of the sweep."""
    from problems import rows_of

    return rows_of("mushroom")[0]


def rounded(value: Any) -> Any:
    """JSON values with six digits; null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray | jax.Array):
        return [rounded(item) for item in (value.tolist() if hasattr(value, "tolist") else value)]
    if isinstance(value, float):
        return float(f"{value:.9g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


if __name__ == "__main__":
    main()
