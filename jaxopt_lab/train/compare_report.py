"""What a comparison says: table, figure and JSON."""

import itertools
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
from jaxopt_lab.sweep import (
    PAIRED_RULE,
    Difference,
    PairedNoise,
    StepCost,
    Tuned,
    paired_differences,
    paired_noise,
)
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

    noise: PairedNoise | None
    """Of a loss, seeds taken out; None where fewer than two optimizers can be compared."""

    table: str
    """Markdown."""

    def difference(self, label: str, other: str) -> Difference | None:
        """One optimizer's mean loss minus another's; None where one of them diverged."""
        return _differences(self.outcomes).get((label, other))


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
    losses = _comparable_losses(outcomes)
    noise = paired_noise(list(losses.values())) if len(losses) > 1 else None
    table = "\n\n".join(
        [
            _headline(config),
            _table(outcomes, bits_per_byte_of_a_nat),
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


def _table(outcomes: Sequence[Outcome], bits: float) -> str:
    headers = [
        "optimizer",
        "best rate",
        "held-out nats/token",
        "\N{PLUS-MINUS SIGN} documents",
        "std of seeds",
        "bits/byte",
        f"minus {outcomes[0].label}",
        "standard errors",
        "counts",
        "training, last 100 windows",
        f"minus {outcomes[0].label}, by seed",
        "tokens/s",
        "optimizer share",
        "peak MiB",
    ]
    found = _differences(outcomes)
    first = outcomes[0]
    rows = [
        _row(outcome, found.get((outcome.label, first.label)), _by_seed(outcome, first), bits)
        for outcome in outcomes
    ]
    return format_table(headers, rows, markdown=True)


def _by_seed(outcome: Outcome, other: Outcome) -> str:
    """Difference of the training losses at equal seeds, with the standard error of its mean."""
    known = outcome.comparable and other.comparable and len(outcome.tuned.train_losses) > 1
    if outcome is other or not known:
        return ""
    values = np.subtract(outcome.tuned.train_losses, other.tuned.train_losses)
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():+.4f} \N{PLUS-MINUS SIGN} {error:.4f}"


def _row(outcome: Outcome, against: Difference | None, by_seed: str, bits: float) -> list[Any]:
    tuned, cost = outcome.tuned, outcome.cost
    losses = np.asarray(tuned.final_losses)
    mean = float(losses.mean()) if outcome.comparable else None
    rate = "diverged" if tuned.best_rate is None else f"{tuned.best_rate:.3g}"
    peak = cost.peak_bytes
    return [
        outcome.label,
        rate if tuned.rim is None else f"{rate} ({tuned.rim})",
        "diverged" if mean is None else f"{mean:.4f}",
        "-" if mean is None else _or_dash(tuned.errors),
        "-" if mean is None else f"{losses.std(ddof=1):.4f}",
        "-" if mean is None else f"{mean * bits:.4f}",
        "" if against is None else f"{against.value:+.4f}",
        "" if against is None else f"{against.standard_errors:+.1f}",
        "" if against is None else ("yes" if against.counts else "direction only"),
        "-" if mean is None else _or_dash(tuned.train_losses),
        by_seed,
        f"{cost.tokens_per_second:,.0f}",
        f"{100 * cost.optimizer_share:.1f} %",
        None if peak is None else f"{peak / 2**20:,.1f}",
    ]


def _or_dash(values: Sequence[float]) -> str:
    """A mean, where all of it is known."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return f"{mean:.4f}" if math.isfinite(mean) else "-"


def _notes(outcomes: Sequence[Outcome], noise: PairedNoise | None) -> list[str]:
    notes = [f"Rule, stated before the runs: {PAIRED_RULE}"]
    if noise is not None:
        notes.append(
            f"Noise of a loss, seeds taken out: {noise.deviation:.4f} nats/token, "
            f"{noise.freedom} degrees of freedom."
        )
    for outcome in outcomes:
        tuned = outcome.tuned
        if len(tuned.rates) == 1:
            notes.append(f"**{outcome.label}** has one rate, so it was not tuned.")
        elif tuned.rim is not None:
            notes.append(
                f"**{outcome.label}**: the best rate is the {tuned.rim} of its grid "
                f"({tuned.rates[0]:.3g} to {tuned.rates[-1]:.3g}); a better one may lie outside. "
                f"Move the grid: --rates '{outcome.label}={_moved(tuned)}'."
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
    tied = [each for each in outcomes if "adam_lr_ratio" in each.optimizer]
    if tied:
        ratios = ", ".join(f"{each.label} {each.optimizer['adam_lr_ratio']:g}" for each in tied)
        notes.append(
            "Leaves that are not matrices follow AdamW at a fixed multiple of the tuned rate, "
            f"which was not tuned for itself: {ratios}."
        )
    notes.append(
        "\N{PLUS-MINUS SIGN} documents is the standard error of one run's held-out loss for other "
        "documents of the same kind; optimizers share theirs, so that it is no error of a "
        "difference. Where the training losses, each before it was learnt from, disagree about a "
        "sign, conclude nothing from it."
    )
    notes.append(
        "tokens/s, optimizer share and memory belong to one run alone: whole steps timed in turn "
        "with steps without the update, medians; memory is that of the compiled step."
    )
    return notes


def _moved(tuned: Tuned) -> str:
    """The grid with the best rate in its middle, as the command line takes it."""
    assert tuned.best_rate is not None
    cells = len(tuned.rates)
    spacing = (tuned.rates[-1] / tuned.rates[0]) ** (1 / (cells - 1))
    return ",".join(f"{tuned.best_rate * spacing ** (k - cells // 2):.3g}" for k in range(cells))


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


def _verdict(outcomes: Sequence[Outcome], noise: PairedNoise | None) -> dict[str, Any]:
    found = _differences(outcomes)
    pairs = [
        {
            "optimizer": first,
            "minus": second,
            "difference": found[first, second].value,
            "standard_error": found[first, second].standard_error,
            "standard_errors": _finite(found[first, second].standard_errors),
            "counts": found[first, second].counts,
        }
        for first, second in itertools.combinations(_comparable_losses(outcomes), 2)
    ]
    return {
        "rule": PAIRED_RULE,
        "noise": None if noise is None else noise._asdict(),
        "reference": outcomes[0].label,
        "optimizers": [
            {
                "optimizer": outcome.label,
                "best_rate": outcome.tuned.best_rate,
                "best_cell_on_rim": outcome.tuned.rim,
                "mean_final_loss": float(np.mean(outcome.tuned.final_losses))
                if outcome.comparable
                else None,
                "held_out_se": _known(outcome.tuned.errors),
                "training_loss": _known(outcome.tuned.train_losses),
                "diverged_seeds": outcome.diverged_seeds,
                "tokens_per_second": outcome.cost.tokens_per_second,
                "optimizer_share": outcome.cost.optimizer_share,
                "peak_bytes": outcome.cost.peak_bytes,
            }
            for outcome in outcomes
        ],
        "differences": pairs,
    }


def _known(values: Sequence[float]) -> float | None:
    return _finite(float(np.mean(values))) if len(values) else None


def _differences(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Difference]:
    """Of all pairs that can be compared, in both orders."""
    losses = _comparable_losses(outcomes)
    return paired_differences(losses) if len(losses) > 1 else {}


def _comparable_losses(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, ...]]:
    return {each.label: each.tuned.final_losses for each in outcomes if each.comparable}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
