"""Times optimizer steps on the shapes of a named model.

A step is `update` and `apply_updates` in one compiled program with parameters and state donated,
on random gradients; there is no model. What is reported is wall time of the loop a user writes
(asynchronous Python dispatch of single steps), beside the floors that the device's own measured
ceilings put under it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxopt_lab.bench import shapes
from jaxopt_lab.bench.conditions import Report, device_name, versions
from jaxopt_lab.bench.floors import CeilingProbe, Ceilings, step_bytes, tree_bytes
from jaxopt_lab.bench.methods import DEFAULT_METHODS, Method, method
from jaxopt_lab.bench.timing import (
    CompiledStep,
    OptimizerTimer,
    interleave,
    random_gradients,
    random_like,
)
from jaxopt_lab.report.tables import format_table

_BASELINE = "adamw"


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer on one layout; times in milliseconds."""

    optimizer: str
    layout: str
    step_ms: float
    """Median over rounds of the time of whole periods, divided by their steps."""
    ratio: float
    """Median over rounds of the ratio to AdamW in the same round."""
    worst_step_ms: float
    """Slowest step of a period when each step is waited for."""
    host_ms: float
    """Part of `step_ms` that Python spends dispatching; near `step_ms`, the host is the limit."""
    byte_floor_ms: float
    """Bytes a step must move, at the measured copy rate."""
    flop_floor_ms: float
    """FLOPs of the matrix products, averaged over the period, at the measured bf16 rate."""
    floor_fraction: float
    """The larger floor over the time taken."""
    compile_s: float
    state_bytes: int
    temp_bytes: int | None
    """Scratch memory of the compiled step."""
    xla_flops: float | None
    """FLOPs of the compiled step as XLA counts them, both branches of a conditional included."""


@dataclass(frozen=True)
class OptimizerReport(Report):
    """Result of `run_optimizers`."""

    model: str
    parameters: int
    device: str
    versions: dict[str, str]
    repeats: int
    fused_qkv: bool
    ceilings: Ceilings
    rows: tuple[OptimizerRow, ...]

    def __str__(self) -> str:
        """A table with the conditions above it."""
        headers = [
            "optimizer", "layout", "ms/step", "x AdamW", "worst ms", "host ms", "byte floor ms",
            "FLOP floor ms", "of floor", "state MB", "temp MB", "compile s",
        ]  # fmt: skip
        table = format_table(headers, [_cells(row) for row in self.rows])
        return (
            f"{self.model}: {self.parameters:,} parameters on {self.device}, "
            f"jax {self.versions['jax']}, optax {self.versions['optax']}\n"
            f"copy {self.ceilings.bytes_per_second / 1e9:,.1f} GB/s, bf16 product "
            f"{self.ceilings.flops_per_second / 1e12:,.3g} TFLOP/s, "
            f"medians of {self.repeats} interleaved rounds\n\n{table}"
        )


