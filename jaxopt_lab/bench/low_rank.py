"""Losses a second of low-rank probes, beside batched inference and dense probes, on one device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.bench.conditions import Report, device_name, versions
from jaxopt_lab.bench.timing import program_bytes
from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.report.tables import format_table

_SECONDS = 0.3  # aimed duration of a sample


@dataclass(frozen=True)
class LowRankRow:
    """One way to get the losses."""

    name: str
    ms: float
    """Of all losses, with their draws: the median over rounds."""
    losses_per_second: float
    of_inference: float
    """Losses a second over those of batched inference."""
    temp_bytes: int | None


@dataclass(frozen=True)
class LowRankReport(Report):
    """Result of `run_low_rank`."""

    device: str
    versions: dict[str, str]
    parameters: int
    width: int
    losses: int
    """Losses that every row evaluates."""
    batch: int
    tokens: int
    rank: int
    compute_dtype: str
    rows: list[LowRankRow]

    def __str__(self) -> str:
        """A table with the conditions above it."""
        cells = [
            [
                *(row.name, row.ms, row.losses_per_second, row.of_inference),
                None if row.temp_bytes is None else row.temp_bytes / 2**20,
            ]
            for row in self.rows
        ]
        headers = ["evaluation", "ms", "losses/s", "of inference", "temp MiB"]
        return (
            f"{self.losses} losses of {self.batch} x {self.tokens} tokens, rank {self.rank}, "
            f"width {self.width}, {self.parameters:,} parameters, {self.compute_dtype}, "
            f"on {self.device}, jax {self.versions['jax']}\n\n{format_table(headers, cells)}"
        )


def run_low_rank(
    config: DecoderConfig,
    *,
    losses: int = 64,
    batch: int = 16,
    tokens: int = 48,
    rank: int = 1,
    chunk: int | None = None,
    head_chunks: int = 8,
    rounds: int = 5,
    on_progress: Callable[[str], None] = lambda text: None,
) -> LowRankReport:
    """Times the same number of losses in four ways, and the estimates made of them in two.

    Batched inference evaluates one batch of all sequences without perturbations: the rate that
    low-rank probes approach. Dense probes take `signs()`, the cheapest draws, one loss after the
    other, as their matrices differ.

    Args:
      config: Of the decoder.
      losses: A step; an even number, two a direction.
      batch: Sequences a loss.
      tokens: A sequence.
      rank: Of the directions.
      chunk: Directions that are evaluated together; None: all.
      head_chunks: Pieces in which the head is evaluated; divides `tokens`.
      rounds: Samples of each row, taken in turn.
      on_progress: Called with a line of text before each stage.

    Raises:
      ValueError: `losses` is odd or below 2.
    """
    if losses < 2 or losses % 2:
        raise ValueError(f"losses: got {losses}, wanted an even number of at least 2")
    programs = _programs(config, losses, batch, tokens, rank, chunk, head_chunks)
    params = models.init_params(config, jax.random.key(0))
    compiled = {}
    for name, program in programs.items():
        on_progress(f"compile {name}")
        compiled[name] = jax.jit(program).lower(params).compile()
    counts = {name: _repeats(run, params) for name, run in compiled.items()}
    samples: dict[str, list[float]] = {name: [] for name in compiled}
    for number in range(rounds):
        on_progress(f"round {number + 1} of {rounds}")
        for name, run in compiled.items():
            samples[name].append(_seconds(run, params, counts[name]))
    seconds = {name: float(np.median(values)) for name, values in samples.items()}
    rows = [
        LowRankRow(
            name,
            1e3 * seconds[name],
            losses / seconds[name],
            seconds["batched inference"] / seconds[name],
            program_bytes(compiled[name])["temp"],
        )
        for name in compiled
    ]
    count = models.parameter_count(config)
    known = versions("jax", "jaxlib")
    shape = (config.width, losses, batch, tokens, rank, config.compute_dtype)
    return LowRankReport(device_name(), known, count, *shape, rows)


def _programs(
    config: DecoderConfig,
    losses: int,
    batch: int,
    tokens: int,
    rank: int,
    chunk: int | None,
    head_chunks: int,
) -> dict[str, Callable[[Any], Any]]:
    drawn = jax.random.randint(jax.random.key(1), (batch, tokens + 1), 0, config.vocab_size)

    def loss(params: Any, side: Any = None, sequences: Any = drawn) -> jax.Array:
        given = {"tokens": sequences}
        return models.loss(config, params, given, head_chunks=head_chunks, side=side)[0]

    def update(sampler: zo.Sampler, engine: zo.Engine, **given: Any) -> Callable[[Any], Any]:
        tx = zo.estimate(
            sampler,
            num_directions=losses // 2,
            key=jax.random.key(2),
            engine=engine,
            matrix_axes=models.matrix_axes(config),
        )
        unused: Any = None
        return lambda params: tx.update(unused, tx.init(params), params, **given)

    together = zo.vmapped() if chunk is None else zo.chunked(chunk)
    low_rank = update(zo.low_rank(rank), together, probe_fn=zo.beside(loss))
    dense = update(zo.signs(), zo.sequential(), value_fn=loss)
    return {
        "batched inference": lambda params: loss(params, sequences=jnp.tile(drawn, (losses, 1))),
        # Where only the losses are asked for, nothing of the estimate is compiled.
        "low-rank losses": lambda params: low_rank(params)[1].losses,
        "dense losses, one by one": lambda params: dense(params)[1].losses,
        "low-rank estimate": low_rank,
        "dense estimate, one by one": dense,
    }


def _seconds(run: Any, params: Any, count: int) -> float:
    """Seconds a call, of some that are waited for together."""
    start = time.perf_counter()
    for _ in range(count):
        result = run(params)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def _repeats(run: Any, params: Any) -> int:
    """Calls that make a sample, after two that warm up."""
    _seconds(run, params, 1)
    return max(1, round(_SECONDS / max(_seconds(run, params, 1), 1e-9)))
