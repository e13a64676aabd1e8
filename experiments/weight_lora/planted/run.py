"""Runs the planted-kernels experiment and writes results.json; README.md has claim and protocol.

python experiments/weight_lora/planted/run.py && python experiments/weight_lora/planted/report.py
"""

import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.report.files import write_result

HERE = pathlib.Path(__file__).parent
KERNELS, PLANTED, WIDTH, RANK = 16, 4, 16, 2
STEPS, FREEZE, BATCH, HELD_OUT, RECORDS = 400, 200, 64, 512, 40
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEED, FINAL_SEEDS = 0, tuple(range(1, 11))


class Method(NamedTuple):
    """LoRA on some kernels, whose weights move or not."""

    kernels: str  # all, or a field of the task
    keep: float = KERNELS
    weight_rate: float = 0.0  # without one the weights stay: LoRA where they are one
    every: float = 1


METHODS = {
    "WeightLoRA": Method("all", PLANTED, 5.0),
    "WeightLoRA, every 100": Method("all", PLANTED, 5.0, 100),
    "4 random": Method("random"),
    "the 4 planted": Method("planted"),
    "all 16": Method("all"),
}
AXES = {"kernel": MuonDimensionNumbers(1, 2)}
CONFIG = jol.lora.LoraConfig(rank=RANK, alpha=RANK, weights=True)


class Task(NamedTuple):
    """A base, a teacher, and which of its kernels differ."""

    base: dict[str, jax.Array]
    teacher: dict[str, jax.Array]
    planted: jax.Array  # (kernels,) bool
    random: jax.Array  # (kernels,) bool: the choice of the control
    key: jax.Array


def main() -> None:
    """Tunes every method on one seed, then runs it on the others."""
    started = time.process_time()
    names = tuple(METHODS)
    # One program for all methods: what they differ in is numbers.
    program = jax.jit(jax.vmap(train))
    cells = [(name, rate, TUNING_SEED) for name in names for rate in RATES]
    tuning = program(*lanes(cells))["loss"][:, -1].reshape(len(names), -1)
    best = np.nanargmin(tuning, axis=1)
    cells = [
        (name, RATES[b], seed) for name, b in zip(names, best, strict=True) for seed in FINAL_SEEDS
    ]
    found = program(*lanes(cells))
    methods = {}
    for i, name in enumerate(names):
        rows = slice(i * len(FINAL_SEEDS), (i + 1) * len(FINAL_SEEDS))
        runs = {key: value[rows] for key, value in found.items()}
        methods[name] = {"rate": RATES[best[i]], "tuning": tuning[i], **runs}
    steps = (np.arange(RECORDS) + 1) * (STEPS // RECORDS)
    result = {"seeds": FINAL_SEEDS, "rates": RATES, "steps": steps, "methods": methods}
    result["cpu_seconds"] = time.process_time() - started
    write_result(HERE / "results.json", result)
    print(f"{result['cpu_seconds']:.0f} s of CPU")


def lanes(cells: list[tuple[str, float, int]]) -> tuple[Any, ...]:
    """Arrays for `train`, one entry a run."""
    methods = [METHODS[name] for name, _, _ in cells]
    kernels = [("all", "random", "planted").index(method.kernels) for method in methods]
    numbers = [[float(number) for number in method[1:]] for method in methods]
    return (
        jnp.asarray(kernels),
        jnp.asarray(numbers),
        jnp.asarray([rate for _, rate, _ in cells]),
        jnp.asarray([seed for _, _, seed in cells]),
    )


def task(seed: jax.Array) -> Task:
    """Everything but the batches is drawn from the seed, the same for every method."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(14), seed), 6)
    kernels = jax.random.normal(keys[0], (KERNELS, WIDTH, WIDTH)) / jnp.sqrt(WIDTH)
    left = jax.random.normal(keys[1], (KERNELS, WIDTH, RANK))
    product = left @ jax.random.normal(keys[2], (KERNELS, RANK, WIDTH))
    norms = jnp.linalg.norm(kernels, axis=(1, 2)) / jnp.linalg.norm(product, axis=(1, 2))
    first = jnp.arange(KERNELS) < PLANTED
    planted, random = (jax.random.permutation(key, first) for key in keys[3:5])
    increments = (0.5 * norms * planted)[:, None, None] * product
    return Task({"kernel": kernels}, {"kernel": kernels + increments}, planted, random, keys[5])


def outputs(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Sixteen residual layers of one kernel each."""
    return jax.lax.scan(lambda h, w: (h + 0.5 * jnp.tanh(h @ w), None), x, params["kernel"])[0]


def train(
    kernels: jax.Array, numbers: jax.Array, rate: jax.Array, seed: jax.Array
) -> dict[str, jax.Array]:
    """Held-out loss over steps, as a part of the base's, and the weights at the end."""
    this = task(seed)
    spec = jol.lora.resolve(CONFIG, this.base, AXES)
    of_init, of_data, of_test = jax.random.split(this.key, 3)
    adapters = jol.lora.init(of_init, spec, this.base)
    choices = jnp.stack([jnp.ones(KERNELS, bool), this.random, this.planted])
    adapters["kernel"]["weight"] = choices[kernels].astype(jnp.float32)
    keep, weight_rate, every = numbers
    tx = jol.lora.weight_lora(
        rate,
        keep=keep,
        weight_learning_rate=weight_rate,
        every=every,
        freeze_after=FREEZE,
    )

    def inputs(key: jax.Array, rows: int) -> jax.Array:
        return jax.random.normal(key, (rows, WIDTH))

    def error(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(outputs(params, x) - outputs(this.teacher, x)))

    held_out = inputs(of_test, HELD_OUT)
    scale = 1 / error(this.base, held_out)

    def loss(adapters: Any, x: jax.Array) -> jax.Array:
        return scale * error(jol.lora.effective(this.base, adapters, spec), x)

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        adapters, state = carry
        x = inputs(jax.random.fold_in(of_data, number), BATCH)
        updates, state = tx.update(jax.grad(loss)(adapters, x), state, adapters)
        return (optax.apply_updates(adapters, updates), state), None

    def record(carry: Any, numbers: jax.Array) -> tuple[Any, jax.Array]:
        carry = jax.lax.scan(step, carry, numbers)[0]
        return carry, loss(carry[0], held_out)

    numbers = jnp.arange(STEPS).reshape(RECORDS, -1)
    (adapters, _), losses = jax.lax.scan(record, (adapters, tx.init(adapters)), numbers)
    return {"loss": losses, "weights": adapters["kernel"]["weight"], "planted": this.planted}


if __name__ == "__main__":
    main()
