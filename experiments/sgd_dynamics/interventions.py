"""What changing the noise does to SGD: variances and losses; see README.md for claim and protocol.

python experiments/sgd_dynamics/interventions.py
"""

import argparse
import functools
import json
import pathlib
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxopt_lab.dynamics import sgd
from jaxopt_lab.report.landscape_figures import intervention_figure
from jaxopt_lab.report.tables import format_table

HERE = pathlib.Path(__file__).parent
KINDS = ("flat", "sharp", "theory", "random")
FACTORS = {"suppressed": 0.0, "trebled": 3.0}
ALPHAS = (0.0, 0.1, 0.5, 1.0)
# A direction whose gradient noise is below this share of the largest (pixels that are black in all
# images, say) has nothing that an intervention could change.
NOISE_FLOOR = 1e-10


@dataclass(frozen=True)
class Protocol:
    """Sizes of the experiment."""

    train_samples: int = 512
    test_samples: int = 2000
    batch_size: int = 16
    learning_rate: float = 0.05
    directions: int = 8
    reference_sgd_steps: int = 4000
    reference_gd_steps: int = 8000
    reference_rate: float = 0.2
    replicas: int = 128
    steps: int = 200
    training_replicas: int = 16
    training_steps: int = 1500
    seed: int = 0


class Outcome(NamedTuple):
    """Runs under one intervention."""

    weights: np.ndarray  # (R, D), flat
    train_loss: np.ndarray  # (R,)
    test_loss: np.ndarray  # (R,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", default="mnist5k", help="mnist5k or a directory of IDX files")
    parser.add_argument("--output", type=pathlib.Path, default=HERE)
    options = parser.parse_args()
    protocol, start = Protocol(), time.perf_counter()
    with jax.enable_x64(True):
        laboratory = Laboratory(protocol, options.digits)
        results = {
            "protocol": asdict(protocol),
            "reference": laboratory.reference_levels,
            "directions": near_the_reference(laboratory),
            "training": from_the_start(laboratory),
        }
    results["seconds"] = round(time.perf_counter() - start)
    (options.output / "results").mkdir(parents=True, exist_ok=True)
    path = options.output / "results" / "interventions.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.output / "figures" / "interventions.png")
    print(tables(results))


