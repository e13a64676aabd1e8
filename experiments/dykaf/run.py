"""Runs the DyKAF comparison and writes results/*.json; see README.md for claim and protocol.

python experiments/dykaf/run.py --scale gpu
python experiments/dykaf/report.py --scale gpu
"""

import argparse
import json
import os
import pathlib
import time
from dataclasses import asdict
from typing import Any

import optax
from methods import CLIP, METHODS, Method

from jaxopt_lab import models
from jaxopt_lab.sweep import StepCost, Task, Tuned, measure_step, tune
from jaxopt_lab.sweep.decoder_runs import DecoderRuns

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
SWEEP_SEED, FINAL_SEEDS = 0, (1, 2, 3)


SCALES = {
    "gpu": DecoderRuns(("site-packages",), 8192, 384, 6, 6, 256, 32, 800, 50, 8, "bfloat16"),
    # A trial of the machinery; it decides nothing.
    "cpu": DecoderRuns(("stdlib",), 1024, 32, 1, 2, 32, 4, 24, 12, 2, "float32"),
}
# The middle ones of each grid.
CELLS = {"gpu": 6, "cpu": 3}


def main() -> None:
    args = _arguments()
    # For the trial on a CPU of few cores; CHANGELOG.md, known limits.
    os.environ.setdefault("PJRT_NPROC", "16")
    scale = SCALES[args.scale].shortened(args.steps)
    tokens = scale.windows((SWEEP_SEED, *FINAL_SEEDS), args.tokens)
    if args.save_tokens:
        tokens.save(args.save_tokens)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    task = scale.task(tokens, clip=CLIP)
    started = time.perf_counter()
    for method in METHODS:
        path = args.out / f"{args.scale}-{method.slug}.json"
        if method.name not in args.methods or path.exists():
            continue
        rates, adam_rate = method.rates, None
        if method.rule is not None:
            adam_rate = _tuned_rate(args.out / f"{args.scale}-{METHODS[0].slug}.json")
        first = (len(rates) - CELLS[args.scale]) // 2
        rates = rates[first : first + CELLS[args.scale]]
        cost, tuned = run(scale, task, method, rates, adam_rate, args.lanes)
        path.write_text(
            json.dumps(
                {
                    "name": method.name,
                    "adam_rate": adam_rate,
                    **tuned.to_json(),
                    "cost": asdict(cost),
                    **scale.conditions(tokens),
                },
                indent=1,
                allow_nan=False,
            )
            + "\n"
        )
        finals = ", ".join(f"{loss:.4f}" for loss in tuned.final_losses)
        print(
            f"{method.name}: {finals} nats/token at {tuned.best_rate}, "
            f"{1e3 * cost.step_seconds:.2f} ms/step, "
            f"{1e3 * cost.optimizer_seconds:.2f} of it optimizer, "
            f"compiled in {cost.compile_seconds + tuned.compile_seconds:.0f} s, "
            f"trained in {tuned.seconds:.0f} s, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )


def run(
    scale: DecoderRuns,
    task: Task,
    method: Method,
    rates: tuple[float, ...],
    adam_rate: float | None,
    lanes: int,
) -> tuple[StepCost, Tuned]:
    """Times one run alone, then trains all cells and the best one's seeds."""
    schedule = optax.warmup_cosine_decay_schedule(0.01, 1.0, scale.warmup, scale.steps)
    axes = models.matrix_axes(scale.model())

    def build(rate: Any) -> Any:
        return method.build(rate, adam_rate, schedule, axes)

    last_line = 0.0

    def progress(stage: str, done: int, total: int, lowest: float) -> None:
        nonlocal last_line
        if time.perf_counter() - last_line > 5 or done == total:
            last_line = time.perf_counter()
            print(f"  {method.name}: {stage}, {done}/{total}, lowest {lowest:.4f}", flush=True)

    # Rounds of 20 steps: two refreshes of the bases, ten periods of LionMuon.
    cost = measure_step(task, build, rates[len(rates) // 2], seed=SWEEP_SEED, steps=20)
    tuned = tune(
        task, build, rates, sweep_seed=SWEEP_SEED, seeds=FINAL_SEEDS, lanes=lanes,
        on_progress=progress,
    )  # fmt: skip
    return cost, tuned


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [method.name for method in METHODS]
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--steps", type=int, help="shorten the runs, for a trial")
    parser.add_argument(
        "--lanes", type=int, default=3,
        help="runs in one program; 3 lets six cells and three seeds share one compilation",
    )  # fmt: skip
    parser.add_argument("--tokens", type=pathlib.Path, help="windows written by --save-tokens")
    parser.add_argument("--save-tokens", type=pathlib.Path, help="write the windows and stop")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args()


def _tuned_rate(path: pathlib.Path) -> float:
    """AdamW's best rate, which drives the leaves that are not matrices."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: AdamW is tuned first")
    return json.loads(path.read_text())["best_rate"]


if __name__ == "__main__":
    main()
