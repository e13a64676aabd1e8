"""Draws the figures and writes the tables of the comparison of warm-ups from results/*.json.

python experiments/adaptive_warmup/report.py --scale gpu
"""

import argparse
import functools
import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from methods import OPTIMIZERS, Cells, Optimizer, linear_share, schedules_of, warmup_of

from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.diagnostics import SmoothnessFit, fit_smoothness, smoothness_points
from jaxopt_lab.report import Curve, curves_figure, format_table
from jaxopt_lab.report.smoothness import SmoothnessSeries, smoothness_figure
from jaxopt_lab.sweep import RULE, Tuned, difference, seed_noise

HERE = pathlib.Path(__file__).parent
# What the experiment was made to decide; "tuned" is the best of the linear rows.
QUESTIONS = (
    ("exact", "tuned"),
    ("auto", "tuned"),
    ("official", "tuned"),
    ("none", "tuned"),
    ("official", "exact"),
    ("auto", "exact"),
    ("exact-kappa-of-muon", "exact"),
    ("exact-kappa-of-lion", "exact"),
    ("exact-target-low", "exact"),
    ("exact-target-high", "exact"),
)
DRAWN = ("exact", "official", "auto")
# Curvature changes most while the loss leaves the level of a random model.
FIRST_STEPS = 20


@dataclass(frozen=True)
class Row:
    """One result file."""

    schedule: str
    tuned: Tuned
    file: dict[str, Any]

    @property
    def finals(self) -> tuple[float, ...]:
        """Final held-out losses."""
        return self.tuned.final_losses

    @property
    def finite(self) -> bool:
        """Whether every seed ended with a loss."""
        return self.tuned.finite

    @property
    def linear(self) -> bool:
        """Whether its length was set by hand."""
        return self.file["family"] == "linear"

    @functools.cached_property
    def followed(self) -> tuple[np.ndarray, np.ndarray]:
        """Rates over the peak, (seeds, steps), and the steps that ended the warm-up; replayed."""
        steps, div = self.file["scale"]["steps"], self.file["div_factor"]
        if self.linear:
            warmup = self.file["warmup_steps"]
            share = linear_share(np.arange(steps), steps=steps, warmup=warmup, div_factor=div)
            count = len(self.finals)
            return np.tile(np.asarray(share), (count, 1)), np.full(count, warmup)
        target = self.file["target"] or 0.0
        cell = Cells(self.tuned.best_rate, 0.0, self.file["kappa"], target, div)
        tx = warmup_of(self.file["family"], cell, steps)
        scalar = jnp.ones(())

        def one(state: Any, loss: Any) -> Any:
            share, state = tx.update(scalar, state, value=loss)
            return state, share

        losses = jnp.asarray(self.file["train"], jnp.float32)  # None becomes NaN
        replay = jax.jit(lambda x: jax.lax.scan(one, tx.init(scalar), x))
        replayed = [replay(x) for x in losses]
        ends = [int(state.switch_step) for state, _ in replayed]
        return np.stack([shares for _, shares in replayed]), np.asarray(ends)


def load(scale: str, directory: pathlib.Path, optimizer: Optimizer) -> dict[str, Row]:
    """Results of one scale and optimizer, by schedule."""
    rows = {}
    for schedule in schedules_of(optimizer):
        path = directory / f"{scale}-{optimizer.slug}-{schedule.name}.json"
        if path.exists():
            file = json.loads(path.read_text())
            rows[schedule.name] = Row(schedule.name, Tuned.from_json(file), file)
    return rows


def tuned_by_hand(rows: dict[str, Row]) -> Row | None:
    """The linear row with the lowest loss on the sweep's seed, its rate tuned as well."""
    linear = [r for r in rows.values() if r.linear and r.finite]
    return min(linear, key=lambda r: r.tuned.sweep_losses[r.tuned.best or 0], default=None)


