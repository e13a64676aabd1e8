"""Runs the loops of the repeated-learning experiment; see README.md for claim and protocol.

python experiments/repeated_learning/run.py
python experiments/repeated_learning/report.py

Results that exist are not computed again.
"""

import argparse
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np

from jaxopt_lab.dynamics import repeated_learning as rl
from jaxopt_lab.report.files import write_result

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"

PAIRS = ((1.0, 0.0), (0.1, 0.9), (1.0, 3.0))
DATA = {"linear": rl.linear_data, "friedman": rl.friedman_data}
SEEDS = 10  # of a loop, as published
SLOW_SEEDS = 4  # of sgd50 in the sampling set-up, which costs forty times as much as ridge
# The steps at which a loop is judged: those of the published figures.
JUDGED = {"window": 1400, "sampling": 10_000}

SURFACE_SEEDS = 6
NOISES = (1.0, 10.0)

CRITICAL_SEEDS, MANY_SEEDS = 16, 256
CRITICAL_RATIOS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)
CRITICAL_USAGES = (0.3, 1.0)
CRITICAL_STEPS = {"window": 1400, "sampling": 4000}
# Records over which the end is averaged.
END = 5


def main() -> None:
    """Runs what has no result file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the results whose name contains this")
    chosen = parser.parse_args().only
    RESULTS.mkdir(exist_ok=True)
    for name, job in jobs().items():
        path = RESULTS / f"{name}.json"
        if path.exists() or chosen not in name:
            continue
        started, cpu = time.monotonic(), time.process_time()
        result = job()
        result["seconds"] = round(time.monotonic() - started, 1)
        result["cpu_seconds"] = round(time.process_time() - cpu, 1)
        write_result(path, result)
        print(f"{name}: {result['seconds']} s ({result['cpu_seconds']} s of CPU)", flush=True)


def jobs() -> dict[str, Any]:
    """Every result file by name, cheap ones first."""
    result: dict[str, Any] = {}
    for setup in ("window", "sampling"):
        for rule in ("mae", "var"):
            result[f"critical-{setup}-{rule}"] = functools.partial(critical, setup, rule)
            result[f"control-{setup}-{rule}"] = functools.partial(control, setup, rule)
    for setup in ("window", "sampling"):
        for name, job in (("control", control), ("critical", critical)):
            result[f"{name}-many-{setup}-mae"] = functools.partial(job, setup, "mae", MANY_SEEDS)
    for setup in ("window", "sampling"):
        for noise in NOISES:
            result[f"surface-{setup}-noise{noise:g}"] = functools.partial(surface, setup, noise)
    for data in DATA:
        result[f"single-window-{data}-ridge0.1"] = functools.partial(single_runs, data)
    for learner in ("ridge0", "ridge0.1", "sgd50"):
        for setup in ("window", "sampling"):
            for data in DATA:
                result[f"loops-{setup}-{data}-{learner}"] = functools.partial(
                    loops, setup, data, learner
                )
    return result


def loops(setup: str, data: str, learner: str) -> dict[str, Any]:
    """The three published pairs (p, s) of one set-up, data set and learner."""
    slow = setup == "sampling" and learner == "sgd50"
    steps = 1400 if setup == "window" else 10_000 if slow else 30_000
    config = rl.LoopConfig(setup=setup, steps=steps, record_every=1 if setup == "window" else 10)
    seeds = SLOW_SEEDS if slow else SEEDS
    keys = jax.random.split(jax.random.key(0), seeds)
    usage, adherence = zip(*PAIRS, strict=True)
    record = rl.run_many(
        keys, DATA[data], rl.LEARNERS[learner], usage=np.array(usage),
        adherence=np.array(adherence), config=config, batch_size=min(seeds, 16),
    )  # fmt: skip
    cases = [case(rl.record_at(record, number), pair, config) for number, pair in enumerate(PAIRS)]
    return {"setup": setup, "data": data, "learner": learner, "seeds": seeds, "cases": cases}


def case(record: rl.LoopRecord, pair: tuple[float, float], config: rl.LoopConfig) -> dict[str, Any]:
    """Curves of one pair, means over seeds, and the verdict at the published number of steps."""
    usage, adherence = pair
    inside = record.step <= JUDGED[config.setup]
    cut = rl.LoopRecord(
        record.step[inside], record.scale[:, inside],
        jax.tree.map(lambda x: x[:, inside], record.statistics), None, None,
    )  # fmt: skip
    verdict = rl.judge(cut, usage=usage, adherence=adherence, config=config, items=2000)
    s = jax.tree.map(np.asarray, record.statistics)
    with np.errstate(divide="ignore"):
        deviation = rl.band_over_seeds(np.log(s.dev))
    return {
        "usage": usage,
        "adherence": adherence,
        "verdict": verdict.label,
        "resolved": verdict.resolved,
        "growth": list(verdict.growth),
        "expected_growth": verdict.expected.growth,
        "text": str(verdict),
        "step": record.step,
        "deviation": np.exp(np.array(deviation)),
        "mae": s.mae.mean(0),
        "density_at_zero": np.array(rl.band_over_seeds(s.density_at_zero)),
        "mass": {f"{k:g}": s.mass[..., i].mean(0) for i, k in enumerate(config.kappas)},
        "normality": np.quantile(s.normality, [0.5, 0.25, 0.75], axis=0),
        "moments": {str(k): s.moments[..., k - 1].mean(0) for k in (2, 4, 6)},
        "log_moment_sum": np.logaddexp(0.0, s.log_moment_sum).mean(0),
    }


def single_runs(data: str) -> dict[str, Any]:
    """Window, (1, 0), ridge0.1: r² of one line through ln f_t(0) of every run by itself."""
    keys = jax.random.split(jax.random.key(0), SEEDS)
    record = rl.run_many(
        keys, DATA[data], rl.LEARNERS["ridge0.1"], usage=1.0, adherence=0.0, setup="window"
    )
    with np.errstate(divide="ignore"), jax.enable_x64(True):
        values = np.log(np.asarray(record.statistics.density_at_zero))
        r2 = [float(rl.fit_line(record.step, value).r2) for value in values]
    return {"data": data, "r2": r2, "without_value": np.mean(~np.isfinite(values))}


def surface(setup: str, noise: float) -> dict[str, Any]:
    """The published grid of 11 × 15 pairs after 1400 steps."""
    make = functools.partial(rl.linear_data, noise=noise)
    config = rl.LoopConfig(setup=setup, steps=1400)
    result = rl.run_surface(
        jax.random.key(1), make, rl.LEARNERS["ridge0"], loop=config, seeds=SURFACE_SEEDS
    )
    return {"setup": setup, "noise": noise, "seeds": SURFACE_SEEDS} | result._asdict()


def critical(setup: str, rule: str, seeds: int = CRITICAL_SEEDS) -> dict[str, Any]:
    """ln(scale at the end / start) around the critical adherence of theory, for every seed."""
    s_star = rl.critical_adherence(rule, setup=setup)
    adherence = s_star * np.array(CRITICAL_RATIOS)
    usage = np.array(CRITICAL_USAGES)[:, None]
    steps = CRITICAL_STEPS[setup]
    config = rl.LoopConfig(setup=setup, rule=rule, steps=steps, record_every=2)
    keys = jax.random.split(_critical_key(seeds), seeds)
    record = rl.run_many(
        keys, rl.linear_data, rl.LEARNERS["ridge0"], usage=usage, adherence=adherence, config=config
    )
    scale = np.log(np.asarray(record.scale))  # (p, s, seeds, records)
    with jax.enable_x64(True):
        theory = rl.relative_scale(
            steps, setup=setup, size=config.num_active(2000), usage=usage, adherence=adherence,
            rule=rule,
        )  # fmt: skip
    at_end = record.step[-END:]
    return {
        "setup": setup,
        "rule": rule,
        "critical": s_star,
        "usage": list(CRITICAL_USAGES),
        "adherence": adherence,
        "growth": scale[..., -END:].mean(-1) - scale[..., :1].mean(-1),
        "theory": np.log(np.asarray(theory))[at_end].mean(0),
        "steps": steps,
    }


def control(setup: str, rule: str, seeds: int = CRITICAL_SEEDS) -> dict[str, Any]:
    """The seeds of `critical` without adoption: ln(scale) at the start and at the end."""
    config = rl.LoopConfig(setup=setup, rule=rule, steps=CRITICAL_STEPS[setup], record_every=2)
    keys = jax.random.split(_critical_key(seeds), seeds)
    record = rl.run_many(
        keys, rl.linear_data, rl.LEARNERS["ridge0"], usage=0.0, adherence=0.0, config=config
    )
    scale = np.log(np.asarray(record.scale))
    return {"setup": setup, "rule": rule, "start": scale[:, 0], "end": scale[:, -END:].mean(-1)}


def _critical_key(seeds: int) -> jax.Array:
    """Of the seeds of `critical` and of its control; those of the large runs are fresh."""
    return jax.random.key(2 if seeds == CRITICAL_SEEDS else 3)


if __name__ == "__main__":
    main()
