"""LoRSum on a linear map; README.md has claim and protocol.

python experiments/lorsum/synthetic/run.py && python experiments/lorsum/synthetic/report.py
"""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import jaxopt_lab as jol
from jaxopt_lab.lora import LowRankSum, Tap
from jaxopt_lab.optim import AdamW
from jaxopt_lab.report.files import write_result

RESULTS = pathlib.Path(__file__).parent / "results"
INPUTS, OUTPUTS, RANK, BATCH, EPOCHS = 200, 600, 8, 64, 100
SEEDS = tuple(range(10))
RHO, MOMENTUM = 1e-3, 0.75

Optimizer = Callable[[], Any]


class Task(NamedTuple):
    """One seed."""

    target: Array  # (INPUTS, OUTPUTS)
    start: dict[str, Array]
    best: Array  # the loss of the best map of rank 8
    key: Array


def lorsum(rate: float, sweeps: int, momentum: float | None, rank: float = 1.0) -> Any:
    """LoRSum with the constants of the task."""
    projection = LowRankSum(sweeps=sweeps, momentum_rank=rank)
    return jol.lora.lorsum(rate, rho=RHO, momentum=momentum, projection=projection)


def preconditioned_adamw(rate: float) -> Any:
    """AdamW on preconditioned gradients."""
    options = AdamW(weight_decay=1e-4)
    return jol.lora.preconditioned(rate, rho=RHO, momentum=None, fallback=options)


def methods(setting: str) -> dict[str, Any]:
    """Every optimizer of factors by name; SVDLoRA is a rate."""
    if setting == "full":
        made = {
            "SVDLoRA": 0.5,
            "LoRA SGD": optax.sgd(0.01),
            "LoRA AdamW": optax.adamw(0.5, weight_decay=1e-4),
            "preconditioned SGD": jol.lora.preconditioned(0.48, rho=RHO, momentum=0.0),
            "preconditioned AdamW": preconditioned_adamw(0.5),
        }
        return made | {f"LoRSum x{k}": lorsum(0.5, k, None) for k in (1, 2, 8, 32)}
    made = {
        "SVDLoRA": 0.1,
        "LoRA SGD": optax.sgd(0.002, momentum=MOMENTUM),
        "LoRA AdamW": optax.adamw(0.05, weight_decay=1e-4),
        "preconditioned SGD": jol.lora.preconditioned(0.1, rho=RHO, momentum=MOMENTUM),
        "preconditioned AdamW": preconditioned_adamw(0.05),
    }
    made |= {f"LoRSum x{k}": lorsum(0.1, k, MOMENTUM) for k in (1, 2, 8)}
    for k in (1, 2, 8):
        projection = LowRankSum(sweeps=k)
        made[f"projected x{k}"] = jol.lora.projected_lorsum(
            0.1, rho=RHO, momentum=MOMENTUM, projection=projection
        )
    for k in (1, 8):
        for rank in (2, 4):
            made[f"LoRSum x{k}, momentum {rank}r"] = lorsum(0.1, k, MOMENTUM, rank)
    return made


def main() -> None:
    """Runs the methods that have no result yet."""
    # Decompositions side by side can block a CPU of few cores; CHANGELOG.md, known limits.
    os.environ.setdefault("PJRT_NPROC", "16")
    # Products this small are slower, by 25 times on two shared cores, when threads divide them.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    jax.config.update("jax_enable_x64", True)
    RESULTS.mkdir(exist_ok=True)
    for setting in ("full", "mini"):
        # The one with a decomposition in every step comes last.
        for name, method in sorted(methods(setting).items(), key=lambda x: x[0] == "SVDLoRA"):
            path = RESULTS / f"{setting}-{name.replace(' ', '-').replace(',', '')}.json"
            if path.exists():
                continue
            started = time.process_time()
            one = svd_run if name == "SVDLoRA" else run
            found = jax.jit(lambda seed, m=method, o=one, s=setting: o(s, m, seed))
            excess = np.stack([found(jnp.asarray(seed)) for seed in SEEDS])
            write(path, {"name": name, "excess": excess.tolist()}, started)
    path = RESULTS / "power-iteration.json"
    if not path.exists():
        started = time.process_time()
        found = [jax.jit(power_iteration)(jnp.asarray(seed)) for seed in SEEDS]
        excess, gap = zip(*found, strict=True)
        result = {"excess": np.stack(excess).tolist(), "gap": np.stack(gap).tolist()}
        write(path, {"name": "block power iteration", **result}, started)


def write(path: pathlib.Path, result: dict[str, Any], started: float) -> None:
    """One file of results, numbers with six digits."""
    result |= {"seeds": SEEDS, "cpu_seconds": round(time.process_time() - started, 1)}
    write_result(path, result)
    print(f"{path.stem}: {result['cpu_seconds']} s of CPU", flush=True)


