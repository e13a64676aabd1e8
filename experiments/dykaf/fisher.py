"""How close the factors come to the Fisher matrix; see fisher.md for claim and protocol.

python experiments/dykaf/fisher.py     # two minutes on two cores
"""

import argparse
import functools
import json
import pathlib
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab as jol
from jaxopt_lab.core.kronecker import INTEGRATORS, nearest_kronecker
from jaxopt_lab.core.spectral import eigenbasis
from jaxopt_lab.diagnostics import (
    ApproximationErrors,
    FullFisher,
    basis_distance,
    kronecker_distance,
)
from jaxopt_lab.report import Curve, curves_figure, format_table

HERE = pathlib.Path(__file__).parent
SEEDS, NOISE_SEEDS = (0, 1, 2), tuple(range(100, 112))
DECAYS = (0.90, 0.95, 0.99)
FOLLOWED_DECAYS = (0.95, 1.0)  # of the optimizers whose state is followed; 1 is the plain sum
FIRST_COUNTED = 50  # steps before this one (from 0) are left out of the means
PUBLISHED = json.loads((HERE / "results" / "fisher-reference.json").read_text())
KRONECKER = ("best", "ksl", "parallel", "gram")
LABELS = {
    "best": "best Kronecker product",
    "ksl": "DyKAF, ksl",
    "parallel": "DyKAF, parallel",
    "gram": "Gram factors (Shampoo, SOAP)",
}
DRAWN = {
    "Shampoo": "Shampoo L⊗R",
    "SOAP": "SOAP Q diag(V) Qᵀ",
    "DyKAF": "DyKAF Q diag(V) Qᵀ",
    "DyKAF factors": "DyKAF L⊗R",
    "best": "best L⊗R",
}


@dataclass(frozen=True)
class Task:
    """Softmax regression on Gaussian features, labelled by a linear teacher."""

    classes: int = 8
    features: int = 15
    batch: int = 32
    steps: int = 200
    rate: float = 0.5
    latent: int = 16
    """Features are linear mixtures of this many independent Gaussians, and so correlated."""
    scale: float = 1.35
    """Standard deviation of a feature, averaged over mixtures."""
    random_labels: float = 0.04
    """Share of labels that are drawn at random."""


def gradients(task: Task, seed: int) -> np.ndarray:
    """Gradients along one run of SGD from zero, every batch fresh; (steps, classes, features)."""
    rng = np.random.default_rng(seed)
    mixture = rng.standard_normal((task.latent, task.features))
    mixture *= task.scale / np.sqrt(task.latent)
    teacher = rng.standard_normal((task.classes, task.features))
    weights, grads = np.zeros_like(teacher), []
    for _ in range(task.steps):
        x = rng.standard_normal((task.batch, task.latent)) @ mixture
        random = rng.random(task.batch) < task.random_labels
        labels = rng.integers(0, task.classes, task.batch)
        labels = np.where(random, labels, (x @ teacher.T).argmax(1))
        residual = np.asarray(jax.nn.softmax(x @ weights.T)) - np.eye(task.classes)[labels]
        grads.append(residual.T @ x / task.batch)
        weights = weights - task.rate * grads[-1]
    return np.stack(grads)


@jax.jit
def track(grads, decay):
    """Fisher matrices, pairs of factors and their errors after every gradient."""
    m, n = grads.shape[1:]

    def add(state, grad, old, new):
        entries, gram = state
        entries = old * entries + new * grad[:, :, None, None] * grad[None, None]
        return entries, (old * gram[0] + new * grad @ grad.T, old * gram[1] + new * grad.T @ grad)

    def step(carry, grad):
        state, pairs = carry
        pairs = {
            name: INTEGRATORS[name](*pair, grad, decay=decay, weight=1 - decay)
            for name, pair in pairs.items()
        }
        carry = add(state, grad, decay, 1 - decay), pairs
        return carry, carry

    def errors(carry):
        (entries, gram), pairs = carry
        fisher = FullFisher(entries)
        best = fisher.best_kronecker()
        pairs = pairs | {"best": best, "gram": gram}
        return {
            name: (fisher.kronecker_errors(*pair), kronecker_distance(*pair, best))
            for name, pair in pairs.items()
        }

    # The first gradient has weight one; the best factors for it are known.
    zeros = jnp.zeros((m, n, m, n)), (jnp.zeros((m, m)), jnp.zeros((n, n)))
    start = add(zeros, grads[0], 0.0, 1.0), dict.fromkeys(INTEGRATORS, nearest_kronecker(grads[0]))
    _, rest = jax.lax.scan(step, start, grads[1:])
    return jax.lax.map(errors, rest)


