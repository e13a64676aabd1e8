"""LeNet-5 on Fashion-MNIST with adapters for linear layers; README.md has claim and protocol.

python experiments/lorsum/vision/run.py --scale gpu && python experiments/lorsum/vision/report.py
"""

import argparse
import functools
import gzip
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import jaxopt_lab as jol
from jaxopt_lab import data
from jaxopt_lab.lora import LowRankSum, Tap
from jaxopt_lab.optim import AdamW
from jaxopt_lab.report.files import write_result
from jaxopt_lab.step import Estimate, Step, TrainState

HERE = pathlib.Path(__file__).parent
BATCH, RANK, LANES, VALIDATION, EVALUATED = 64, 8, 5, 5000, 1000
LAYERS = {"first": (400, 120), "second": (120, 84), "third": (84, 10)}
RHO, MOMENTUM, REST = 1e-3, 0.9, AdamW(learning_rate=1e-3)
TUNING_SEED, SEEDS = 0, (1, 2, 3, 4, 5)


class Scale(NamedTuple):
    """Lengths of a run."""

    epochs: int
    images: int  # for training
    tested: int  # at most so many images of a held-out part


SCALES = {
    "gpu": Scale(10, 55_000, 10_000),
    # A trial of the machinery; it decides nothing.
    "cpu": Scale(1, 640, 1000),
}


class Method(NamedTuple):
    """(rate) -> optimizer of the linear layers, whole or as adapters, and five rates."""

    build: Callable[[Any], Any]
    rates: tuple[float, ...]
    kind: str = "adapters"  # adapters, taps: with taps of the layers, or dense


def _lorsum(sweeps: int) -> Callable[[Any], Any]:
    options = {"rho": RHO, "momentum": MOMENTUM, "fallback": REST}
    projection = LowRankSum(sweeps=sweeps)
    return lambda rate: jol.lora.lorsum(rate, projection=projection, **options)


def _projected(rate: Any) -> Any:
    return _apart(jol.lora.projected_lorsum(rate, rho=RHO, momentum=MOMENTUM))