def task(seed: Array) -> Task:
    """Everything that a seed draws."""
    of_target, of_start, key = jax.random.split(jax.random.key(seed), 3)
    target = jax.random.normal(of_target, (INPUTS, OUTPUTS))
    bound = INPUTS**-0.5
    start = jax.random.uniform(of_start, (INPUTS, OUTPUTS), minval=-bound, maxval=bound)
    u, s, vt = jnp.linalg.svd(start, full_matrices=False)
    root = jnp.sqrt(s[:RANK])
    pair = {"a": u[:, :RANK] * root, "b": root[:, None] * vt[:RANK]}
    values = jnp.linalg.svd(target, compute_uv=False)
    return Task(target, pair, jnp.sum(jnp.square(values[RANK:])), key)


def batches(setting: str, key: Array) -> Array:
    """Numbers of the rows of every step, (epochs, steps, rows); INPUTS: none."""
    if setting == "full":
        return jnp.broadcast_to(jnp.arange(INPUTS), (EPOCHS, 1, INPUTS))
    steps = -(-INPUTS // BATCH)
    room = (0, steps * BATCH - INPUTS)

    def epoch(key: Array) -> Array:
        order = jax.random.permutation(key, INPUTS)
        return jnp.pad(order, room, constant_values=INPUTS).reshape(steps, BATCH)

    return jax.vmap(epoch)(jax.random.split(key, EPOCHS))


def taken(matrix: Array, rows: Array) -> Array:
    """Rows of a matrix with a row of zeros behind it: its product with the inputs of a batch."""
    return jnp.pad(matrix, ((0, 1), (0, 0)))[rows]


def run(setting: str, tx: Any, seed: Array) -> Array:
    """Excess loss after every epoch, that before the first one in front."""
    this = task(seed)

    def step(carry: Any, rows: Array) -> tuple[Any, None]:
        pair, state = carry
        x = taken(jnp.eye(INPUTS), rows)
        s = 2 * (x @ pair["a"] @ pair["b"] - taken(this.target, rows))
        grads = {"a": x.T @ (s @ pair["b"].T), "b": (x @ pair["a"]).T @ s}
        wrap = lambda leaf: {"map": leaf}  # noqa: E731
        updates, state = optax.with_extra_args_support(tx).update(
            wrap(grads), state, wrap(pair), taps=wrap(Tap(x, s))
        )
        return (optax.apply_updates(wrap(pair), updates)["map"], state), None

    def excess(pair: dict[str, Array]) -> Array:
        return jnp.sum(jnp.square(pair["a"] @ pair["b"] - this.target)) - this.best

    def epoch(carry: Any, xs: Array) -> tuple[Any, Array]:
        carry = jax.lax.scan(step, carry, xs)[0]
        return carry, excess(carry[0])

    carry = (this.start, tx.init({"map": this.start}))
    losses = jax.lax.scan(epoch, carry, batches(setting, this.key))[1]
    return jnp.concatenate([excess(this.start)[None], losses])


def svd_run(setting: str, rate: float, seed: Array) -> Array:
    """Descent on the dense map, cut to rank 8 after every step."""
    this = task(seed)
    momentum = 0.0 if setting == "full" else MOMENTUM

    def step(carry: tuple[Array, Array], rows: Array) -> tuple[tuple[Array, Array], None]:
        dense, trace = carry
        used = jnp.zeros((INPUTS + 1, 1)).at[rows].set(1.0)[:INPUTS]
        trace = momentum * trace + 2 * used * (dense - this.target)
        dense = dense - rate * trace
        u = jnp.linalg.eigh(dense @ dense.T)[1][:, -RANK:]
        return (u @ (u.T @ dense), trace), None

    def excess(dense: Array) -> Array:
        return jnp.sum(jnp.square(dense - this.target)) - this.best

    def epoch(carry: Any, xs: Array) -> tuple[Any, Array]:
        carry = jax.lax.scan(step, carry, xs)[0]
        return carry, excess(carry[0])

    dense = this.start["a"] @ this.start["b"]
    carry = (dense, jnp.zeros_like(dense))
    losses = jax.lax.scan(epoch, carry, batches(setting, this.key))[1]
    return jnp.concatenate([excess(dense)[None], losses])


def power_iteration(seed: Array) -> tuple[Array, Array]:
    """Excess loss after 1, 2, ... steps on W*, and the gap of its singular values."""
    this = task(seed)
    w = this.target

    def step(rows: Array, _: None) -> tuple[Array, Array]:
        columns = jnp.linalg.qr(w @ rows)[0]
        found = columns.T @ w  # the best with these columns
        excess = jnp.sum(jnp.square(w)) - jnp.sum(jnp.square(found)) - this.best
        return jnp.linalg.qr(found.T)[0], excess

    rows = jnp.linalg.qr(this.start["b"].T)[0]
    values = jnp.linalg.svd(w, compute_uv=False)
    gap = values[RANK] / values[RANK - 1]
    return jax.lax.scan(step, rows, None, length=32 * EPOCHS)[1], gap


if __name__ == "__main__":
    main()
