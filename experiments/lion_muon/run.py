"""Runs the LionMuon comparison and writes results/*.json; see README.md for claim and protocol.

python experiments/lion_muon/run.py --scale gpu
python experiments/lion_muon/report.py --scale gpu
"""

import argparse
import json
import pathlib
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from methods import METHODS, Method, optimizer_flops

from jaxopt_lab import data, models, optim
from jaxopt_lab.step import Step
from jaxopt_lab.sweep.decoder_runs import DecoderRuns
from jaxopt_lab.tasks import language_model_loss

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
SWEEP_SEED, FINAL_SEEDS = 0, (1, 2, 3)


SCALES = {
    "gpu": DecoderRuns(("site-packages",), 8192, 384, 6, 6, 256, 32, 800, 50, 8, "bfloat16"),
    "cpu": DecoderRuns(("stdlib",), 1024, 64, 2, 2, 64, 8, 240, 24, 8, "float32"),
}


def make_run(scale: DecoderRuns, method: Method, held_out: dict[str, jax.Array], count: int):
    """One whole training run as a pure function, so that cells and seeds can be vmapped.

    The optimizer state is made inside: its step counter then stays unbatched, and a step that is
    not spectral skips Newton-Schulz for all cells at once. `count` is the number of documents.
    """
    config = scale.model()
    schedule = optax.warmup_cosine_decay_schedule(0.01, 1.0, scale.warmup, scale.steps)
    loss = language_model_loss(config)

    def run(spectral_rate, sign_rate, adam_rate, seed, windows):
        key = jax.random.key(seed)
        axes = models.matrix_axes(config)
        tx = method.build(schedule, spectral_rate, sign_rate, adam_rate, axes)
        step = Step(loss, tx, guarded=False)

        def take(state, tokens):
            state, metrics = step.take(state, {"tokens": tokens.astype(jnp.int32)})
            return state, metrics["loss"]

        def evaluate(params):
            def one(batch):
                mean, _, metrics = loss(params, batch, key)
                documents = batch["documents"].ravel()
                return mean, jax.ops.segment_sum(metrics["nats"].ravel(), documents, count)

            means, nats = jax.lax.map(one, held_out)
            return means.mean(), nats.sum(0)

        def chunk(state, tokens):
            state, values = jax.lax.scan(take, state, tokens)
            return state, (values, evaluate(state.params))

        state = step.start(models.init_params(config, key), key)
        chunks = windows.reshape(-1, scale.evaluate_every, *windows.shape[1:])
        _, (train, (losses, by_document)) = jax.lax.scan(chunk, state, chunks)
        return train.reshape(-1), losses, by_document[-1]

    return run


def sweep(
    scale: DecoderRuns, method: Method, adam_rates: list[float], tokens: data.Windows
) -> dict[str, Any]:
    """All cells on the sweep's seed as one program, then the best cell on the final seeds."""
    targets = np.bincount(tokens.documents.ravel())
    run = make_run(scale, method, jax.tree.map(jnp.asarray, tokens.held_out()), len(targets))
    cells = jnp.asarray(method.cells, jnp.float32)
    adam = jnp.asarray(adam_rates, jnp.float32)
    started = time.perf_counter()
    over_cells = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None, None)))
    _, held_out, _ = jax.device_get(
        over_cells(cells[:, 0], cells[:, 1], adam, SWEEP_SEED, tokens.train[SWEEP_SEED])
    )
    finals = np.where(np.isfinite(held_out[:, -1]), held_out[:, -1], np.inf)
    best = int(finals.argmin())
    over_seeds = jax.jit(jax.vmap(run, in_axes=(None, None, None, 0, 0)))
    windows = np.stack([tokens.train[seed] for seed in FINAL_SEEDS])
    seeds = jnp.asarray(FINAL_SEEDS)
    train, curves, nats = jax.device_get(over_seeds(*cells[best], adam[best], seeds, windows))
    return {
        "name": method.name,
        "period": str(method.period),
        "cells": [list(cell) for cell in method.cells],
        "adam_rates": adam_rates,
        "sweep_final": [float(x) for x in held_out[:, -1]],
        "best_cell": best,
        "seeds": list(FINAL_SEEDS),
        "held_out": curves.tolist(),
        "held_out_se": data.standard_error(nats.astype(np.float64), targets).tolist(),
        "train_last_100": train[:, -100:].mean(axis=1).tolist(),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="*", default=[m.name for m in METHODS])
    parser.add_argument("--steps", type=int, help="shorten the runs, for a trial")
    parser.add_argument("--tokens", type=pathlib.Path, help="windows written by --save-tokens")
    parser.add_argument("--save-tokens", type=pathlib.Path, help="write the windows and stop")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    scale = SCALES[args.scale].shortened(args.steps)
    tokens = scale.windows((SWEEP_SEED, *FINAL_SEEDS), args.tokens)
    if args.save_tokens:
        tokens.save(args.save_tokens)
        return
    trimmed = {seed: windows[: scale.steps] for seed, windows in tokens.train.items()}
    tokens = replace(tokens, train=trimmed)

    config = scale.model()
    routes = optim.route(models.abstract_params(config), models.matrix_axes(config))
    leaves = jax.tree.leaves(models.abstract_params(config))
    matrices = [r.axes.matrix_shape(x.shape) for r, x in zip(routes, leaves, strict=True) if r.axes]
    args.out.mkdir(parents=True, exist_ok=True)
    adamw_file = args.out / f"{args.scale}-adamw.json"
    for method in METHODS:
        out = (
            args.out / f"{args.scale}-{method.name.lower().replace(' ', '-').replace('=', '')}.json"
        )
        if method.name not in args.methods or out.exists():
            continue
        if method.name == "AdamW":
            adam_rates = [cell[0] for cell in method.cells]
        else:
            tuned = json.loads(adamw_file.read_text())
            adam_rates = [tuned["cells"][tuned["best_cell"]][0]] * len(method.cells)
        result = sweep(scale, method, adam_rates, tokens) | {
            **scale.conditions(tokens),
            "model_flops_per_step": models.flops_per_token(config)
            * scale.batch_size
            * scale.context,
            "optimizer_flops_per_step": optimizer_flops(
                method, matrices, models.parameter_count(config)
            ),
        }
        out.write_text(json.dumps(result, indent=1))
        final = np.mean([curve[-1] for curve in result["held_out"]])
        cell = result["cells"][result["best_cell"]]
        print(f"{method.name:14} {final:.4f} nats/token at {cell}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
