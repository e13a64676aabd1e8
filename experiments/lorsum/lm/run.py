"""Fine-tunes SmolLM2 on addresses by every method; README.md has claim and protocol.

python experiments/lorsum/lm/run.py --scale gpu && python experiments/lorsum/lm/report.py
"""

import argparse
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab as jol
from jaxopt_lab import data, models
from jaxopt_lab.data.gguf_tokenizer import gguf_tokenizer
from jaxopt_lab.report.files import write_result
from jaxopt_lab.step import Adapted, Step, TrainState, merged
from jaxopt_lab.tasks import language_model_loss

HERE = pathlib.Path(__file__).parent
CONTEXT, TEST, VALIDATION = 512, 23, 12
CLIP, SCALE, RANK = 1.0, 2.0, 8
TUNING_SEED, SEEDS = 0, (1, 2, 3)


class Scale(NamedTuple):
    """Lengths of a run."""

    steps: int
    evaluations: int
    batch: int
    held_out: int | None  # at most so many windows of a part
    rates: slice
    compute: Any
    length: int = CONTEXT  # tokens of a window


SCALES = {
    "gpu": Scale(300, 6, 16, None, slice(0, 5), "bfloat16"),
    # A trial of the machinery; it decides nothing.
    "cpu": Scale(4, 2, 1, 1, slice(2, 3), "float32", 32),
}


class Method(NamedTuple):
    """(rate as a schedule) -> optimizer, and five peak rates."""

    build: Callable[[optax.Schedule], Any]
    rates: tuple[float, ...]
    adapters: bool = True
    taps: bool = False


ADAPTER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
METHODS = {
    "LoRA": Method(functools.partial(optax.adamw, weight_decay=0.0), ADAPTER_RATES),
    "RPLoRA": Method(jol.lora.preconditioned, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "scaled LoRSum": Method(
        functools.partial(jol.lora.scaled_lorsum, clip=CLIP), (0.03, 0.1, 0.3, 1.0, 3.0), taps=True
    ),
    "full": Method(
        functools.partial(optax.adamw, weight_decay=0.0), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), False
    ),
}


def main() -> None:
    """Tunes and runs the methods that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--model", type=pathlib.Path, help="the GGUF file; default: fetched")
    parser.add_argument("--tokens", type=pathlib.Path, help="a file that --save-tokens wrote")
    parser.add_argument("--save-tokens", type=pathlib.Path, help="write the windows, and stop")
    parser.add_argument("--out", type=pathlib.Path, help="default: results, of a trial trial")
    args = parser.parse_args()
    # Decompositions side by side can block a CPU of few cores; CHANGELOG.md, known limits.
    os.environ.setdefault("PJRT_NPROC", "16")
    scale = SCALES[args.scale]
    file = args.model or next(data.find("smollm2").glob("*.gguf"))
    windows = dict(np.load(args.tokens)) if args.tokens else tokenized(file)
    if args.save_tokens:
        np.savez_compressed(args.save_tokens, **windows)
        return
    windows = {part: rows[:, : scale.length + 1] for part, rows in windows.items()}
    out = args.out or HERE / ("results" if args.scale == "gpu" else "trial")
    out.mkdir(parents=True, exist_ok=True)
    config, params = models.load_gguf(file)
    config = replace(config, compute_dtype=scale.compute, context=CONTEXT, loop="scanned")
    missing = sum(
        not file_of(out, name, cell).exists()
        for name in args.methods
        for cell in (*rates_of(scale, name), *(f"seed-{seed}" for seed in SEEDS))
    )
    print(f"{missing} runs of {scale.steps} steps are missing, one at a time", flush=True)
    for name in args.methods:
        train(scale, config, params, windows, name, out)


def tokenized(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Windows of CONTEXT + 1 tokens, uint16, of the three parts by year."""
    tokenizer = gguf_tokenizer(file)
    paths = sorted(data.find("addresses").glob("*.txt"))
    years = {"train": paths[: -TEST - VALIDATION]}
    years |= {"validation": paths[-TEST - VALIDATION : -TEST], "test": paths[-TEST:]}
    parts = {}
    for part, files in years.items():
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
        ids = [np.append(each, tokenizer.end_of_text) for each in tokenizer.encode_batch(texts)]
        flat = np.concatenate(ids)
        count = (len(flat) - 1) // CONTEXT
        starts = np.arange(count)[:, None] * CONTEXT
        parts[part] = flat[starts + np.arange(CONTEXT + 1)].astype(np.uint16)
    return parts


def file_of(out: pathlib.Path, name: str, cell: str) -> pathlib.Path:
    """Where the result of a run is."""
    return out / f"{name.replace(' ', '-').lower()}-{cell}.json"


def rates_of(scale: Scale, name: str) -> dict[str, float]:
    """The runs that tune a method, with their rates."""
    return {f"rate-{rate:g}": rate for rate in METHODS[name].rates[scale.rates]}