def table(rows: dict[str, Row], noise: float) -> str:
    """Every row of an optimizer as Markdown."""
    reference = tuned_by_hand(rows)
    lines = []
    for row in rows.values():
        tuned = row.tuned
        rim = f" ({tuned.rim})" if tuned.rim else ""
        against = "chosen by hand" if row is reference else ""
        if row is not reference and reference is not None and row.finite:
            found = difference(row.finals, reference.finals, noise)
            against = f"{found.value:+.3f} ({found.standard_errors:+.1f})"
        lines.append(
            [
                row.schedule,
                "" if row.file["target"] is None else f"{row.file['target']:.1f}",
                _length(row),
                "diverged" if tuned.best_rate is None else f"{tuned.best_rate:.2g}{rim}",
                f"{np.mean(row.finals):.3f}" if row.finite else "diverged",
                f"{np.std(row.finals, ddof=1):.3f}" if row.finite else "-",
                against,
            ]
        )
    headers = [
        "schedule", "target", "warm-up steps", "best rate", "held-out nats/token", "std of seeds",
        "minus best by hand (in standard errors)",
    ]  # fmt: skip
    return format_table(headers, lines, markdown=True)


def _length(row: Row) -> str:
    if row.linear or not row.finite:
        return f"{row.file['warmup_steps']:.0f}" if row.linear else "-"
    ends = row.followed[1]
    if (ends < 0).any():
        return f"not ended in {int((ends < 0).sum())} of {len(ends)} runs"
    low, high = ends.min() + 1, ends.max() + 1
    limit = " (half the run)" if high == math.ceil(row.file["scale"]["steps"] / 2) else ""
    return (f"{low}" if low == high else f"{low} to {high}") + limit


def answers(rows: dict[str, Row], noise: float) -> str:
    """The differences that the experiment was made for."""
    by_hand = tuned_by_hand(rows)
    named = {**rows, **({"tuned": by_hand} if by_hand else {})}
    lines = []
    for first, second in QUESTIONS:
        a, b = named.get(first), named.get(second)
        if a is None or b is None or a is b or not (a.finite and b.finite):
            continue
        found = difference(a.finals, b.finals, noise)
        # The same seeds on both sides: what their initialisation and text do cancels.
        paired = np.subtract(a.finals, b.finals)
        lines.append(
            [
                f"{first} - {b.schedule}", f"{found.value:+.4f}", f"{found.standard_errors:+.1f}",
                found.verdict(first), f"{paired.std(ddof=1) / math.sqrt(len(paired)):.4f}",
            ]
        )  # fmt: skip
    headers = ["", "nats/token", "standard errors", "verdict", "standard error of pairs"]
    return format_table(headers, lines, markdown=True)


def rate_curves(rows: dict[str, Row]) -> list[Curve]:
    """Mean rate over seeds with its range."""
    by_hand = tuned_by_hand(rows)
    drawn = [("best by hand", by_hand)] + [(name, rows.get(name)) for name in DRAWN]
    curves = []
    for color, (label, row) in enumerate(drawn):
        if row is None or not row.finite:
            continue
        shares = row.followed[0]
        if row.linear:
            label = f"{label} ({row.schedule})"
        curves.append(
            Curve(
                f"{label}, peak {row.tuned.best_rate:.2g}", np.arange(shares.shape[1]),
                shares.mean(axis=0), low=shares.min(axis=0), high=shares.max(axis=0),
                final_value=False, color=color,
            )
        )  # fmt: skip
    return curves


def length_curves(rows: dict[str, Row]) -> list[Curve]:
    """Final loss over the length set by hand; adaptive rows as bands, which have no length."""
    linear = sorted(
        (r for r in rows.values() if r.linear and r.finite), key=lambda r: r.file["warmup_steps"]
    )
    lengths = [r.file["warmup_steps"] for r in linear]
    curves = []
    if linear:
        finals = np.asarray([r.finals for r in linear])
        curves.append(
            Curve(
                "length by hand", lengths, finals.mean(axis=1), low=finals.min(axis=1),
                high=finals.max(axis=1), markers=True, final_value=False, color=0,
            )
        )  # fmt: skip
    for color, name in enumerate(DRAWN, start=1):
        row = rows.get(name)
        if row is None or not row.finite or not linear:
            continue
        level = np.full(2, np.mean(row.finals))
        low, high = np.full(2, min(row.finals)), np.full(2, max(row.finals))
        ends = [lengths[0], lengths[-1]]
        curves.append(Curve(f"{name}: {_length(row)}", ends, level, low, high, color=color))
    return curves


