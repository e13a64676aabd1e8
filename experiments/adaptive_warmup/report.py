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
from figures_of_rows import finals_figure, rates_figure
from methods import OPTIMIZERS, Cells, Optimizer, linear_share, schedules_of, warmup_of

from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.diagnostics import SmoothnessFit, fit_smoothness, smoothness_points
from jaxopt_lab.report import format_table
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
    texts, found = [], {}
    for optimizer in OPTIMIZERS:
        rows = load(args.scale, args.results, optimizer)
        if not rows:
            continue
        noise = seed_noise([row.finals for row in rows.values()])
        texts.append(
            f"## {optimizer.name}\n\n{table(rows, noise)}\n\n{answers(rows, noise)}\n\n"
            f"s = {noise:.4f} nats/token.\n"
        )
        found[optimizer.name] = rows
    if not texts:
        raise SystemExit(f"no result of scale {args.scale} in {args.results}")
    draw(args.scale, found, args.figures)
    fits = smoothness(args.scale, args.results, args.figures / f"{args.scale}-smoothness.png")
    if fits:
        texts.append(f"## Local smoothness\n\n{fit_table(fits)}\n")
    text = f"{RULE} Here s is pooled over the rows of one optimizer.\n\n" + "\n".join(texts)
    (args.results / f"{args.scale}-table.md").write_text(text)
    print(text)


def draw(scale: str, found: dict[str, dict[str, Row]], directory: pathlib.Path) -> None:
    """Final losses and rates of all optimizers, each in one figure with the same axes."""
    best = {name: tuned_by_hand(rows) for name, rows in found.items()}
    finals, rates = {}, {}
    for name, rows in found.items():
        reference = best[name]
        if reference is None:
            continue
        finals[name] = {
            row.schedule: np.subtract(row.finals, reference.finals)
            for row in rows.values()
            if row.finite
        }
        drawn = {f"best by hand ({reference.schedule})": reference}
        drawn |= {each: rows[each] for each in DRAWN if each in rows and rows[each].finite}
        rates[name] = {
            f"{label}, peak {row.tuned.best_rate:.2g}": row.followed[0]
            for label, row in drawn.items()
        }
    finals_figure(finals, directory / f"{scale}-final.png")
    rates_figure(rates, directory / f"{scale}-rates.png")


if __name__ == "__main__":
    main()