@functools.partial(jax.jit, static_argnums=1)
def follow(grads, decay):
    """What DyKAF and SOAP hold after every gradient, compared with the Fisher matrix so far.

    The optimizers only look on: they get the gradients of the SGD run.
    """
    m, n = grads.shape[1:]
    methods: dict[str, optax.GradientTransformation] = {
        "dykaf": jol.scale_by_dykaf(factor_decay=decay),
        "soap": jol.scale_by_soap(factor_decay=decay),
    }
    params = jnp.zeros((m, n))

    def step(carry, grad):
        entries, states = carry
        new = jnp.where(jnp.any(entries != 0) & (decay < 1), 1 - decay, 1)
        entries = decay * entries + new * grad[:, :, None, None] * grad[None, None]
        states = {k: methods[k].update(grad, s, params)[1] for k, s in states.items()}
        return (entries, states), (entries, states)

    def measure(carry):
        entries, states = carry
        fisher = FullFisher(entries)
        best = fisher.best_kronecker()
        best_bases = tuple(map(eigenbasis, best))
        out = {
            "Shampoo": _of_factors(fisher, _factors(states["soap"]), best),
            "DyKAF factors": _of_factors(fisher, _factors(states["dykaf"]), best),
            "best": _of_factors(fisher, best, best)
            | {"diagonal_mass": fisher.diagonal_mass(*best_bases)},
        }
        for name, label in (("soap", "SOAP"), ("dykaf", "DyKAF")):
            bases = states[name].row_basis, states[name].column_basis
            out[label] = _named(fisher.eigenbasis_errors(states[name].nu, *bases)) | {
                "diagonal_mass": fisher.diagonal_mass(*bases),
                "basis_distance": basis_distance(bases, best_bases),
            }
        return out

    start = jnp.zeros((m, n, m, n)), {k: tx.init(params) for k, tx in methods.items()}
    _, carries = jax.lax.scan(step, start, grads)
    return jax.lax.map(measure, carries)


def _factors(state):
    return state.row_factor, state.column_factor


def _of_factors(fisher, pair, best):
    distance = kronecker_distance(*pair, best)
    return _named(fisher.kronecker_errors(*pair)) | {
        "distance": distance.relative,
        "distance_rescaled": distance.rescaled,
    }


def _named(errors: ApproximationErrors) -> dict[str, Any]:
    return {"relative": errors.relative, "rescaled": errors.rescaled}


def tracked_cells(streams: list[np.ndarray]) -> dict[str, dict[str, list[list[float]]]]:
    """By decay and name, one row a stream: error, rescaled, distance, rescaled distance."""
    cells: dict[str, dict[str, list[list[float]]]] = {}
    for decay in DECAYS:
        runs = [jax.device_get(track(jnp.asarray(g), jnp.asarray(decay))) for g in streams]
        cells[f"{decay:.2f}"] = {
            name: [
                # `track` starts with the second gradient.
                [float(x[FIRST_COUNTED - 1 :].mean()) for e in run[name] for x in e[:2]]
                for run in runs
            ]
            for name in KRONECKER
        }
    return cells


def deviations(cells: dict[str, dict[str, list[list[float]]]]) -> dict[str, float]:
    """Distance of the mean of every cell from the reference."""
    out = {}
    for decay, wanted in PUBLISHED.items():
        for name, values in wanted.items():
            got = np.mean(cells[decay][name], axis=0)
            for i, value in enumerate(values):
                out[f"b = {decay}, {name}, column {i + 1}"] = float(got[i] - value)
    return out


