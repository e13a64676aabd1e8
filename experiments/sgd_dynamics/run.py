"""Runs the parts of the experiment on SGD's variance; see README.md for claim and protocol.

python experiments/sgd_dynamics/run.py [--parts mlp wide ...] [--scale cpu|gpu]
"""

import argparse
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from measure import (
    Run,
    Training,
    described,
    ensemble,
    exact_point,
    lanczos_directions,
    lanczos_point,
    measured,
    train,
)

from jaxopt_lab.dynamics import sgd

HERE = pathlib.Path(__file__).parent
SAMPLES = 2048
SEEDS = (0, 1, 2)
LOW_LOSS = Training(sgd_steps=10_000, sgd_rate=0.1, gd_steps=10_000, gd_rate=0.5)
HALF_TRAINED = Training(sgd_steps=500, sgd_rate=0.1)
WIDE, WIDE_RATE = Training(sgd_steps=4000, sgd_rate=0.1, gd_steps=200), 0.05
RATES = (0.05, 0.01, 0.005, 0.001)


@dataclass(frozen=True)
class Scale:
    """Sizes that depend on the machine."""

    sweep: tuple[int, int]  # replicas, steps
    cnn: tuple[int, int]
    cnn_pixels: int | None
    nanogpt: tuple[int, int]
    wide: tuple[int, int]
    wide_directions: int
    wide_proxies: int


SCALES = {
    "cpu": Scale((500, 1110), (200, 300), 10, (200, 300), (96, 200), 32, 32),
    "gpu": Scale((1000, 1110), (1000, 1000), None, (1000, 1000), (1000, 1000), 96, 96),
}


