"""Sweeps the learning rate of every optimizer of the trainer; see README.md for the protocol.

python experiments/default_rates/run.py --preset tiny
python experiments/default_rates/report.py
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from jaxopt_lab import data, models
from jaxopt_lab.sweep.program import Program, Run
from jaxopt_lab.sweep.task import Task
from jaxopt_lab.tasks import language_model_loss
from jaxopt_lab.train.config.optimizers import OPTIMIZERS, ModelInfo
from jaxopt_lab.train.config.optimizers_zeroth_order import ZEROTH_ORDER
from jaxopt_lab.train.config.run import PretrainConfig, from_preset
from jaxopt_lab.train.config.tuned import default_optimizer
from jaxopt_lab.train.rule import build_rule

RESULTS = pathlib.Path(__file__).parent / "results"
SWEEP_SEED, FRESH_SEEDS = 0, (1, 2)
# A step of a spectral method is longest where a sign has 1, so the grids stand apart.
HALF_DECADES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST = {"lion": 3e-5, "signum": 3e-5, "adamw": 1e-4, "soap": 1e-4, "dykaf": 1e-4, "shampoo": 1e-4}
CELLS, EXTENSIONS = 5, 2


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of the runs of a preset."""

    roots: tuple[str, ...]
    batch_size: int
    steps: int
    held_out: int
    compute_dtype: models.config.DType


SCALES = {
    "tiny": Scale(("stdlib",), 8, 300, 16, "float32"),
    "gpt2-124m": Scale(("site-packages",), 32, 200, 8, "bfloat16"),
}


def main() -> None:
    args = _arguments()
    config, scale = _config(args.preset)
    windows = _windows(config, scale, args.tokens)
    if args.save_tokens:
        windows.save(args.save_tokens)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.optimizers:
        path = args.out / f"{args.preset}-{name}.json"
        if not path.exists():
            result = sweep(config, scale, windows, name)
            path.write_text(json.dumps(result, indent=1) + "\n")


def sweep(config: PretrainConfig, scale: Scale, windows: data.Windows, name: str) -> dict[str, Any]:
    """All cells on the sweep's seed; then the best and the default of today on fresh seeds."""
    optimizer = default_optimizer(config.preset, name)
    info = ModelInfo.of(config.model)

    def build(rate: Any) -> Any:
        traced = dataclasses.replace(optimizer, learning_rate=rate)
        return build_rule(traced, config.schedule, info, scale.steps).tx

    task = task_of(config, scale, windows)
    program = Program(task, build, 1, vectorized=False)

    def train(rate: float, seed: int) -> dict[str, Any]:
        before = time.perf_counter()
        curves = program.train([Run(rate, seed)])
        loss, train_losses = float(curves.held_out[0, -1]), curves.train[0]
        print(
            f"{config.preset} {name} {rate:g} seed {seed}: {loss:.4f} nats/token, largest rise "
            f"{largest_rise(train_losses):.2f}, {time.perf_counter() - before:.1f} s",
            flush=True,
        )
        return {
            "rate": rate,
            "seed": seed,
            "held_out": loss if np.isfinite(loss) else None,
            "rise": largest_rise(train_losses),
            "train": [round(float(x), 3) if np.isfinite(x) else None for x in train_losses],
        }

    runs = {rate: train(rate, SWEEP_SEED) for rate in _grid(name)}
    for _ in range(EXTENSIONS):
        extended = _beyond_rim(runs)
        if extended is None:
            break
        runs[extended] = train(extended, SWEEP_SEED)
    best = best_rate(list(runs.values()))
    rates = {optimizer.learning_rate} | ({best} if best else set())
    return {
        "preset": config.preset,
        "optimizer": name,
        "default_rate": optimizer.learning_rate,
        "best_rate": best,
        "sweep": [runs[rate] for rate in sorted(runs)],
        "fresh": [train(rate, seed) for rate in sorted(rates) for seed in FRESH_SEEDS],
        "compile_seconds": program.compile_seconds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "corpus": windows.corpus_hash,
        "bytes_per_token": windows.bytes_per_token,
        **dataclasses.asdict(scale),
    }


def task_of(config: PretrainConfig, scale: Scale, windows: data.Windows) -> Task:
    """What all runs of a preset share."""
    return Task(
        init_params=lambda key: models.init_params(config.model, key),
        loss=language_model_loss(config.model),
        batches=windows.batches,
        held_out=windows.held_out(),
        steps=scale.steps,
        evaluate_every=scale.steps,
        tokens_per_step=scale.batch_size * config.model.context,
        clip=config.clip,
    )


def largest_rise(losses: np.ndarray) -> float:
    """How far the training loss, averaged over 5 steps, ever climbs above its lowest so far."""
    smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
    if not np.isfinite(smooth).all():
        return 1e9
    return float(np.max(smooth - np.minimum.accumulate(smooth)))


def best_rate(runs: list[dict[str, Any]]) -> float | None:
    """Lowest held-out loss among the smooth runs, or among all where none is smooth."""
    finite = [run for run in runs if run["held_out"] is not None]
    smooth = [run for run in finite if run["rise"] < 1.0]
    return min(smooth or finite, key=lambda run: run["held_out"], default={"rate": None})["rate"]


def _grid(name: str) -> tuple[float, ...]:
    first = HALF_DECADES.index(FIRST.get(name, 3e-4))
    return HALF_DECADES[first : first + CELLS]


def _beyond_rim(runs: dict[float, Any]) -> float | None:
    """The next rate beyond the rim that the best one lies on."""
    best = best_rate(list(runs.values()))
    step = {min(runs): -1, max(runs): 1}.get(best or 0.0)
    if best is None or step is None:
        return None
    index = HALF_DECADES.index(best) + step
    return HALF_DECADES[index] if 0 <= index < len(HALF_DECADES) else None


def _config(preset: str) -> tuple[PretrainConfig, Scale]:
    scale, config = SCALES[preset], from_preset(preset)
    model = dataclasses.replace(config.model, compute_dtype=scale.compute_dtype)
    return dataclasses.replace(config, model=model), scale


def _windows(config: PretrainConfig, scale: Scale, saved: pathlib.Path | None) -> data.Windows:
    if saved is not None:
        return data.Windows.read(saved)
    corpus = data.prepare(data.PythonSource(scale.roots), config.tokenizer, on_progress=print)
    return data.draw_windows(
        corpus, seeds=(SWEEP_SEED, *FRESH_SEEDS), steps=scale.steps, batch_size=scale.batch_size,
        context=config.model.context, max_batches=scale.held_out,
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SCALES, default="tiny")
    names = [name for name in OPTIMIZERS if name not in ZEROTH_ORDER]
    parser.add_argument("--optimizers", nargs="*", default=names, choices=names)
    parser.add_argument("--tokens", type=pathlib.Path, help="windows written by --save-tokens")
    parser.add_argument("--save-tokens", type=pathlib.Path, help="write the windows and stop")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
