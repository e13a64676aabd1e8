"""Runs the comparison and writes results/*.json; see README.md for claims and protocol.

python experiments/zeroth_order/fine_tuning/run.py --minutes 9    # until it says done
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from methods import METHODS, Method
from setting import Lanes, Setting, open_setting

from jaxopt_lab import sweep, tasks
from jaxopt_lab.report.files import write_result

HERE = pathlib.Path(__file__).parent
TUNING_SEED, FINAL_SEEDS = 0, (1, 2)


def main() -> None:
    """Runs what has no result yet, in the order of `METHODS`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after so many")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--trial", action="store_true", help="a small random model")
    given = parser.parse_args()
    given.results.mkdir(exist_ok=True, parents=True)
    end = time.monotonic() + 60 * given.minutes
    setting = open_setting(trial=given.trial)
    write_if_new(given.results / "zero-shot.json", lambda: zero_shot(setting))
    for name, method in METHODS.items():
        path = given.results / f"{slug(name)}.json"
        for stage in ("tuning", "final"):
            known = json.loads(path.read_text()) if path.exists() else {"method": name}
            if stage in known or given.only not in name:
                continue
            if time.monotonic() > end:
                return print("stopped; start again for the rest")
            found = tuned(setting, method) if stage == "tuning" else final(setting, method, known)
            write_result(path, known | {stage: found})
            print(
                f"{name}, {stage}: {found['seconds']} s, {found['compile_seconds']} s compiling",
                flush=True,
            )
    print("done")


def slug(name: str) -> str:
    """The name of a file."""
    return name.lower().replace(",", "").replace(" ", "-")


def zero_shot(setting: Setting) -> dict[str, Any]:
    """The model as it is."""
    found = tasks.row_results(setting.logits, setting.base, setting.rows["test"])
    return {"method": "zero-shot", "correct": digits(found.correct), "nats": found.nats.mean()}


def tuned(setting: Setting, method: Method) -> dict[str, Any]:
    """All rates on one seed."""
    runs = [sweep.Run(rate, TUNING_SEED) for rate in method.rates]
    _, found = trained(Lanes(setting, method, runs))
    best = np.nan_to_num(np.array(found["validation"]), nan=np.inf).min(1)
    chosen = int(best.argmin())
    return found | {
        "rates": method.rates, "best": best, "rate": method.rates[chosen],
        "rim": chosen in (0, len(best) - 1),
    }  # fmt: skip


def final(setting: Setting, method: Method, known: dict[str, Any]) -> dict[str, Any]:
    """The best rate on fresh seeds, and the answers of their best checkpoints."""
    lanes = Lanes(setting, method, [sweep.Run(known["tuning"]["rate"], s) for s in FINAL_SEEDS])
    moving, found = trained(lanes)
    answers = []
    for lane, seed in enumerate(FINAL_SEEDS):
        params, side = lanes.params(moving, lane)
        rows = tasks.row_results(setting.logits, params, setting.rows["test"], side=side)
        answers.append({"seed": seed, "correct": digits(rows.correct), "nats": rows.nats.mean()})
    return found | {"test": answers}


def trained(lanes: Lanes) -> tuple[Any, dict[str, Any]]:
    """What moves of the best checkpoint of every lane, and the course of the runs."""
    state, rates = lanes.start(), lanes.rates()
    held_out = jax.device_put(dict(lanes.task.held_out))
    before = time.monotonic()
    advance = lanes.program.advance.lower(rates, state, lanes.batches(0), held_out).compile()
    compiling = time.monotonic() - before
    best = jax.tree.map(jnp.copy, state.params)
    lowest, values, losses = jnp.full(len(lanes.runs), jnp.inf), [], []
    before = time.monotonic()
    for number in range(lanes.evaluations):
        state, train, (value, _) = advance(rates, state, lanes.batches(number), held_out)
        best, lowest = kept(best, lowest, state.params, value)
        values.append(value)
        losses.append(jnp.nanmean(train, 1))
    validation, train = (np.stack(jax.device_get(x), 1) for x in (values, losses))
    memory: Any = advance.memory_analysis()
    count, passes = len(lanes.runs), lanes.every * lanes.method.passes
    return best, {
        "validation": validation, "train": train,
        "passes": passes * (np.arange(lanes.evaluations) + 1),
        "seconds": round(time.monotonic() - before, 1), "compile_seconds": round(compiling, 1),
        "lanes": count,
        "lane_bytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) // count,
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


@jax.jit
def kept(best: Any, lowest: jax.Array, params: Any, value: jax.Array) -> tuple[Any, jax.Array]:
    """The better of two checkpoints in every lane; a loss that is not finite is not better."""
    better = value < lowest

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, best, params), jnp.where(better, value, lowest)


def digits(correct: np.ndarray) -> str:
    """One digit a row."""
    return "".join("01"[int(x)] for x in correct)


def write_if_new(path: pathlib.Path, make: Any) -> None:
    """Keeps what is there."""
    if not path.exists():
        write_result(path, make())


if __name__ == "__main__":
    main()
