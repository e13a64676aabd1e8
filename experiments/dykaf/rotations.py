"""Trains SOAP and DyKAF with rotations of several precisions; see README.md, "Rotations".

python experiments/dykaf/rotations.py --scale gpu
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np
import optax
from methods import CLIP, KRONECKER, METHODS, WEIGHT_DECAY, Method
from run import FINAL_SEEDS, HERE, RESULTS, SCALES, SWEEP_SEED

import jaxopt_lab as jol
from jaxopt_lab import models
from jaxopt_lab.core.precision import ProductPrecision
from jaxopt_lab.report import format_table
from jaxopt_lab.sweep import difference, seed_noise
from jaxopt_lab.sweep.program import Program, Run

DIRECTIONS = {"SOAP": jol.scale_by_soap, "DyKAF": jol.scale_by_dykaf}
DEFAULT = jol.Eigenbasis().rotation_precision
PRECISIONS: tuple[ProductPrecision, ...] = (DEFAULT, "highest", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--steps", type=int, help="shorten the runs, for a trial")
    parser.add_argument("--tokens", type=pathlib.Path, help="windows written by run.py")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "rotations.json")
    args = parser.parse_args()
    scale = SCALES[args.scale].shortened(args.steps)
    tokens = scale.windows((SWEEP_SEED, *FINAL_SEEDS), args.tokens)
    schedule = optax.warmup_cosine_decay_schedule(0.01, 1.0, scale.warmup, scale.steps)
    axes, task = models.matrix_axes(scale.model()), scale.task(tokens, clip=CLIP)
    adam_rate = _best_rate("AdamW")
    rows = []
    for name in DIRECTIONS:
        rate = _best_rate(name)
        for precision in PRECISIONS:
            method, before = with_rotations(name, precision), time.perf_counter()

            def build(rate: Any, method: Method = method) -> optax.GradientTransformation:
                return method.build(rate, adam_rate, schedule, axes)

            program = Program(task, build, len(FINAL_SEEDS))
            curves = program.train([Run(rate, seed) for seed in FINAL_SEEDS])
            rows.append(
                {
                    "method": name,
                    "rotations": precision,
                    "rate": rate,
                    "finals": [float(loss) for loss in curves.held_out[:, -1]],
                }
            )
            print(rows[-1], f"{time.perf_counter() - before:.0f} s", flush=True)
    file = {"seeds": FINAL_SEEDS, "rows": rows, **scale.conditions(tokens)}
    args.out.write_text(json.dumps(file, indent=1, allow_nan=False) + "\n")
    print(table(rows))


def with_rotations(name: str, precision: ProductPrecision) -> Method:
    """SOAP or DyKAF of the comparison with rotations of another precision."""
    method = next(m for m in METHODS if m.name == name)
    eigenbasis = jol.Eigenbasis(rotation_precision=precision)

    def rule(matrix_axes: Any) -> optax.GradientTransformation:
        direction = DIRECTIONS[name](**KRONECKER, eigenbasis=eigenbasis, matrix_axes=matrix_axes)
        return optax.chain(direction, optax.add_decayed_weights(WEIGHT_DECAY))

    return dataclasses.replace(method, rule=rule)


def table(rows: list[dict[str, Any]]) -> str:
    """Final losses, and what each precision is away from float32 rotations."""
    noise = seed_noise([row["finals"] for row in rows])
    exact = {row["method"]: row["finals"] for row in rows if row["rotations"] == "highest"}
    cells = []
    for row in rows:
        found = difference(row["finals"], exact[row["method"]], noise)
        cells.append(
            [
                row["method"],
                row["rotations"],
                f"{np.mean(row['finals']):.4f}",
                f"{found.value:+.4f} ({found.standard_errors:+.1f})",
            ]
        )
    header = ["method", "rotations", "held-out nats/token", "minus highest (in standard errors)"]
    return format_table(header, cells)


def _best_rate(name: str) -> float:
    slug = next(method.slug for method in METHODS if method.name == name)
    return json.loads((HERE / "results" / f"gpu-{slug}.json").read_text())["best_rate"]


if __name__ == "__main__":
    main()
