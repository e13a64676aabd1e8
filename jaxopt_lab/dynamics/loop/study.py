"""A study of repeated learning: settings (p, s) over seeds, verdicts, figures, one directory."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike

from jaxopt_lab.dynamics.loop import mean_field
from jaxopt_lab.dynamics.loop.config import LoopConfig
from jaxopt_lab.dynamics.loop.data import Data
from jaxopt_lab.dynamics.loop.learners import LEARNERS, Learner
from jaxopt_lab.dynamics.loop.run import LoopRecord, MakeData, run_many
from jaxopt_lab.dynamics.loop.study_config import LoopStudyConfig
from jaxopt_lab.dynamics.loop.study_series import describe, series_of
from jaxopt_lab.dynamics.loop.verdict import Verdict, judge
from jaxopt_lab.report.loop_figures import (
    LoopSeries,
    comparison_figure,
    loop_figure,
    surface_figure,
)
from jaxopt_lab.report.tables import format_table

# Shared by all seeds, or a function from a key to those of one seed.
AnyData = MakeData | Data | tuple[ArrayLike, ArrayLike]

# Seeds that run between two reports of progress.
_CHUNK = 8
# The published surface.
SURFACE_USAGE = (0.05, *(k / 10 for k in range(1, 10)), 0.95)
SURFACE_ADHERENCE = tuple(k / 10 for k in range(1, 16))
SURFACE_STEPS = 1400


class Surface(NamedTuple):
    """Deviations over usage and adherence, means over seeds."""

    usage: np.ndarray  # (P,)
    adherence: np.ndarray  # (S,)
    start: np.ndarray  # (S, P) of the first fit
    end: np.ndarray  # (S, P) after the last step
    error: np.ndarray  # (S, P) standard error of `end`


class LoopStudy(NamedTuple):
    """What a study found."""

    directory: Path
    verdicts: tuple[Verdict, ...]
    table: str  # one row a setting
    figures: tuple[Path, ...]
    surface: Surface | None
    seconds: float

    def __str__(self) -> str:
        """Verdicts, table and the directory."""
        texts = [str(verdict) for verdict in self.verdicts]
        return "\n\n".join([*texts, self.table, str(self.directory)])


def run_study(
    config: LoopStudyConfig,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    learner: Learner | None = None,
    data: AnyData | None = None,
) -> LoopStudy:
    """Runs every setting over all seeds, in float64, judges it, and writes one directory.

    The directory holds `config.json`, `results.json` (verdicts, statistics at every record with
    their bands, theory) and `figures/`.

    Args:
      config: The study.
      on_progress: Called with a line of text: the share that is done, the time left, what runs.
      learner: Used instead of the one that `config.learner` names.
      data: Used instead of `config.data`: features and targets that all seeds share, or a function
        from a key to them.

    Raises:
      OSError: If a file cannot be read or written.
      ValueError: For settings that cannot work, before anything is compiled.
    """
    config.validate()
    started = time.monotonic()

    def report(share: float, text: str) -> None:
        passed = time.monotonic() - started
        left = f", {passed * (1 / share - 1):.0f} s left" if 0 < share < 1 else ""
        on_progress(f"{share:4.0%}{left}: {text}")

    data = config.make_data() if data is None else data
    learner = LEARNERS[config.learner] if learner is None else learner
    loop, settings = config.loop(), config.settings()
    items = num_items(data)
    loop.check_items(items)
    directory = config.directory()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    share = 0.8 if config.surface_seeds else 1.0
    verdicts, series = [], []
    for number, (usage, adherence) in enumerate(settings):
        name = f"p = {usage:g}, s = {adherence:g}"
        record = run_seeds(
            jax.random.key(config.seed), data, learner, usage=usage, adherence=adherence,
            loop=loop, seeds=config.seeds,
            on_progress=lambda done, n=number, t=name: report(
                share * (n + done) / len(settings), t
            ),
        )  # fmt: skip
        verdict = judge(
            record, usage=usage, adherence=adherence, config=loop, items=items, margin=config.margin
        )
        verdicts.append(verdict)
        series.append(
            series_of(record, verdict, loop, items, label=_title(config, name), name=name)
        )
    figures = _draw(config, series)
    surface = None
    if config.surface_seeds:
        surface, path = _surface(config, data, learner, items, report, directory)
        figures.append(path)
    report(1.0, "done")
    described = {
        "config": asdict(config),
        "items": items,
        "settings": [describe(v, s) for v, s in zip(verdicts, series, strict=True)],
        "surface": surface and {name: v.tolist() for name, v in surface._asdict().items()},
        "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    (directory / "results.json").write_text(json.dumps(described, allow_nan=False) + "\n")
    return LoopStudy(
        directory, tuple(verdicts), verdict_table(verdicts), tuple(figures), surface,
        time.monotonic() - started,
    )  # fmt: skip


def run_seeds(
    key: jax.Array,
    data: AnyData,
    learner: Learner,
    *,
    usage: float,
    adherence: float,
    loop: LoopConfig,
    seeds: int,
    on_progress: Callable[[float], None] | None = None,
) -> LoopRecord:
    """One setting over seeds, a few at a time, so that a long run can report and be interrupted.

    Args:
      key: Typed key; seed i runs with `fold_in(key, i)`.
      data: As for `run_many`.
      learner: What is trained.
      usage: p.
      adherence: s.
      loop: The loop.
      seeds: Number of seeds, the one axis of the record.
      on_progress: Called with the share that is done.
    """
    keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(np.arange(seeds))
    parts = []
    for first in range(0, seeds, _CHUNK):
        if on_progress is not None:
            on_progress(first / seeds)
        # A shorter last part would be compiled anew: it is filled up with seeds that are dropped.
        chosen = np.arange(first, first + min(_CHUNK, seeds)) % seeds
        part = run_many(keys[chosen], data, learner, usage=usage, adherence=adherence, config=loop)
        kept = min(_CHUNK, seeds - first)
        parts.append(
            jax.tree.map(lambda leaf, n=kept: np.asarray(leaf[:n]), part._replace(step=None))
        )
        step = part.step
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return joined._replace(step=step)


def run_surface(
    key: jax.Array,
    data: AnyData,
    learner: Learner,
    *,
    loop: LoopConfig,
    seeds: int,
    on_progress: Callable[[float], None] | None = None,
) -> Surface:
    """Deviations after 1400 steps (or `loop.steps`) over the published grid of (p, s).

    Args:
      key: Typed key.
      data: As for `run_many`.
      learner: What is trained.
      loop: The loop; its steps are those of the surface.
      seeds: Seeds of every point, which all points share.
      on_progress: Called with the share that is done.
    """
    keys = jax.random.split(key, seeds)
    starts, ends, errors = [], [], []
    for number, adherence in enumerate(SURFACE_ADHERENCE):
        if on_progress is not None:
            on_progress(number / len(SURFACE_ADHERENCE))
        record = run_many(
            keys, data, learner, usage=np.array(SURFACE_USAGE), adherence=adherence, config=loop,
            record_every=loop.num_rounds(num_items(data)),
        )  # fmt: skip
        deviation = np.asarray(record.statistics.dev)  # (P, seeds, first and last)
        starts.append(deviation[..., 0].mean(-1))
        ends.append(deviation[..., -1].mean(-1))
        errors.append(deviation[..., -1].std(-1, ddof=1) / np.sqrt(seeds))
    return Surface(
        np.array(SURFACE_USAGE), np.array(SURFACE_ADHERENCE), *map(np.array, (starts, ends, errors))
    )


def num_items(data: AnyData) -> int:
    """Number of items of data, or of what a function of a key returns."""
    shapes = jax.eval_shape(data, jax.random.key(0)) if callable(data) else data
    return np.shape(shapes[1])[0]


def verdict_table(verdicts: list[Verdict] | tuple[Verdict, ...]) -> str:
    """One row for each setting."""
    headers = (
        "p", "s", "verdict", "end/start", "low", "high", "theory", "slope of ln dev", "mass start",
        "mass end", "r2 line", "r2 pieces",
    )  # fmt: skip
    rows = [
        [
            f"{v.usage:g}", f"{v.adherence:g}", v.label + ("" if v.resolved else " (?)"),
            *(f"{np.exp(x):.3g}" for x in (*v.growth, v.expected.growth)), f"{v.slope.mean:.3g}",
            f"{v.mass_start.mean:.3f}", f"{v.mass_end.mean:.3f}",
            *(None if fit is None else f"{float(fit.r2):.3f}" for fit in (v.line, v.pieces)),
        ]
        for v in verdicts
    ]  # fmt: skip
    return format_table(headers, [["-" if c is None else c for c in row] for row in rows])


def _draw(config: LoopStudyConfig, series: list[LoopSeries]) -> list[Path]:
    directory = config.directory() / "figures"
    paths = [
        loop_figure(one, directory / f"loop-{number + 1}.png") for number, one in enumerate(series)
    ]
    title = _title(config, f"{config.seeds} seeds")
    return [*paths, comparison_figure(series, directory / "deviation.png", title=title)]


def _surface(config, data, learner, items, report, directory) -> tuple[Surface, Path]:
    loop = config.loop()
    steps = min(SURFACE_STEPS, loop.num_steps(items))
    loop = LoopConfig(
        setup=config.setup, rule=config.rule, steps=steps, refit_every=config.refit_every,
        held_out=config.held_out, window=config.window,
    )  # fmt: skip
    surface = run_surface(
        jax.random.fold_in(jax.random.key(config.seed), 1), data, learner, loop=loop,
        seeds=config.surface_seeds, on_progress=lambda done: report(0.8 + 0.2 * done, "surface"),
    )  # fmt: skip
    name = f"{config.setup}, {steps} steps"
    path = surface_figure(
        {name: (surface.usage, surface.adherence, surface.end / surface.start)},
        directory / "figures" / "surface.png",
        critical={name: mean_field.critical_adherence(config.rule, setup=config.setup)},
        title=_title(config, f"{config.surface_seeds} seeds"),
    )
    return surface, path


def _title(config: LoopStudyConfig, text: str) -> str:
    data = Path(config.data).stem
    return f"{config.setup}, {data}, {config.learner}, rule {config.rule}, {text}"