def run_optimizers(
    model: str = "gpt2-124m",
    *,
    optimizers: Sequence[str] = DEFAULT_METHODS,
    layouts: Sequence[shapes.Layout] = ("stacked",),
    repeats: int = 11,
    seconds_per_round: float = 0.1,
    fused_qkv: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> OptimizerReport:
    """Times optimizer steps, all optimizers of a layout in turn within each round.

    Args:
      model: Named decoder whose shapes are used.
      optimizers: Names as `bench.methods.method` knows them; AdamW is always timed as well.
      layouts: "stacked" (layers in one leaf), "per-layer" (a leaf for each), or both.
      repeats: Rounds; medians are taken over them.
      seconds_per_round: Aimed duration of one optimizer's sample in a round.
      fused_qkv: Treat query, key and value as one matrix instead of three.
      on_progress: Called with a line of text before each stage.

    Returns:
      One row per optimizer and layout, with the ceilings measured in the same rounds.

    Raises:
      ValueError: For an unknown model, layout or optimizer, or no rounds; before any compilation.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, wanted at least 1")
    unknown = set(layouts) - set(shapes.LAYOUTS)
    if unknown:
        raise ValueError(f"layouts: {sorted(unknown)} not among {', '.join(shapes.LAYOUTS)}")
    methods = [method(name) for name in dict.fromkeys((_BASELINE, *optimizers))]
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.abstract_params(model)))
    probe = CeilingProbe()
    measured = [
        timed
        for layout in layouts
        for timed in _time_layout(
            model, layout, methods, fused_qkv, repeats, seconds_per_round, probe, on_progress
        )
    ]
    ceilings = probe.ceilings()
    return OptimizerReport(
        model=model,
        parameters=parameters,
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "jaxopt-lab"),
        repeats=repeats,
        fused_qkv=fused_qkv,
        ceilings=ceilings,
        rows=tuple(timed.row(ceilings) for timed in measured),
    )


@dataclass(frozen=True)
class _Timed:
    """An optimizer on a layout after its rounds."""

    method: Method
    layout: shapes.Layout
    step: CompiledStep
    timer: OptimizerTimer
    baseline: OptimizerTimer
    params: Any
    axes: Any

    def row(self, ceilings: Ceilings) -> OptimizerRow:
        state = self.step.abstract_state
        seconds = float(np.median(self.timer.amortised))
        flops = self.method.period_flops(self.params, self.axes) / self.method.period
        byte_floor = step_bytes(self.params, state) / ceilings.bytes_per_second
        flop_floor = flops / ceilings.flops_per_second
        ratios = np.asarray(self.timer.amortised) / np.asarray(self.baseline.amortised)
        return OptimizerRow(
            optimizer=self.method.name,
            layout=self.layout,
            step_ms=1e3 * seconds,
            ratio=float(np.median(ratios)),
            worst_step_ms=1e3 * self.timer.worst_step(),
            host_ms=1e3 * float(np.median(self.timer.host)),
            byte_floor_ms=1e3 * byte_floor,
            flop_floor_ms=1e3 * flop_floor,
            floor_fraction=max(byte_floor, flop_floor) / seconds,
            compile_s=self.step.compile_seconds,
            state_bytes=tree_bytes(state),
            temp_bytes=self.step.temp_bytes(),
            xla_flops=self.step.flops(),
        )


def _time_layout(
    model: str,
    layout: shapes.Layout,
    methods: Sequence[Method],
    fused_qkv: bool,
    repeats: int,
    seconds_per_round: float,
    probe: CeilingProbe,
    on_progress: Callable[[str], None],
) -> list[_Timed]:
    abstract = shapes.abstract_params(model, layout)
    axes = shapes.matrix_axes(model, layout, fused_qkv=fused_qkv)
    steps = []
    for each in methods:
        on_progress(f"{layout}: compiling {each.name}")
        steps.append(CompiledStep(each.build(axes), abstract))
    params = random_like(abstract, seed=1, scale=0.02)
    grads = random_gradients(abstract)
    timers = [
        OptimizerTimer(step, each.period, params) for step, each in zip(steps, methods, strict=True)
    ]
    on_progress(f"{layout}: timing")
    interleave(
        timers,
        params,
        grads,
        repeats=repeats,
        seconds_per_round=seconds_per_round,
        each_round=probe.sample,
    )
    return [
        _Timed(each, layout, step, timer, timers[0], abstract, axes)
        for each, step, timer in zip(methods, steps, timers, strict=True)
    ]


def _cells(row: OptimizerRow) -> list[Any]:
    temp = None if row.temp_bytes is None else round(row.temp_bytes / 1e6, 1)
    return [
        row.optimizer, row.layout, row.step_ms, f"{row.ratio:.2f}", row.worst_step_ms,
        row.host_ms, row.byte_floor_ms, row.flop_floor_ms, f"{row.floor_fraction:.0%}",
        round(row.state_bytes / 1e6, 1), temp, round(row.compile_s, 1),
    ]  # fmt: skip