class Laboratory:
    """The network, its data, a trained point and the directions around it."""

    def __init__(self, protocol: Protocol, source: str):
        digits = sgd.read_digits(source)
        train, test = (
            slice(0, protocol.train_samples),
            slice(protocol.train_samples, protocol.train_samples + protocol.test_samples),
        )
        self.protocol = protocol
        self.system = sgd.mlp(digits.images[train], digits.labels[train])
        held_out = sgd.mlp(digits.images[test], digits.labels[test])
        self.loss = self.system.loss
        self.train, self.test = (jax.tree.map(jnp.asarray, s.data) for s in (self.system, held_out))
        self.full_loss = lambda params: self.loss(params, self.train)
        key = jax.random.key(protocol.seed)
        self.first = self.system.init(jax.random.fold_in(key, 1))
        point = sgd.reference_point(
            key, self.system, sgd_steps=protocol.reference_sgd_steps,
            sgd_rate=protocol.reference_rate, batch_size=protocol.batch_size,
            gd_steps=protocol.reference_gd_steps,
        )  # fmt: skip
        self.reference = jax.tree.map(jnp.asarray, point.params)
        self.reference_levels = {
            "loss": float(point.loss[-1]), "gradient_norm": float(point.gradient_norm[-1])
        }  # fmt: skip

    @functools.cached_property
    def landscape(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues and eigenvectors of the mean Hessian, and the covariance of a batch there."""
        basis = sgd.eigenbasis(sgd.mean_hessian(self.loss, self.reference, self.train))
        per_sample = jax.jit(jax.vmap(lambda *batch: self._sample_gradient(*batch)))
        gradients = np.asarray(per_sample(*self.train.values())) @ basis.directions
        covariance = np.cov(gradients.T, bias=True) / self.protocol.batch_size
        return basis.eigenvalues, basis.directions, covariance

    @functools.cached_property
    def directions(self) -> dict[str, jax.Array]:
        """Chosen among the eigenvectors of the mean Hessian that have gradient noise."""
        curvature, vectors, covariance = self.landscape
        variance = np.diagonal(covariance)
        noisy = np.flatnonzero(variance > NOISE_FLOOR * variance.max())
        return {
            kind: sgd.choose_directions(
                jnp.asarray(curvature[noisy]), jnp.asarray(vectors[:, noisy]), kind,
                self.protocol.directions, gradient_variance=jnp.asarray(variance[noisy]),
                key=jax.random.key(7),
            )
            for kind in KINDS
        }  # fmt: skip

    def linear_spread(self, directions: Any, factor: float) -> float:
        """Variance inside a subspace of the quadratic loss with the same Hessian and noise.

        In the eigenbasis the covariance after n steps is elementwise: that of one step times the
        sum of the powers of (1 - eta lambda_i) (1 - eta lambda_j).
        """
        curvature, vectors, covariance = self.landscape
        inside = vectors.T @ np.asarray(directions)
        change = np.eye(len(curvature)) + (factor - 1) * inside @ inside.T
        rate = self.protocol.learning_rate
        kept = 1 - rate * curvature
        excess = np.outer(kept, kept) - 1
        memory = np.asarray(sgd.geometric_sum(excess, self.protocol.steps))
        grown = rate**2 * (change @ covariance @ change) * memory
        return float(np.trace(inside.T @ grown @ inside))

    def _sample_gradient(self, *sample: jax.Array) -> jax.Array:
        batch = dict(zip(self.train, (x[None] for x in sample), strict=True))
        return ravel_pytree(jax.grad(self.loss)(self.reference, batch))[0]

    def run(self, tx: Any, params: Any, *, replicas: int, steps: int) -> Outcome:
        """SGD in replicas, on the same batches whatever the intervention."""
        size = {"num_samples": self.system.samples, "batch_size": self.protocol.batch_size}

        def step(carry: Any, number: jax.Array, key: jax.Array) -> Any:
            weights, state = carry
            batch = jax.tree.map(lambda x: x[sgd.batch_indices(key, number, **size)], self.train)
            gradient = jax.grad(self.loss)(weights, batch)
            extra = {"full_grad": jax.grad(self.full_loss)(weights)}
            updates, state = tx.update(gradient, state, weights, **extra)
            return optax.apply_updates(weights, updates), state

        def one(key: jax.Array) -> tuple[jax.Array, ...]:
            carry = (params, tx.init(params))
            weights, _ = jax.lax.fori_loop(0, steps, lambda n, c: step(c, n, key), carry)
            losses = (self.loss(weights, data) for data in (self.train, self.test))
            return ravel_pytree(weights)[0], *losses

        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(11)))(
            jnp.arange(replicas)
        )
        return Outcome(*map(np.asarray, jax.jit(jax.vmap(one))(keys)))


def near_the_reference(laboratory: Laboratory) -> dict[str, Any]:
    """Noise changed inside a subspace, around the trained point; the ratio of variances in it."""
    protocol = laboratory.protocol
    plain = optax.sgd(protocol.learning_rate)
    run = functools.partial(
        laboratory.run, params=laboratory.reference, replicas=protocol.replicas,
        steps=protocol.steps,
    )  # fmt: skip
    untouched = run(plain)
    rows = []
    for kind, directions in laboratory.directions.items():
        for name, factor in FACTORS.items():
            tx = optax.chain(sgd.project_noise(directions, factor), plain)
            rows.append({"kind": kind, "noise": name} | compare(run(tx), untouched, directions))
            linear = [laboratory.linear_spread(directions, a) for a in (factor, 1.0)]
            rows[-1]["linear_ratio"] = linear[0] / linear[1]
            show(
                f"{kind} {name}: {rows[-1]['variance_ratio']:.3g}, "
                f"{rows[-1]['linear_ratio']:.3g} on the quadratic"
            )
    everything = np.eye(untouched.weights.shape[1])
    scaled = []
    for alpha in ALPHAS:
        tx = optax.chain(sgd.interpolate_noise(alpha), plain)
        scaled.append({"alpha": alpha} | compare(run(tx), untouched, everything))
        scaled[-1]["linear_ratio"] = alpha**2
        show(f"alpha {alpha}: {scaled[-1]['variance_ratio']:.3g}")
    return {"projected": rows, "scaled": scaled, "sgd": levels(untouched)}


def from_the_start(laboratory: Laboratory) -> list[dict[str, Any]]:
    """All noise scaled or matched, from one initialisation: what it does to training."""
    protocol = laboratory.protocol
    plain = optax.sgd(protocol.learning_rate)
    runs = {f"alpha {alpha:g}": sgd.interpolate_noise(alpha) for alpha in ALPHAS}
    runs |= {f"norm-matched {alpha:g}": sgd.match_noise_norm(alpha) for alpha in (0.1, 1.0)}
    outcomes = {}
    for name, intervention in runs.items():
        outcomes[name] = laboratory.run(
            optax.chain(intervention, plain), laboratory.first,
            replicas=protocol.training_replicas, steps=protocol.training_steps,
        )  # fmt: skip
        show(f"training, {name}: test loss {outcomes[name].test_loss.mean():.4f}")
    everything = np.eye(outcomes["alpha 1"].weights.shape[1])
    return [
        {"run": name} | levels(outcome) | compare(outcome, outcomes["alpha 1"], everything)
        for name, outcome in outcomes.items()
    ]


def compare(outcome: Outcome, untouched: Outcome, directions: Any) -> dict[str, float]:
    """Variances inside a subspace, and losses on the same batches."""
    inside, before = (spread(x.weights, np.asarray(directions)) for x in (outcome, untouched))
    change = outcome.test_loss - untouched.test_loss
    return {
        "variance_ratio": inside / before,
        "train_loss_change": float((outcome.train_loss - untouched.train_loss).mean()),
        "test_loss_change": float(change.mean()),
        "test_loss_change_error": float(change.std(ddof=1) / np.sqrt(len(change))),
    }


def spread(weights: np.ndarray, directions: np.ndarray) -> float:
    return float((weights @ directions).var(axis=0, ddof=1).sum())


def levels(outcome: Outcome) -> dict[str, float]:
    return {
        "train_loss": float(outcome.train_loss.mean()),
        "test_loss": float(outcome.test_loss.mean()),
    }


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    ratios: dict[str, dict[str, float]] = {}
    for row in results["directions"]["projected"]:
        ratios.setdefault(f"noise {row['noise']}", {})[row["kind"]] = row["variance_ratio"]
    scaled = results["directions"]["scaled"]
    intervention_figure(
        ratios, path, expected={"noise trebled": 9.0},
        alpha=([row["alpha"] for row in scaled], [row["variance_ratio"] for row in scaled]),
        title="MLP-386 on digits: changing the noise around a trained point",
    )  # fmt: skip


def tables(results: dict[str, Any]) -> str:
    """The tables of README.md."""
    rows = [[f"{r['kind']}, {r['noise']}", *numbers(r)] for r in results["directions"]["projected"]]
    rows += [[f"all, alpha {r['alpha']:g}", *numbers(r)] for r in results["directions"]["scaled"]]
    headers = [
        "noise",
        "variance ratio",
        "of the quadratic",
        "train loss change",
        "test loss change",
        "error",
    ]
    training = [
        [r["run"], r["train_loss"], r["test_loss"], f"{r['variance_ratio']:.3g}"]
        for r in results["training"]
    ]
    names = ["run", "train loss", "test loss", "variance / that of alpha 1"]
    return "\n\n".join(
        format_table(h, r, markdown=True) for h, r in ((headers, rows), (names, training))
    )


def numbers(row: dict[str, float]) -> list[str]:
    names = ("train_loss_change", "test_loss_change", "test_loss_change_error")
    ratios = (f"{row[name]:.3g}" for name in ("variance_ratio", "linear_ratio"))
    return [*ratios, *(f"{row[name]:.1e}" for name in names)]


def show(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