def _apart(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule for the linear kernels, AdamW at 1e-3 for everything else."""

    def group(params: Any) -> Any:
        at = jax.tree_util.tree_map_with_path
        return at(lambda path, _: any("kernel" in str(key) for key in path), params)

    return optax.partition({True: rule, False: optax.adamw(1e-3, weight_decay=0.0)}, group)


SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ADAM_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
METHODS = {
    "full SGD": Method(lambda r: _apart(optax.sgd(r, MOMENTUM)), SGD_RATES, "dense"),
    "full AdamW": Method(lambda r: _apart(optax.adam(r)), ADAM_RATES, "dense"),
    "LoRA SGD": Method(lambda r: _apart(optax.sgd(r, MOMENTUM)), SGD_RATES),
    "LoRA AdamW": Method(lambda r: _apart(optax.adam(r)), ADAM_RATES),
    "preconditioned SGD": Method(
        lambda r: jol.lora.preconditioned(r, rho=RHO, momentum=MOMENTUM, fallback=REST), SGD_RATES
    ),
    "LoRSum x1": Method(_lorsum(1), SGD_RATES, "taps"),
    "LoRSum x2": Method(_lorsum(2), SGD_RATES, "taps"),
    "LoRSum x8": Method(_lorsum(8), SGD_RATES, "taps"),
    "projected x1": Method(_projected, SGD_RATES, "taps"),
}


class Images(NamedTuple):
    """All images, uint8 (n, 28, 28), and labels."""

    train: Any
    train_label: Any
    test: Any
    test_label: Any


def main() -> None:
    """Tunes and runs the methods that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=pathlib.Path, help="directory of the IDX files")
    parser.add_argument("--out", type=pathlib.Path, help="default: results, of a trial trial")
    args = parser.parse_args()
    # Decompositions side by side can block a CPU of few cores; CHANGELOG.md, known limits.
    os.environ.setdefault("PJRT_NPROC", "16")
    scale, images = SCALES[args.scale], read(args.images or data.find("fashion-mnist"))
    out = args.out or HERE / ("results" if args.scale == "gpu" else "trial")
    out.mkdir(parents=True, exist_ok=True)
    known = {name: read_if_there(path_of(out, name)) for name in args.methods}
    missing = sum(("tuning" not in result) + ("test" not in result) for result in known.values())
    steps = scale.epochs * (scale.images // BATCH)
    print(f"{missing} groups of {LANES} runs of {steps} steps are missing", flush=True)
    for name, result in known.items():
        train(scale, name, result, images, path_of(out, name))


def path_of(out: pathlib.Path, name: str) -> pathlib.Path:
    """Where the result of a method is."""
    return out / f"{name.replace(' ', '-').lower()}.json"


def read_if_there(path: pathlib.Path) -> dict[str, Any]:
    """What is known of a method: nothing, its tuning, or everything."""
    return json.loads(path.read_text()) if path.exists() else {}


def train(
    scale: Scale, name: str, result: dict[str, Any], images: Images, path: pathlib.Path
) -> None:
    """The rates on one seed, then the seeds at the best rate; each group is stored."""
    method = METHODS[name]
    compiled = jax.jit(jax.vmap(functools.partial(run, scale, method), in_axes=(0, 0, None)))
    place = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if "tuning" not in result:
        before = time.perf_counter()
        hidden = images._replace(test=images.test * 0, test_label=images.test_label * 0)
        tuning = group(compiled, method.rates, [TUNING_SEED] * LANES, hidden)
        del tuning["test"]
        rate = method.rates[int(np.argmax(np.array(tuning["validation"]).max(1)))]
        result = {"method": name, "rates": method.rates, "rate": rate, "tuning": tuning, **place}
        result["seconds"] = time.perf_counter() - before
        write_result(path, result)
    if "test" not in result:
        before = time.perf_counter()
        final = group(compiled, [result["rate"]] * LANES, list(SEEDS), images)
        result |= {"seeds": SEEDS, **final, **place}
        result["seconds"] += time.perf_counter() - before
        write_result(path, result)
        print(f"{name}: {result['rate']:g}, {final['test']}, {result['seconds']:.0f} s", flush=True)


def group(compiled: Any, rates: Any, seeds: Any, images: Images) -> dict[str, Any]:
    """Runs of one program."""
    found = compiled(jnp.asarray(rates, jnp.float32), jnp.asarray(seeds), images)
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def read(directory: pathlib.Path) -> Images:
    """The four IDX files."""

    def idx(name: str) -> np.ndarray:
        (path,) = directory.glob(f"{name}*.gz")
        raw = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(raw, ">u4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)

    parts = ("train-images", "train-labels", "t10k-images", "t10k-labels")
    return Images(*map(idx, parts))


def start(key: Array, method: Method) -> tuple[Any, Any]:
    """What moves, and the frozen kernels."""
    keys = iter(jax.random.split(key, 16))

    def uniform(shape: tuple[int, ...], inputs: int) -> Array:
        bound = inputs**-0.5
        return jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)

    base = {name: uniform(shape, shape[0]) for name, shape in LAYERS.items()}
    moves: dict[str, Any] = {
        "conv1": {"filter": uniform((5, 5, 1, 6), 25), "bias": uniform((6,), 25)},
        "conv2": {"filter": uniform((5, 5, 6, 16), 150), "bias": uniform((16,), 150)},
    }
    for name, (n, m) in LAYERS.items():
        pair = {"a": uniform((n, RANK), n), "b": jnp.zeros((RANK, m))}
        kernel = base[name] if method.kind == "dense" else pair
        moves[name] = {"kernel": kernel, "bias": uniform((m,), n)}
    return moves, base


def forward(moves: Any, base: Any, images: Array, probes: Any) -> tuple[Array, dict[str, Array]]:
    """Scores of the classes, and the inputs of the linear layers."""
    x = jnp.pad(images.astype(jnp.float32) / 255 - 0.286, ((0, 0), (2, 2), (2, 2)))[..., None]
    x = x / 0.353
    for name in ("conv1", "conv2"):
        x = jax.lax.conv_general_dilated(
            x, moves[name]["filter"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x + moves[name]["bias"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x, inputs = x.reshape(len(x), -1), {}
    for name in LAYERS:
        inputs[name] = x
        kernel = moves[name]["kernel"]
        if isinstance(kernel, dict):
            y = x @ base[name] + (x @ kernel["a"]) @ kernel["b"]
        else:
            y = x @ kernel
        x = y + moves[name]["bias"] + probes[name]
        x = x if name == "third" else jnp.tanh(x)
    return x, inputs


def run(
    scale: Scale, method: Method, rate: Array, seed: Array, images: Images
) -> Mapping[str, Array]:
    """Validation accuracy after every epoch, and test accuracy where that is highest."""
    of_start, of_order = jax.random.split(jax.random.key(seed))
    moves, base = start(of_start, method)
    none = {name: 0.0 for name in LAYERS}

    def loss(both: Any, batch: Any, key: Any) -> Any:
        moves, probes = both
        scores, inputs = forward(moves, base, images.train[batch["rows"]], probes)
        labels = images.train_label[batch["rows"]].astype(jnp.int32)
        nats = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return nats.mean(), jnp.float32(BATCH), inputs

    def tapped(loss: Any, moves: Any, batch: Any, key: Array) -> Estimate:
        """Backprop that also gives the taps of the linear layers."""

        def objective(both: Any) -> Any:
            value, weight, inputs = loss(both, batch, key)
            return value, (weight, inputs)

        probes = {name: jnp.zeros((BATCH, m)) for name, (_, m) in LAYERS.items()}
        (value, (weight, inputs)), (grads, s) = jax.value_and_grad(objective, has_aux=True)(
            (moves, probes)
        )
        taps = {name: {"kernel": Tap(inputs[name], s[name])} for name in LAYERS}
        extra = {"taps": taps} if method.kind == "taps" else {}
        return Estimate(value, weight, {"loss": value}, grads, extra)

    training = Step(loss, method.build(rate), tapped, guarded=False)

    def step(state: TrainState, rows: Array) -> tuple[TrainState, Array]:
        state, metrics = training.take(state, {"rows": rows})
        return state, metrics["loss"]

    def accuracy(moves: Any, pixels: Array, labels: Array) -> Array:
        count = min(len(pixels), scale.tested) // EVALUATED * EVALUATED
        parts = (pixels[:count].reshape(-1, EVALUATED, 28, 28),
                 labels[:count].reshape(-1, EVALUATED))  # fmt: skip

        def right(part: tuple[Array, Array]) -> Array:
            scores, _ = forward(moves, base, part[0], none)
            return jnp.mean(jnp.argmax(scores, 1) == part[1])

        return jax.lax.map(right, parts).mean()

    def epoch(state: TrainState, key: Array) -> Any:
        order = jax.random.permutation(key, scale.images)
        steps = scale.images // BATCH
        state, losses = jax.lax.scan(step, state, order[: steps * BATCH].reshape(steps, BATCH))
        held_out = images.train[-VALIDATION:], images.train_label[-VALIDATION:]
        value = accuracy(state.params, *held_out)
        test = accuracy(state.params, images.test, images.test_label)
        return state, (losses.mean(), value, test)

    keys = jax.random.split(of_order, scale.epochs)
    state = training.start(moves, jax.random.key(seed))
    losses, validation, test = jax.lax.scan(epoch, state, keys)[1]
    # Of the test accuracies only that of the best epoch leaves the program.
    return {"train": losses, "validation": validation, "test": test[jnp.argmax(validation)]}


if __name__ == "__main__":
    main()