def comparison_table(cells, columns: tuple[int, int]) -> str:
    """Measured and (reference) cells as Markdown."""
    names = KRONECKER if columns[0] == 0 else KRONECKER[1:]
    rows = []
    for decay, wanted in PUBLISHED.items():
        row = [decay]
        for name in names:
            got = np.mean(cells[decay][name], axis=0)
            row.append(
                " / ".join(f"{got[i]:.3f}" for i in columns)
                + " (" + " / ".join(f"{wanted[name][i]:.3f}" for i in columns) + ")"
            )  # fmt: skip
        rows.append(row)
    return format_table(["b", *(LABELS[name] for name in names)], rows, markdown=True)


def followed_table(means: dict[str, dict[str, float]]) -> str:
    """What the optimizers hold, as Markdown."""
    quantities = {
        "relative": "relative error",
        "rescaled": "error after the best scalar",
        "distance": "distance to the best",
        "distance_rescaled": "the same after the best scalar",
        "basis_distance": "distance of the basis to the best one's",
        "diagonal_mass": "diagonal mass in the basis",
    }
    rows = [
        [text, *(f"{means[name][key]:.3f}" if key in means[name] else "" for name in DRAWN)]
        for key, text in quantities.items()
    ]
    return format_table(["", *DRAWN.values()], rows, markdown=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    out = parser.parse_args().out
    task = Task()
    with jax.enable_x64(True):
        streams = [gradients(task, seed) for seed in SEEDS]
        cells = tracked_cells(streams)
        # How much of a deviation is luck: the spread between other seeds.
        spread = tracked_cells([gradients(task, seed) for seed in NOISE_SEEDS])
        curves = {
            decay: jax.tree.map(
                lambda *x: np.mean(x, axis=0),
                *(jax.device_get(follow(jnp.asarray(g), decay)) for g in streams),
            )
            for decay in FOLLOWED_DECAYS
        }
    means = jax.tree.map(lambda x: float(x[FIRST_COUNTED:].mean()), curves)
    off = deviations(cells)
    worst = max(off, key=lambda cell: abs(off[cell]))
    report = "\n\n".join(
        [
            comparison_table(cells, (0, 1)),
            comparison_table(cells, (2, 3)),
            f"largest deviation: {off[worst]:+.4f} ({worst})",
            *(f"b = {decay}\n\n{followed_table(means[decay])}" for decay in FOLLOWED_DECAYS),
        ]
    )
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "results" / "fisher-table.md").write_text(report + "\n")
    result = {
        "task": asdict(task),
        "seeds": SEEDS,
        "cells": {b: {k: np.mean(v, 0).tolist() for k, v in c.items()} for b, c in cells.items()},
        "deviations": off,
        "standard_deviation_between_seeds": {
            b: {k: np.std(v, axis=0, ddof=1).tolist() for k, v in c.items()}
            for b, c in spread.items()
        },
        "mean_of_other_seeds": {
            b: {k: np.mean(v, 0).tolist() for k, v in c.items()} for b, c in spread.items()
        },
        "other_seeds": NOISE_SEEDS,
        "followed": means,
        "jax": jax.__version__,
    }
    (out / "results" / "fisher.json").write_text(json.dumps(result, indent=1))
    for decay, what in zip(FOLLOWED_DECAYS, ("average", "sum"), strict=True):
        title = f"Fisher matrix of softmax regression, b = {decay}, mean of {len(SEEDS)} seeds"
        draw(curves[decay], out / "figures" / f"fisher-{what}.png", title)
    print(report)


def draw(curves: dict[str, dict[str, np.ndarray]], path: pathlib.Path, title: str) -> None:
    """Error after the best scalar along the run."""
    steps = np.arange(2, len(curves["best"]["rescaled"]) + 1)
    curves_figure(
        [
            Curve(label, steps, curves[name]["rescaled"][1:], final_value=False)
            for name, label in DRAWN.items()
        ],
        path,
        x_label="steps",
        y_label="error after the best scalar, relative",
        title=title,
    )


if __name__ == "__main__":
    main()