def mlp(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """MLP-386 near a low-loss point, three seeds."""
    system = sgd.mlp(*sgd.read_digits(options.digits, limit=SAMPLES))
    run = Run(learning_rate=0.05, steps=500, replicas=1000, record_every=10)
    rows, references = [], []
    for seed in SEEDS:
        entries = "all" if seed == SEEDS[0] else "diagonal"
        point = exact_point(system, train(system, LOW_LOSS, seed), curvature=entries)
        references.append(described(point))
        rows.append(measured(point, run, seed))
    return {"training": asdict(LOW_LOSS), "references": references, "runs": rows}


def half_trained(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """The same where the loss still falls."""
    system = sgd.mlp(*sgd.read_digits(options.digits, limit=SAMPLES))
    point = exact_point(system, train(system, HALF_TRAINED, SEEDS[0]))
    run = Run(learning_rate=0.05, steps=500, replicas=1000, record_every=10)
    rows = [measured(point, run, SEEDS[0])]
    return {"training": asdict(HALF_TRAINED), "references": [described(point)], "runs": rows}


def sweep(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """The learning rates of the publication, and one ensemble without replacement."""
    system = sgd.mlp(*sgd.read_digits(options.digits, limit=SAMPLES))
    point = exact_point(system, train(system, LOW_LOSS, SEEDS[0]))
    replicas, steps = scale.sweep
    rows = [measured(point, Run(rate, steps, replicas, 15), SEEDS[0]) for rate in RATES]
    # Three whole epochs.
    short = Run(learning_rate=0.05, steps=3 * SAMPLES // 64, replicas=replicas, record_every=32)
    traces = {
        sampling: float(ensemble(point, short, SEEDS[0], sampling).variance[-1].sum())
        for sampling in ("with_replacement", "without_replacement", "epochs")
    }
    return {
        "training": asdict(LOW_LOSS),
        "references": [described(point)],
        "runs": rows,
        "traces_after_three_epochs": traces,
    }


def langevin(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """The published grid of one direction: exact recursion, and what Langevin calls stable."""
    rates, variances = np.asarray([0.2, 0.6, 0.7, 0.8]), np.asarray([0.5, 1, 2, 2.4, 2.8, 4, 8])
    with jax.enable_x64(True):
        table = jax.device_get(sgd.phase_table(rates, variances, curvature=1.0))
        after = sgd.variance_at(
            500, learning_rate=rates[:, None], curvature=1.0, gradient_variance=0.2,
            curvature_variance=variances[None],
        )  # fmt: skip
    return {
        "curvature": 1.0,
        "gradient_variance": 0.2,
        "steps": 500,
        "rates": rates.tolist(),
        "curvature_variances": variances.tolist(),
        "growth": np.round(table.growth, 12).tolist(),
        "stable": table.stable.tolist(),
        "langevin_stable": table.langevin_stable.tolist(),
        "variance_after": [[float(f"{x:.6g}") for x in row] for row in np.asarray(after)],
    }


def cnn(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """The small CNN, whose batch norm couples the samples of a batch."""
    digits = sgd.read_digits(options.digits, limit=SAMPLES)
    system = sgd.cnn(*digits, pooled=scale.cnn_pixels)
    training = Training(sgd_steps=6000, sgd_rate=0.2)
    reference = train(system, training, SEEDS[0])
    point = exact_point(system, reference, curvature="none", drawn_batches=256)
    replicas, steps = scale.cnn
    rows = [measured(point, Run(0.01, steps, replicas, steps // 20), SEEDS[0])]
    return {"training": asdict(training), "references": [described(point)], "runs": rows}


def nanogpt(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """The character transformer on real text."""
    text = sgd.read_text(options.text)
    system = sgd.nano_gpt(text, samples=SAMPLES)
    training = Training(sgd_steps=10_000, sgd_rate=0.5, gd_steps=300, gd_rate=0.2)
    point = exact_point(system, train(system, training, SEEDS[0]), curvature="none")
    replicas, steps = scale.nanogpt
    rows = [measured(point, Run(0.01, steps, replicas, steps // 20), SEEDS[0])]
    return {
        "training": asdict(training),
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "references": [described(point)],
        "runs": rows,
    }


def wide(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """784 → 128 → 10, 101 770 parameters: Lanczos and flat proxies."""
    system = wide_system(options)
    point = lanczos_point(
        system, train(system, WIDE, SEEDS[0]), count=scale.wide_directions,
        proxies=scale.wide_proxies,
    )  # fmt: skip
    replicas, steps = scale.wide
    rows = [measured(point, Run(WIDE_RATE, steps, replicas, steps // 20), SEEDS[0])]
    return {"training": asdict(WIDE), "references": [described(point)], "runs": rows}


def wide_drift(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """How the noise at the point of `wide` changes along one run of the length of an ensemble."""
    system = wide_system(options)
    point = train(system, WIDE, SEEDS[0])
    found = lanczos_directions(
        system, point, count=scale.wide_directions, proxies=scale.wide_proxies
    )
    rows = []
    for quarter in range(5):
        noise = [
            sgd.noise_statistics(
                system.loss, point.params, system.data, directions=x.directions,
                batch_size=WIDE.batch_size, curvature="none",
            ).gradient_variance.sum()
            for x in found
        ]  # fmt: skip
        rows.append([250 * quarter, float(point.loss[-1]), *map(float, noise)])
        point = sgd.reference_point(
            jax.random.key(3000 + quarter), system, sgd_steps=250, sgd_rate=WIDE_RATE,
            batch_size=WIDE.batch_size, params=point.params,
        )  # fmt: skip
    return {"training": asdict(WIDE), "steps_loss_sharp_random": rows}


def wide_system(options: argparse.Namespace) -> sgd.System:
    """784 → 128 → 10."""
    digits = sgd.read_digits(options.digits, limit=SAMPLES)
    return sgd.mlp(*digits, pooled=None, hidden=(128,))


PARTS: dict[str, Callable[[argparse.Namespace, Scale], dict[str, Any]]] = {
    "langevin": langevin,
    "mlp": mlp,
    "half_trained": half_trained,
    "sweep": sweep,
    "nanogpt": nanogpt,
    "cnn": cnn,
    "wide": wide,
    "wide_drift": wide_drift,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--digits", default="mnist5k", help="mnist5k or a directory of IDX files")
    parser.add_argument("--text", default=None, help="a text file; Python's reference otherwise")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        path = options.output / f"{options.scale}-{name}.json"
        if path.exists():
            print(f"{name}: has a result, {path}", flush=True)
            continue
        begun = time.perf_counter()
        result = PARTS[name](options, SCALES[options.scale])
        seconds = round(time.perf_counter() - begun, 1)
        print(f"{name}: {seconds} s", flush=True)
        result = {
            "part": name,
            "scale": options.scale,
            "digits": pathlib.Path(options.digits).name,
            "device": jax.devices()[0].device_kind,
            "devices": len(jax.devices()),
            "jax": jax.__version__,
            "seconds": seconds,
            **result,
        }
        path.write_text(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
