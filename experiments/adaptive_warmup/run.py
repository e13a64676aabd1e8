"""Runs the comparison of warm-ups and writes results/*.json; see README.md for claim and protocol.

python experiments/adaptive_warmup/run.py --scale gpu
python experiments/adaptive_warmup/run.py --scale gpu --smoothness
python experiments/adaptive_warmup/report.py --scale gpu
"""

import argparse
import json
import math
import pathlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from methods import (
    CLIP,
    FINAL_SEEDS,
    OPTIMIZERS,
    REFERENCE,
    SCHEDULES,
    SWEEP_SEED,
    Cells,
    Optimizer,
    Schedule,
    scheduled,
    schedules_of,
)
from smoothness import record_run

from jaxopt_lab import data, models
from jaxopt_lab.schedules import warmup_kappa
from jaxopt_lab.sweep import Curves, Program, Run, Task, Tuned
from jaxopt_lab.sweep.decoder_runs import DecoderRuns

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
LARGEST_LANES = 6


SCALES = {
    "gpu": DecoderRuns(("site-packages",), 8192, 384, 6, 6, 256, 32, 600, 50, 8, "bfloat16"),
    # A trial of the machinery; it decides nothing.
    "cpu": DecoderRuns(("stdlib",), 1024, 32, 1, 2, 32, 4, 40, 20, 2, "float32"),
}


def main() -> None:
    args = _arguments()
    scale = SCALES[args.scale].shortened(args.steps)
    tokens = scale.windows((SWEEP_SEED, *FINAL_SEEDS), args.tokens)
    if args.save_tokens:
        tokens.save(args.save_tokens)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    task = scale.task(tokens, clip=CLIP)
    started = time.perf_counter()
    for optimizer in (o for o in OPTIMIZERS if o.name in args.methods):
        study = Study(args.scale, scale, task, optimizer, tokens, args.out)
        if args.smoothness:
            # Steps of LionMuon have no one norm.
            if isinstance(optimizer.norm, str):
                record_run(study)
            print(f"{time.perf_counter() - started:.0f} s in all", flush=True)
            continue
        rows = [s for s in schedules_of(optimizer) if s.name in args.schedules]
        for family in dict.fromkeys(s.family for s in rows):
            study.train(family, [s for s in rows if s.family == family])
            print(f"{time.perf_counter() - started:.0f} s in all", flush=True)


