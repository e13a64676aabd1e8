"""The LionMuon paper's own cells of 3 000 steps at 124M; see paper_cells.md for the protocol.

python experiments/lion_muon/paper_cells.py --prepare
python experiments/lion_muon/paper_cells.py --seconds 540
python experiments/lion_muon/paper_cells.py --report
"""

import argparse
import json
import math
import pathlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from methods import CLIP, WEIGHT_DECAY, Method

from jaxopt_lab import models
from jaxopt_lab.report import format_table
from jaxopt_lab.sweep import PAIRED_RULE, Program, Run, paired_differences
from jaxopt_lab.sweep.long_runs import text_task
from jaxopt_lab.sweep.source_text import Text, open_text
from jaxopt_lab.sweep.stored import Budget, train_stored

HERE = pathlib.Path(__file__).parent
BATCH, WARMUP, VOCABULARY, ADAM_RATE = 32, 300, 8192, 1e-3
SEEDS = (0, 1)
HELD_OUT_WINDOWS = 1024


@dataclass(frozen=True)
class Cell:
    """A row of the paper's table of short runs, in the order in which they are run."""

    method: Method
    spectral: float
    sign: float
    adam: float
    published: float  # final validation loss on FineWeb

    @property
    def slug(self) -> str:
        """Its name in that of a file."""
        return self.method.name.lower().replace(" ", "-").replace("=", "-")


CELLS = (
    Cell(Method("Muon", 1, b2=0.9), 1e-3, 0.0, ADAM_RATE, 4.2487),
    Cell(Method("LionMuon P=2", 2), 1e-3, 5e-5, ADAM_RATE, 4.2558),
    Cell(Method("SignMuon P=2", 2, b2=0.9), 2e-3, 5e-5, ADAM_RATE, 4.2345),
    Cell(Method("AdamW", math.inf), 0.0, 0.0, 5e-4, math.nan),
    Cell(Method("LionMuon P=1", 1), 7e-4, 0.0, ADAM_RATE, 4.2850),
    Cell(Method("LionMuon P=5", 5), 2e-3, 5e-5, ADAM_RATE, 4.2584),
    Cell(Method("Signum", math.inf, b2=0.9), 0.0, 1e-4, ADAM_RATE, 4.4304),
)


@dataclass(frozen=True)
class Scale:
    """A size of run: the paper's, or one that shows on two cores that the program works."""

    model: models.DecoderConfig
    roots: tuple[str, ...]
    batch: int
    evaluate_every: int
    held_out: int  # windows


PAPER = replace(models.PRESETS["llama-124m"], vocab_size=VOCABULARY, compute_dtype="bfloat16")
SCALES = {
    "paper": Scale(PAPER, ("site-packages",), BATCH, 500, HELD_OUT_WINDOWS),
    "trial": Scale(
        replace(PAPER, vocab_size=512, width=64, depth=2, heads=2, context=64),
        ("stdlib",), 8, 20, 64,
    ),
}  # fmt: skip


