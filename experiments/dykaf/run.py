"""Runs the DyKAF comparison and writes results/*.json; see README.md for claim and protocol.

python experiments/dykaf/run.py --scale gpu
python experiments/dykaf/report.py --scale gpu
"""

import argparse
import json
import os
import pathlib
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from methods import CLIP, METHODS, Method

from jaxopt_lab import data, models
from jaxopt_lab.schedules import warmup_cosine
from jaxopt_lab.sweep import StepCost, Task, Tuned, measure_step, tune

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
SWEEP_SEED, FINAL_SEEDS = 0, (1, 2, 3)


@dataclass(frozen=True)
class Scale:
    """Size of one run."""

    roots: tuple[str, ...]
    vocab_size: int
    width: int
    depth: int
    heads: int
    context: int
    batch_size: int
    steps: int
    warmup: int
    evaluate_every: int
    validation_batches: int
    compute_dtype: str
    cells: int  # the middle ones of each grid

    def model(self) -> models.DecoderConfig:
        """The decoder of this scale, LLaMA style with a tied head."""
        return models.DecoderConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            context=self.context,
            compute_dtype=self.compute_dtype,
        )


SCALES = {
    "gpu": Scale(("site-packages",), 8192, 384, 6, 6, 256, 32, 800, 80, 50, 8, "bfloat16", 6),
    # A trial of the machinery; it decides nothing.
    "cpu": Scale(("stdlib",), 1024, 32, 1, 2, 32, 4, 24, 4, 12, 2, "float32", 3),
}


def main() -> None:
    args = _arguments()
    # For the trial on a CPU of few cores; CHANGELOG.md, known limits.
    os.environ.setdefault("PJRT_NPROC", "16")
    scale = SCALES[args.scale]
    if args.steps:
        steps = args.steps
        scale = replace(scale, steps=steps, warmup=max(1, steps // 10))
        scale = replace(scale, evaluate_every=min(scale.evaluate_every, steps))
    seeds = (SWEEP_SEED, *FINAL_SEEDS)
    tokens = data.Windows.read(args.tokens) if args.tokens else _draw(scale, seeds)
    if args.save_tokens:
        tokens.save(args.save_tokens)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    task = make_task(scale, tokens)
    started = time.perf_counter()
    for method in METHODS:
        path = args.out / f"{args.scale}-{method.slug}.json"
        if method.name not in args.methods or path.exists():
            continue
        rates, adam_rate = method.rates, None
        if method.rule is not None:
            adam_rate = _tuned_rate(args.out / f"{args.scale}-{METHODS[0].slug}.json")
        first = (len(rates) - scale.cells) // 2
        rates = rates[first : first + scale.cells]
        cost, tuned = run(scale, task, method, rates, adam_rate, args.lanes)
        path.write_text(
            json.dumps(
                {
                    "name": method.name,
                    "adam_rate": adam_rate,
                    **tuned.to_json(),
                    "cost": asdict(cost),
                    "scale": asdict(scale),
                    "parameters": models.parameter_count(scale.model()),
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    "corpus": tokens.corpus_hash,
                    "bytes_per_token": tokens.bytes_per_token,
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


def make_task(scale: Scale, tokens: data.Windows) -> Task:
    """What all runs share."""
    config = scale.model()
    return Task(
        init_params=lambda key: models.init_params(config, key),
        loss=lambda params, batch: models.loss(config, params, batch),
        batches=tokens.batches,
        held_out=tokens.held_out(),
        steps=scale.steps,
        evaluate_every=scale.evaluate_every,
        tokens_per_step=scale.batch_size * scale.context,
        clip=CLIP,
    )


def run(
    scale: Scale,
    task: Task,
    method: Method,
    rates: tuple[float, ...],
    adam_rate: float | None,
    lanes: int,
) -> tuple[StepCost, Tuned]:
    """Times one run alone, then trains all cells and the best one's seeds."""
    schedule = warmup_cosine(1.0, scale.steps, scale.warmup)
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


def _draw(scale: Scale, seeds: tuple[int, ...]) -> data.Windows:
    tokenizer = data.TokenizerConfig("bpe", scale.vocab_size)
    corpus = data.prepare(data.PythonSource(scale.roots), tokenizer, on_progress=print)
    return data.draw_windows(
        corpus, seeds=seeds, steps=scale.steps, batch_size=scale.batch_size,
        context=scale.context, max_batches=scale.validation_batches,
    )  # fmt: skip


def _tuned_rate(path: pathlib.Path) -> float:
    """AdamW's best rate, which drives the leaves that are not matrices."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: AdamW is tuned first")
    return json.loads(path.read_text())["best_rate"]


if __name__ == "__main__":
    main()
