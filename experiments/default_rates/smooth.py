"""Looks for settings with which LionMuon trains gpt2-124m smoothly; see README.md, "The jump".

python experiments/default_rates/smooth.py
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from run import FRESH_SEEDS, RESULTS, SCALES, SWEEP_SEED, _config, _windows, largest_rise, task_of

from jaxopt_lab import data
from jaxopt_lab.sweep.program import Program, Run
from jaxopt_lab.train.config.optimizers import ModelInfo
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.config.tuned import default_optimizer
from jaxopt_lab.train.rule import build_rule

PRESET, NAME = "gpt2-124m", "lion-muon"
SEEDS = (SWEEP_SEED, *FRESH_SEEDS)
# What differs from the default: settings of the schedule and of the optimizer.
CELLS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "default": ({}, {}),
    "warm-up 10 %": ({"warmup_fraction": 0.1}, {}),
    "warm-up 20 %": ({"warmup_fraction": 0.2}, {}),
    "sign rate 1/40": ({}, {"sign_lr_ratio": 0.025}),
    "sign rate 1/60": ({}, {"sign_lr_ratio": 1 / 60}),
    "AdamW rate 1/2": ({}, {"adam_lr_ratio": 0.5}),
    "warm-up 10 %, sign rate 1/40": ({"warmup_fraction": 0.1}, {"sign_lr_ratio": 0.025}),
    "warm-up 10 %, AdamW rate 1/2": ({"warmup_fraction": 0.1}, {"adam_lr_ratio": 0.5}),
}


def main() -> None:
    args = _arguments()
    config, scale = _config(PRESET)
    windows = _windows(config, scale, args.tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(CELLS):
        path = args.out / f"smooth-{number}.json"
        if number % args.parts == args.part and not path.exists():
            result = run_cell(config, windows, cell)
            path.write_text(json.dumps(result, indent=1) + "\n")


def run_cell(config: PretrainConfig, windows: data.Windows, cell: str) -> dict[str, Any]:
    """All seeds of a cell."""
    scale = SCALES[PRESET]
    of_schedule, of_optimizer = CELLS[cell]
    optimizer = dataclasses.replace(default_optimizer(PRESET, NAME), **of_optimizer)
    schedule = dataclasses.replace(config.schedule, **of_schedule)
    info = ModelInfo.of(config.model)

    def build(rate: Any) -> Any:
        traced = dataclasses.replace(optimizer, learning_rate=rate)
        return build_rule(traced, schedule, info, scale.steps).tx

    task = task_of(config, scale, windows)
    program = Program(task, build, 1, vectorized=False)
    runs = []
    for seed in SEEDS:
        curves = program.train([Run(optimizer.learning_rate, seed)])
        train, held_out = curves.train[0], float(curves.held_out[0, -1])
        rise, jump = largest_rise(train), largest_jump(train)
        print(f"{cell}, seed {seed}: {held_out:.4f}, rise {rise:.2f}, jump {jump:.2f}", flush=True)
        runs.append(
            {
                "seed": seed,
                "held_out": held_out if np.isfinite(held_out) else None,
                "rise": rise,
                "jump": jump,
                "train": [round(float(x), 3) if np.isfinite(x) else None for x in train],
            }
        )
    return {
        "cell": cell,
        "runs": runs,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "corpus": windows.corpus_hash,
    }


def largest_jump(losses: np.ndarray) -> float:
    """How far one batch lies above the mean of the five before it."""
    before = np.convolve(losses, np.ones(5) / 5, mode="valid")[:-1]
    return float(np.max(losses[5:] - before)) if np.isfinite(losses).all() else 1e9


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--tokens", type=pathlib.Path, help="windows that run.py saved")
    parser.add_argument("--part", type=int, default=0, help="this one of so many processes")
    parser.add_argument("--parts", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
