"""What a comparison says: table, figure and JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxopt_lab import models
from jaxopt_lab.report.figures import Curve, curves_figure
from jaxopt_lab.report.files import write_json
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.sweep import RULE, Difference, StepCost, Tuned, difference, seed_noise
from jaxopt_lab.train.config.comparison import CompareConfig

TABLE_FILE = "table.md"
FIGURE_FILE = "loss.png"
VERDICT_FILE = "summary.json"


@dataclass(frozen=True)
class Outcome:
    """One optimizer of a comparison."""

    label: str
    optimizer: Mapping[str, Any]
    """Its name and all its settings."""

    tuned: Tuned
    """Losses of all its runs."""

    cost: StepCost
    """Time and memory of one of its runs alone."""

    optimizer_flops: float
    """FLOPs of its update, averaged over the kinds of steps it takes."""

    @property
    def diverged_seeds(self) -> int:
        """Final runs that ended with a loss that is not finite."""
        return sum(not math.isfinite(loss) for loss in self.tuned.final_losses)

    @property
    def comparable(self) -> bool:
        """Whether there is a mean to compare: some rate worked, on every seed."""
        return self.tuned.best is not None and not self.diverged_seeds

    def to_json(self) -> dict[str, Any]:
        """Everything as strict JSON values."""
        return {
            "label": self.label,
            "optimizer": dict(self.optimizer),
            **self.tuned.to_json(),
            "cost": asdict(self.cost),
            "optimizer_flops_per_step": self.optimizer_flops,
        }


@dataclass(frozen=True)
class CompareResult:
    """What a comparison found."""

    directory: Path
    outcomes: tuple[Outcome, ...]
    """In the order of the configuration; the first is the reference."""

    noise: float | None
    """Standard deviation between seeds, pooled; None if no optimizer has two finite seeds."""

    table: str
    """Markdown."""

    def difference(self, label: str, other: str) -> Difference | None:
        """One optimizer's mean loss minus another's; None where one of them diverged."""
        by_label = {outcome.label: outcome for outcome in self.outcomes}
        return _difference(by_label[label], by_label[other], self.noise)


def write_report(
    config: CompareConfig,
    directory: Path,
    outcomes: tuple[Outcome, ...],
    bits_per_byte_of_a_nat: float,
) -> CompareResult:
    """Writes table, figure and verdict of a comparison.

    Args:
      config: The comparison.
      directory: Where they go.
      outcomes: One for each optimizer, the reference first.
      bits_per_byte_of_a_nat: Bits per byte of held-out text for one nat per token.
    """
    finite = [list(o.tuned.final_losses) for o in outcomes]
    several = any(sum(map(math.isfinite, losses)) > 1 for losses in finite)
    noise = seed_noise(finite) if several else None
    table = "\n\n".join(
        [
            _headline(config),
            _table(outcomes, noise, bits_per_byte_of_a_nat),
            "\n".join(f"- {note}" for note in _notes(outcomes, noise)),
        ]
    )
    (directory / TABLE_FILE).write_text(table + "\n")
    _draw(config, outcomes, directory / FIGURE_FILE)
    write_json(directory / VERDICT_FILE, _verdict(outcomes, noise))
    return CompareResult(directory, outcomes, noise, table)


def _headline(config: CompareConfig) -> str:
    size = models.parameter_count(config.model) / 1e6
    return (
        f"{config.preset}, {size:.2f}M parameters, {config.steps} steps of "
        f"{config.batch_size} x {config.model.context} tokens, "
        f"{config.cells} rates for each optimizer on seed {config.sweep_seed}, "
        f"then seeds {', '.join(map(str, config.seeds))}; {jax.devices()[0].device_kind}"
    )


def _table(outcomes: Sequence[Outcome], noise: float | None, bits: float) -> str:
    headers = [
        "optimizer",
        "best rate",
        "held-out nats/token",
        "std of seeds",
        "bits/byte",
        f"minus {outcomes[0].label}",
        "standard errors",
        "counts",
        "tokens/s",
        "optimizer share",
        "peak MiB",
    ]
    rows = [_row(outcome, outcomes[0], noise, bits) for outcome in outcomes]
    return format_table(headers, rows, markdown=True)


def _row(outcome: Outcome, reference: Outcome, noise: float | None, bits: float) -> list[Any]:
    tuned, cost = outcome.tuned, outcome.cost
    losses = np.asarray(tuned.final_losses)
    mean = float(losses.mean()) if outcome.comparable else None
    against = None if outcome is reference else _difference(outcome, reference, noise)
    rate = "diverged" if tuned.best_rate is None else f"{tuned.best_rate:.3g}"
    peak = cost.peak_bytes
    return [
        outcome.label,
        rate if tuned.rim is None else f"{rate} ({tuned.rim})",
        "diverged" if mean is None else f"{mean:.4f}",
        "-" if mean is None else f"{losses.std(ddof=1):.4f}",
        "-" if mean is None else f"{mean * bits:.4f}",
        "" if against is None else f"{against.value:+.4f}",
        "" if against is None else f"{against.standard_errors:+.1f}",
        "" if against is None else ("yes" if against.counts else "no"),
        f"{cost.tokens_per_second:,.0f}",
        f"{100 * cost.optimizer_share:.1f} %",
        None if peak is None else f"{peak / 2**20:,.1f}",
    ]


def _notes(outcomes: Sequence[Outcome], noise: float | None) -> list[str]:
    notes = [f"Rule, stated before the runs: {RULE}"]
    if noise is not None:
        notes.append(f"Noise between seeds, s: {noise:.4f} nats/token.")
    for outcome in outcomes:
        tuned = outcome.tuned
        if tuned.rim is not None:
            notes.append(
                f"**{outcome.label}**: the best rate is the {tuned.rim} of its grid "
                f"({tuned.rates[0]:.3g} to {tuned.rates[-1]:.3g}); a better one may lie outside. "
                "Move the grid with --rates."
            )
        rates = [
            f"{rate:.3g}"
            for rate, loss in zip(tuned.rates, tuned.sweep_losses, strict=True)
            if not math.isfinite(loss)
        ]
        if rates:
            notes.append(f"{outcome.label} diverged at {', '.join(rates)}.")
        if outcome.diverged_seeds:
            notes.append(
                f"**{outcome.label}** diverged on {outcome.diverged_seeds} of "
                f"{len(tuned.seeds)} seeds and takes no part in the comparison."
            )
    notes.append(
        "tokens/s, optimizer share and memory belong to one run alone: whole steps timed in turn "
        "with steps without the update, medians; memory is that of the compiled step."
    )
    return notes


def _draw(config: CompareConfig, outcomes: Sequence[Outcome], path: Path) -> None:
    curves = []
    for outcome in outcomes:
        losses = outcome.tuned.held_out
        if not outcome.comparable:
            continue
        curves.append(
            Curve(
                label=f"{outcome.label}, rate {outcome.tuned.best_rate:.2g}",
                x=outcome.tuned.evaluated_steps,
                y=losses.mean(axis=0),
                low=losses.min(axis=0),
                high=losses.max(axis=0),
            )
        )
    curves_figure(
        curves,
        path,
        x_label="optimizer step",
        y_label="held-out loss [nats/token]",
        title=f"{config.preset}: mean and range of {len(config.seeds)} seeds",
    )


def _verdict(outcomes: Sequence[Outcome], noise: float | None) -> dict[str, Any]:
    pairs = []
    for index, first in enumerate(outcomes):
        for second in outcomes[index + 1 :]:
            found = _difference(first, second, noise)
            if found is not None:
                errors = found.standard_errors
                pairs.append(
                    {
                        "optimizer": first.label,
                        "minus": second.label,
                        "difference": found.value,
                        "standard_error": found.standard_error,
                        "standard_errors": errors if math.isfinite(errors) else None,
                        "counts": found.counts,
                    }
                )
    return {
        "rule": RULE,
        "seed_noise": noise,
        "reference": outcomes[0].label,
        "optimizers": [
            {
                "optimizer": outcome.label,
                "best_rate": outcome.tuned.best_rate,
                "best_cell_on_rim": outcome.tuned.rim,
                "mean_final_loss": float(np.mean(outcome.tuned.final_losses))
                if outcome.comparable
                else None,
                "diverged_seeds": outcome.diverged_seeds,
                "tokens_per_second": outcome.cost.tokens_per_second,
                "optimizer_share": outcome.cost.optimizer_share,
                "peak_bytes": outcome.cost.peak_bytes,
            }
            for outcome in outcomes
        ],
        "differences": pairs,
    }


def _difference(first: Outcome, second: Outcome, noise: float | None) -> Difference | None:
    if noise is None or not (first.comparable and second.comparable):
        return None
    return difference(first.tuned.final_losses, second.tuned.final_losses, noise)