def main() -> None:
    args = _arguments()
    if args.report:
        print(report(args.out, args.steps))
        return
    scale = SCALES[args.scale]
    text = open_text(args.corpus / args.scale, scale.roots, scale.model.vocab_size)
    if args.prepare:
        return
    task = text_task(
        scale.model, text, batch_size=scale.batch, steps=args.steps,
        evaluate_every=scale.evaluate_every, held_out_windows=scale.held_out,
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    budget = Budget(args.seconds)
    for cell in CELLS:
        named = [(Run(1.0, seed), _path(args.out, cell, args.steps, seed)) for seed in args.seeds]
        if cell.method.name not in args.methods or all(path.exists() for _, path in named):
            continue
        print(cell.method.name, flush=True)
        program = Program(task, builder(cell, scale, args.steps), 1, vectorized=False)
        facts = {
            "name": cell.method.name,
            "rates": {"spectral": cell.spectral, "sign": cell.sign, "adamw": cell.adam},
            **conditions_of(scale, text, args.steps),
        }
        if not train_stored(program, named, budget, lambda run, facts=facts: facts):
            return


def _path(out: pathlib.Path, cell: Cell, steps: int, seed: int) -> pathlib.Path:
    return out / f"paper-{steps}-{cell.slug}-seed-{seed}.json"


def builder(cell: Cell, scale: Scale, steps: int) -> Any:
    """(factor of all rates, 1) -> the optimizer, with its clip."""
    warmup = min(WARMUP, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.01, 1.0, warmup, steps)
    axes = models.matrix_axes(scale.model)

    def build(factor: Any) -> optax.GradientTransformation:
        rates = (factor * cell.spectral, factor * cell.sign, factor * cell.adam)
        return cell.method.build(schedule, *rates, axes)

    return build


def conditions_of(scale: Scale, text: Text, steps: int) -> dict[str, Any]:
    """What a result file says of how its numbers came about."""
    held_out = scale.held_out * scale.model.context
    return {
        "steps": steps,
        "parameters": models.parameter_count(scale.model),
        "batch": scale.batch,
        "context": scale.model.context,
        "clip": CLIP,
        "weight_decay": WEIGHT_DECAY,
        "evaluate_every": scale.evaluate_every,
        "held_out_tokens": min(held_out, text.validation.num_tokens),
        "corpus": text.facts,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def report(out: pathlib.Path, steps: int) -> str:
    """Losses of the cells that are there, and differences to Muon on the seeds of all of them."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in CELLS:
        paths = {seed: _path(out, cell, steps, seed) for seed in SEEDS}
        runs = {s: json.loads(path.read_text()) for s, path in paths.items() if path.exists()}
        if runs and all(run["held_out"][-1] is not None for run in runs.values()):
            found[cell.method.name] = runs
    shared = [seed for seed in SEEDS if all(seed in runs for runs in found.values())]
    against: dict[str, dict[str, str]] = {}
    for what in ("held_out", "train_last_100"):
        losses = {name: [_final(runs[s], what) for s in shared] for name, runs in found.items()}
        against[what] = _against(losses)
    rows = [
        [
            name,
            f"{np.mean([_final(run, 'held_out') for run in runs.values()]):.4f}",
            f"{np.mean([run['held_out_se'] for run in runs.values()]):.4f}",
            against["held_out"].get(name, ""),
            f"{np.mean([run['train_last_100'] for run in runs.values()]):.4f}",
            against["train_last_100"].get(name, ""),
            f"{published - CELLS[0].published:+.3f}" if math.isfinite(published) else "",
            len(runs),
            f"{np.mean([run['seconds'] for run in runs.values()]):.0f}",
        ]
        for cell in CELLS
        if (name := cell.method.name) in found
        for runs, published in [(found[name], cell.published)]
    ]
    headers = [
        "optimizer", "held out [nats/token]", "± documents", "minus Muon",
        "training, last 100 steps", "minus Muon", "published", "seeds", "seconds a run",
    ]  # fmt: skip
    return f"{format_table(headers, rows, markdown=True)}\n\nSeeds {shared}. {PAIRED_RULE}"


def _final(run: dict[str, Any], what: str) -> float:
    return run[what][-1] if what == "held_out" else run[what]


def _against(losses: dict[str, list[float]]) -> dict[str, str]:
    """Differences to Muon, with the standard error of equal seeds where there are two."""
    reference = CELLS[0].method.name
    others = [name for name in losses if name != reference]
    if reference not in losses or not others or not losses[reference]:
        return {}
    if len(losses[reference]) < 2:
        return {name: f"{losses[name][0] - losses[reference][0]:+.4f}" for name in others}
    found = paired_differences(losses)
    return {
        name: f"{each.value:+.4f} ± {each.standard_error:.4f}"
        + ("" if each.counts else " (direction only)")
        for name in others
        for each in [found[name, reference]]
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [cell.method.name for cell in CELLS]
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--methods", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after that")
    parser.add_argument("--prepare", action="store_true", help="make the token files and stop")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--corpus", type=pathlib.Path, default=HERE / "corpus")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
