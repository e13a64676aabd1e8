"""b2 of the trainer's default run: 0.95 or 0.99? See averaging.md for the protocol.

nice -n 19 python experiments/default_rates/averaging.py
python experiments/default_rates/averaging.py --report
python experiments/default_rates/averaging.py --fresh    # its two best cells, on seeds of their own
"""

import argparse
import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from jaxopt_lab import data
from jaxopt_lab.models import init_params
from jaxopt_lab.report import format_table
from jaxopt_lab.sweep import PAIRED_RULE, Program, Run, Task, paired_differences, rim_of
from jaxopt_lab.sweep.stored import Budget, train_stored
from jaxopt_lab.tasks import language_model_loss
from jaxopt_lab.train.config.optimizers import LionMuonConfig, ModelInfo
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.rule import build_rule

RESULTS = pathlib.Path(__file__).parent / "results" / "averaging"
RATES, AVERAGES, SEEDS = (5e-3, 1e-2, 2e-2), (0.99, 0.95), (1, 2, 3)
FRESH_RATES, FRESH_SEEDS = (1e-2,), (4, 5, 6, 7, 8)
HELD_OUT = 64  # batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=PretrainConfig().steps, help="for a trial")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after that")
    parser.add_argument("--fresh", action="store_true", help="the best cells on fresh seeds")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    rates, seeds = (FRESH_RATES, FRESH_SEEDS) if args.fresh else (RATES, SEEDS)
    if args.report:
        print(report(args.out, rates, seeds))
        return
    config = dataclasses.replace(PretrainConfig(), steps=args.steps)
    corpus = data.prepare(config.corpus, config.tokenizer, on_progress=print)
    windows = data.draw_windows(
        corpus, seeds=seeds, steps=config.steps, batch_size=config.batch_size,
        context=config.model.context, max_batches=HELD_OUT,
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    budget = Budget(args.seconds)
    programs = {b2: program_of(config, windows, b2) for b2 in AVERAGES}
    # Seed by seed, so that what is there at any time can be compared.
    for seed in seeds:
        for b2, program in programs.items():
            named = [(Run(rate, seed), path_of(args.out, b2, rate, seed)) for rate in rates]
            facts = {
                "b2": b2, "steps": config.steps, "corpus": windows.corpus_hash,
                "bytes_per_token": windows.bytes_per_token, "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
            }  # fmt: skip
            done = train_stored(
                program, named, budget, lambda run, facts=facts: {"rate": run.rate, **facts}
            )
            if not done:
                return


def program_of(config: PretrainConfig, windows: data.Windows, b2: float) -> Program:
    """The default run with another average."""
    optimizer, info = config.optimizer, ModelInfo.of(config.model)
    assert isinstance(optimizer, LionMuonConfig)

    def build(rate: Any) -> Any:
        traced = dataclasses.replace(optimizer, b2=b2, learning_rate=rate)
        return build_rule(traced, config.schedule, info, config.steps).tx

    task = Task(
        init_params=lambda key: init_params(config.model, key),
        loss=language_model_loss(config.model),
        batches=windows.batches,
        held_out=windows.held_out(),
        steps=config.steps,
        evaluate_every=max(1, config.steps // 4),
        tokens_per_step=config.batch_size * config.model.context,
        clip=config.clip,
    )
    return Program(task, build, 1, vectorized=False)


def path_of(out: pathlib.Path, b2: float, rate: float, seed: int) -> pathlib.Path:
    """The file of a run."""
    return out / f"b2-{b2:g}-rate-{rate:g}-seed-{seed}.json"


def report(out: pathlib.Path, rates: tuple[float, ...], seeds: tuple[int, ...]) -> str:
    """Bits per byte of every cell, and the difference of the two best cells at equal seeds."""
    rows, best = [], {}
    missing = 0
    for b2 in AVERAGES:
        means = {}
        for rate in rates:
            paths = [path_of(out, b2, rate, seed) for seed in seeds]
            runs = [json.loads(path.read_text()) for path in paths if path.exists()]
            missing += len(seeds) - len(runs)
            bits = [run["held_out"][-1] / math.log(2) / run["bytes_per_token"] for run in runs]
            rows.append([f"{b2:g}", f"{rate:g}", " ".join(f"{x:.4f}" for x in bits)])
            if len(bits) == len(seeds):
                means[rate] = bits
        if len(means) == len(rates):
            chosen = min(means, key=lambda rate: np.mean(means[rate]))
            best[f"b2 {b2:g}, rate {chosen:g}"] = means[chosen]
            rim = rim_of(rates.index(chosen), len(rates)) if len(rates) > 1 else None
            rows.append([f"{b2:g}", f"best: {chosen:g}" + (f" ({rim})" if rim else ""), ""])
    table = format_table(
        ["b2", "rate", f"bits/byte, seeds {', '.join(map(str, seeds))}"], rows, markdown=True
    )
    if missing:
        wanted = len(AVERAGES) * len(rates) * len(seeds)
        return f"{table}\n\n{missing} of {wanted} runs are missing: no verdict."
    found = paired_differences(best)
    (first, second), each = next(iter(found.items()))
    words = "counts" if each.counts else "direction only"
    return (
        f"{table}\n\n{first} minus {second}: {each.value:+.4f} ± {each.standard_error:.4f} "
        f"bits/byte, {words}. {PAIRED_RULE}"
    )


if __name__ == "__main__":
    main()