def train(
    scale: Scale,
    config: models.DecoderConfig,
    params: Any,
    windows: dict[str, np.ndarray],
    name: str,
    out: pathlib.Path,
) -> None:
    """Five rates on one seed, then three seeds at the best."""
    compiled: dict[str, Any] = {}

    def run(cell: str, rate: float, seed: int, tested: bool) -> dict[str, Any]:
        path = file_of(out, name, cell)
        if not path.exists():
            if not compiled:
                compiled.update(programs(scale, config, params, METHODS[name]))
            result = {"method": name, "rate": rate, "seed": seed, "steps": scale.steps}
            result |= one_run(scale, windows, compiled, rate, seed, tested)
            result |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            write_result(path, result)
            best = min(result["validation"])
            print(f"{name}, {cell}: {best:.4f}, {sum(result['seconds']):.1f} s", flush=True)
        return json.loads(path.read_text())

    found = [run(cell, rate, TUNING_SEED, False) for cell, rate in rates_of(scale, name).items()]
    best = min(found, key=lambda result: min(numbers(result["validation"])))["rate"]
    for seed in SEEDS:
        run(f"seed-{seed}", best, seed, True)


def programs(
    scale: Scale, config: models.DecoderConfig, params: Any, method: Method
) -> dict[str, Any]:
    """Jitted functions: the first state, a stretch of steps, a held-out loss."""
    of_model = language_model_loss(config)
    spec = None
    if method.adapters:
        wanted = jol.lora.LoraConfig(rank=RANK, alpha=SCALE * RANK)
        axes, names = models.matrix_axes(config), models.matrix_names(config)
        spec = jol.lora.resolve(wanted, params, axes, names)
        params = jax.tree.map(lambda x: jnp.asarray(x, scale.compute), params)

    loss = of_model if spec is None else jol.lora.loss_beside(of_model, spec)

    def step_of(rate: Any) -> Step:
        tx = method.build(lambda count: rate * (1 - count / scale.steps))
        options: dict[str, Any] = {"clip": CLIP}
        if method.taps:  # which clips by the norm of the kernels' gradients
            assert spec is not None
            options = {"gradient": jol.lora.with_taps(spec)}
        return Step(loss, tx, guarded=False, **options)

    # The frozen part is an argument, not a constant of the programs.
    def first(rate: Any, base: Any, seed: Any) -> TrainState:
        key = jax.random.key(seed)
        if spec is None:
            return step_of(rate).start(base, key)
        beside = jol.lora.init(jax.random.fold_in(key, 2), spec, base)
        return step_of(rate).start(Adapted(base, beside), key)._replace(frozen=())

    def whole(state: TrainState, base: Any) -> TrainState:
        return state._replace(frozen=() if spec is None else Adapted(base, ()))

    def stretch(rate: Any, base: Any, state: TrainState, tokens: Any) -> Any:
        def advance(state: TrainState, rows: Any) -> Any:
            taken, metrics = step_of(rate).take(whole(state, base), {"tokens": rows})
            return taken._replace(frozen=()), metrics["loss"]

        return jax.lax.scan(advance, state, tokens)

    def held_out(base: Any, state: TrainState, tokens: Any) -> Any:
        full = merged(state.params, whole(state, base).frozen)
        one = lambda rows: loss(full, {"tokens": rows[None]}, None)[0]  # noqa: E731
        return jax.lax.map(one, tokens, batch_size=min(16, len(tokens))).mean()

    base = jax.device_put(params)
    frozen = base if spec is not None else None
    jitted = jax.jit(stretch, donate_argnums=2)
    return {
        "warm": False,
        "first": functools.partial(_first, jax.jit(first), base),
        "stretch": lambda rate, state, tokens: jitted(rate, frozen, state, tokens),
        "held_out": functools.partial(jax.jit(held_out), frozen),
    }


def _first(first: Any, base: Any, rate: Any, seed: int) -> Any:
    # What would be donated must not be the base itself.
    return jax.tree.map(jnp.copy, first(rate, base, seed))


def one_run(
    scale: Scale,
    windows: dict[str, np.ndarray],
    compiled: dict[str, Any],
    rate: float,
    seed: int,
    tested: bool,
) -> dict[str, Any]:
    """Losses at every evaluation and the seconds of every stretch; the test part if it may be."""
    rows = windows["train"]
    draw = np.random.default_rng([14, seed])
    wanted = scale.steps * scale.batch
    epochs = [draw.permutation(len(rows)) for _ in range(-(-wanted // len(rows)))]
    order = np.concatenate(epochs)[:wanted].reshape(scale.evaluations, -1, scale.batch)
    parts = ("validation", "test") if tested else ("validation",)
    held_out = {part: jnp.asarray(windows[part][: scale.held_out], jnp.int32) for part in parts}
    peak = jnp.float32(rate)
    state = compiled["first"](peak, seed)
    result: dict[str, list[float]] = {name: [] for name in ("train", "seconds", *parts)}
    for part, tokens in held_out.items():
        result[f"{part}_before"] = [float(compiled["held_out"](state, tokens))]
    for numbers_of_rows in order:
        tokens = jax.block_until_ready(jnp.asarray(rows[numbers_of_rows], jnp.int32))
        if not compiled["warm"]:
            warm = jax.tree.map(jnp.copy, state)
            jax.block_until_ready(compiled["stretch"](peak, warm, tokens))
            compiled["warm"] = True
        before = time.perf_counter()
        state, losses = jax.block_until_ready(compiled["stretch"](peak, state, tokens))
        result["seconds"].append(time.perf_counter() - before)
        result["train"].append(float(losses.mean()))
        for part, tokens in held_out.items():
            result[part].append(float(compiled["held_out"](state, tokens)))
    return result


def numbers(values: list[float | None]) -> list[float]:
    """Infinity for a loss that was not finite."""
    return [np.inf if value is None else value for value in values]


if __name__ == "__main__":
    main()