@dataclass(frozen=True)
class Study:
    """All rows of one optimizer."""

    scale_name: str
    scale: DecoderRuns
    task: Task
    optimizer: Optimizer
    tokens: data.Windows
    out: pathlib.Path

    def path(self, row: str) -> pathlib.Path:
        """The result file of a row."""
        return self.out / f"{self.scale_name}-{self.optimizer.slug}-{row}.json"

    def read(self, row: str) -> dict[str, Any]:
        """What a row that comes first found."""
        if not self.path(row).exists():
            raise SystemExit(f"{self.path(row)} is missing: {row} of {self.optimizer.name} first")
        return json.loads(self.path(row).read_text())

    def write(self, row: str, result: dict[str, Any]) -> None:
        """Writes a result file, with the conditions of all."""
        text = json.dumps(
            {**result, **self.scale.conditions(self.tokens)}, indent=1, allow_nan=False
        )
        # A curve on one line.
        text = re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text)
        self.path(row).write_text(text + "\n")

    def target(self) -> float:
        """Final training loss of the reference row on the sweep's seed, up to the next tenth."""
        reference = self.read(REFERENCE)
        if reference["best_cell"] is None:
            raise SystemExit(f"{REFERENCE} of {self.optimizer.name} diverged; there is no target")
        return math.ceil(10 * reference["sweep_train_losses"][reference["best_cell"]]) / 10

    def train(self, family: str, rows: Sequence[Schedule]) -> None:
        """Trains the rows of a family that have no result file: their cells, then the seeds."""
        rows = [row for row in rows if not self.path(row.name).exists()]
        if not rows:
            return
        begun = time.perf_counter()
        name, rates = self.optimizer.name, self.optimizer.rates
        cells = self.cells(rows)
        count = len(cells.peak)
        lanes = _lanes(count, len(rows) * len(FINAL_SEEDS))
        axes = models.matrix_axes(self.scale.model())

        def build(index: Any) -> Any:
            cell = cells.at(index.astype(np.int32))
            return scheduled(self.optimizer, family, cell, self.task.steps, axes)

        # A run's "rate" is the number of its cell.
        program = Program(self.task, build, lanes)
        sweep = _train(program, [Run(i, SWEEP_SEED) for i in range(count)])
        losses = sweep.held_out[:, -1].reshape(len(rows), len(rates))
        finite = np.isfinite(losses).any(axis=1)
        best = [int(np.nanargmin(x)) if ok else None for x, ok in zip(losses, finite, strict=True)]
        chosen = [r * len(rates) + b for r, b in enumerate(best) if b is not None]
        final = _train(program, [Run(i, seed) for i in chosen for seed in FINAL_SEEDS])
        seconds = (time.perf_counter() - begun) / len(rows)
        tail = max(1, self.task.steps // 10)
        sweep_train = sweep.train[:, -tail:].mean(axis=1).reshape(losses.shape)
        taken = 0
        for r, row in enumerate(rows):
            mine = slice(taken, taken + (len(FINAL_SEEDS) if best[r] is not None else 0))
            taken = mine.stop
            train = final.train[mine]
            tuned = Tuned(
                rates=rates,
                sweep_losses=tuple(map(float, losses[r])),
                best=best[r],
                seeds=FINAL_SEEDS,
                evaluated_steps=tuple(self.task.evaluated_steps()),
                held_out=final.held_out[mine],
                errors=tuple(map(float, final.error[mine])),
                train_losses=tuple(map(float, train[:, -tail:].mean(axis=1))),
                runs_at_once=lanes,
                seconds=seconds,
                compile_seconds=program.compile_seconds / len(rows),
            )
            first = r * len(rates)
            result = {
                "name": name,
                "schedule": row.name,
                "family": family,
                "warmup_steps": float(cells.warmup[first]),
                "kappa": float(cells.kappa[first]),
                "target": None
                if family in ("linear", "auto")
                else round(float(cells.target[first]), 6),
                "div_factor": float(cells.div_factor[first]),
                **tuned.to_json(),
                "sweep_train_losses": [_finite(x) for x in sweep_train[r]],
                # What the schedules followed; report.py replays them.
                "train": [] if family == "linear" else [[_finite(x) for x in c] for c in train],
            }
            self.write(row.name, result)
            finals = ", ".join(f"{loss:.4f}" for loss in tuned.final_losses)
            print(f"{name}, {row.name}: {finals} nats/token at {tuned.best_rate}", flush=True)
        print(
            f"  {lanes} lanes, compiled in {program.compile_seconds:.0f} s, "
            f"{time.perf_counter() - begun:.0f} s in all",
            flush=True,
        )

    def cells(self, rows: Sequence[Schedule]) -> Cells:
        """One cell for every row and rate, rates changing fastest."""
        config, rates = self.scale.model(), self.optimizer.rates
        axes, params = models.matrix_axes(config), models.abstract_params(config)
        needs_target = any(row.family not in ("linear", "auto") for row in rows)
        target = self.target() if needs_target else 0.0

        def repeated(values: list[float]) -> np.ndarray:
            return np.repeat(np.asarray(values, np.float32), len(rates))

        return Cells(
            peak=np.tile(np.asarray(rates, np.float32), len(rows)),
            warmup=repeated([round(row.warmup * self.task.steps) for row in rows]),
            kappa=repeated(
                [warmup_kappa(params, row.norm or self.optimizer.norm, axes) for row in rows]
            ),
            target=repeated([target + row.target_shift for row in rows]),
            div_factor=repeated([self.optimizer.div_factor] * len(rows)),
        )


def _train(program: Program, runs: Sequence[Run]) -> Curves:
    """Trains runs in groups of the size of a program, the last one filled up."""
    size, parts = program.lanes, []
    for first in range(0, len(runs), size):
        group = list(runs[first : first + size])
        trained = program.train(group + [group[-1]] * (size - len(group)))
        parts.append(Curves(*(x[: len(group)] for x in trained)))
    if not parts:
        return Curves(np.zeros((0, 1)), np.zeros((0, 1)), np.zeros(0))
    return Curves(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _lanes(*runs: int) -> int:
    """The number of lanes that wastes fewest in groups of one size: one compilation for all."""
    trained = {
        size: sum(-(-n // size) * size for n in runs) for size in range(3, LARGEST_LANES + 1)
    }
    return min(trained, key=lambda size: (trained[size], -size))


def _finite(value: Any) -> float | None:
    # Six decimals are what float32 has.
    return round(float(value), 6) if math.isfinite(value) else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [optimizer.name for optimizer in OPTIMIZERS]
    rows = [schedule.name for schedule in SCHEDULES]
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--schedules", nargs="*", default=rows, choices=rows, metavar="NAME")
    parser.add_argument(
        "--smoothness", action="store_true", help="record smoothness at the tuned rates instead"
    )
    parser.add_argument("--steps", type=int, help="shorten the runs, for a trial")
    parser.add_argument("--tokens", type=pathlib.Path, help="windows written by --save-tokens")
    parser.add_argument("--save-tokens", type=pathlib.Path, help="write the windows and stop")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