def smoothness(
    scale: str, directory: pathlib.Path, figure: pathlib.Path
) -> dict[str, tuple[SmoothnessFit, float, float]]:
    """Fits the records of every optimizer in its own norm and draws them.

    Beside each fit stand the rank correlation of ratio and gap, +1 where curvature falls with it,
    and the same without the first steps.
    """
    panels, targets, fits = {}, {}, {}
    for optimizer in OPTIMIZERS:
        path = directory / f"{scale}-{optimizer.slug}-smoothness.json"
        if not path.exists() or not isinstance(optimizer.norm, str):
            continue
        file, pair = json.loads(path.read_text()), optimizer.norm
        points = smoothness_points(
            file["step"],
            np.asarray(file["loss_after"]) - file["target"],
            file[f"{pair}/gradient_difference"],
            file[f"{pair}/step_norm"],
        )
        title = f"{optimizer.name} ({_DUALS[pair]} / {pair})"
        fit, label = None, "too few points for a fit"
        if len(points.gap) >= 10:
            fit = fit_smoothness(points.gap, points.ratio)
            late = points.step >= FIRST_STEPS
            fits[optimizer.name] = (
                fit,
                rank_correlation(points.gap, points.ratio),
                rank_correlation(points.gap[late], points.ratio[late]),
            )
            label = f"$R^2$ = {fit.r2:.3f}, {100 * fit.share_above:.0f} % above"
        panels[title] = [SmoothnessSeries(label, *points, curve=fit.curve if fit else None)]
        targets[title] = file["target"]
    if panels:
        smoothness_figure(panels, figure, target_loss=targets)
    return fits


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    return float(np.corrcoef([np.argsort(np.argsort(v)) for v in (x, y)])[0, 1])


_DUALS: dict[DualNorms, str] = {
    "spectral": "nuclear", "sign": "sum of entries", "frobenius": "Frobenius"
}  # fmt: skip


def fit_table(fits: dict[str, tuple[SmoothnessFit, float, float]]) -> str:
    """Coefficients, and whether the curvature falls with the gap."""
    lines = []
    for name, (fit, correlation, late) in fits.items():
        numbers = (fit.k0, fit.k1, fit.k_rho)
        lines.append(
            [
                name, *(f"{k:.3g}" for k in numbers), f"{fit.r2:.3f}", f"{fit.share_above:.0%}",
                f"{correlation:+.2f}", f"{late:+.2f}",
            ]
        )  # fmt: skip
    headers = [
        "optimizer", "K0", "K1", "K2", "R^2", "points above", "rank correlation with gap",
        f"from step {FIRST_STEPS}",
    ]  # fmt: skip
    return format_table(headers, lines, markdown=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="gpu")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figures", type=pathlib.Path, default=HERE / "figures")
    args = parser.parse_args()
    texts = []
    for optimizer in OPTIMIZERS:
        rows = load(args.scale, args.results, optimizer)
        if not rows:
            continue
        noise = seed_noise([row.finals for row in rows.values()])
        texts.append(
            f"## {optimizer.name}\n\n{table(rows, noise)}\n\n{answers(rows, noise)}\n\n"
            f"s = {noise:.4f} nats/token.\n"
        )
        draw(args.scale, optimizer, rows, args.figures)
    if not texts:
        raise SystemExit(f"no result of scale {args.scale} in {args.results}")
    fits = smoothness(args.scale, args.results, args.figures / f"{args.scale}-smoothness.png")
    if fits:
        texts.append(f"## Local smoothness\n\n{fit_table(fits)}\n")
    text = f"{RULE} Here s is pooled over the rows of one optimizer.\n\n" + "\n".join(texts)
    (args.results / f"{args.scale}-table.md").write_text(text)
    print(text)


def draw(scale: str, optimizer: Optimizer, rows: dict[str, Row], directory: pathlib.Path) -> None:
    """Two figures of an optimizer."""
    file = next(iter(rows.values())).file
    title = f"{optimizer.name}, {file['parameters'] / 1e6:.1f}M parameters, {file['device']}"
    name = f"{scale}-{optimizer.slug}"
    curves_figure(
        rate_curves(rows), directory / f"{name}-rates.png", x_label="steps",
        y_label="learning rate / its peak", title=title,
    )  # fmt: skip
    curves_figure(
        length_curves(rows), directory / f"{name}-lengths.png",
        x_label="warm-up length set by hand [steps]", y_label="held-out loss [nats/token]",
        title=title,
    )  # fmt: skip


if __name__ == "__main__":
    main()
