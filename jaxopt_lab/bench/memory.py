"""Memory of optimizer steps, from the compiled programs: nothing is run."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from jaxopt_lab.bench import shapes
from jaxopt_lab.bench.conditions import Report, device_name, versions
from jaxopt_lab.bench.floors import tree_bytes
from jaxopt_lab.bench.methods import DEFAULT_METHODS, method
from jaxopt_lab.bench.timing import CompiledStep
from jaxopt_lab.core.flops import total_flops
from jaxopt_lab.optim.options import InverseRoot
from jaxopt_lab.report.tables import format_table


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one optimizer."""

    optimizer: str
    state_bytes: int
    formula_bytes: int
    """What `state_bytes_of` says."""
    temp_bytes: int | None
    """Scratch memory of the compiled step; None where the backend does not say."""
    compile_s: float


@dataclass(frozen=True)
class MemoryReport(Report):
    """Result of `run_memory`."""

    model: str
    layout: str
    parameter_bytes: int
    device: str
    versions: dict[str, str]
    rows: tuple[MemoryRow, ...]

    def __str__(self) -> str:
        """A table with the conditions above it."""
        headers = ["optimizer", "state MB", "formula MB", "x parameters", "temp MB", "compile s"]
        cells = [
            [
                row.optimizer, _megabytes(row.state_bytes), _megabytes(row.formula_bytes),
                f"{row.state_bytes / self.parameter_bytes:.2f}",
                None if row.temp_bytes is None else _megabytes(row.temp_bytes),
                round(row.compile_s, 1),
            ]
            for row in self.rows
        ]  # fmt: skip
        return (
            f"{self.model}, {self.layout}: {self.parameter_bytes / 1e6:,.1f} MB of parameters, "
            f"compiled for {self.device}, jax {self.versions['jax']}\n\n"
            f"{format_table(headers, cells)}"
        )


def state_bytes_of(name: str, model: str) -> int:
    r"""Bytes of the state by formula, float32 parameters.

    Of matrices of M numbers in all, with sides (m, n), and R other numbers, up to counters:

    | optimizer | bytes |
    |---|---|
    | AdamW | $8 (M + R)$ |
    | Lion | $4 (M + R)$ |
    | Muon, LionMuon | $4 M + 8 R$ |
    | SOAP, DyKAF | $8 M + 8 \sum (m^2 + n^2) + 8 R$ |
    | Shampoo | the same, the sum over blocks with sides up to `max_precond_dim` |

    Args:
      name: As for `bench.methods.method`.
      model: Named decoder whose shapes are used.
    """
    params, axes = shapes.abstract_params(model), shapes.matrix_axes(model)
    matrices = total_flops(params, axes, lambda m, n: m * n)
    largest = InverseRoot().max_precond_dim if name.startswith("shampoo") else sys.maxsize
    squares = total_flops(params, axes, functools.partial(_squares, largest))
    others = sum(x.size for x in jax.tree.leaves(params)) - matrices
    family = name.split("_")[0]
    of_matrix, of_square, of_other = {
        "adamw": (8, 0, 8),
        "lion": (4, 0, 8 if "muon" in name else 4),
        "muon": (4, 0, 8),
    }.get(family, (8, 8, 8))
    return int(of_matrix * matrices + of_square * squares + of_other * others)


def _squares(largest: int, m: int, n: int) -> int:
    """Numbers of the factors of a matrix, or of all blocks that it is cut into."""
    (rows, height), (columns, width) = (
        (parts := -(-side // largest), -(-side // parts)) for side in (m, n)
    )
    return rows * columns * (height**2 + width**2)


def run_memory(
    model: str = "gpt2-124m",
    *,
    optimizers: Sequence[str] = DEFAULT_METHODS,
    layout: shapes.Layout = "stacked",
    on_progress: Callable[[str], None] = lambda text: None,
) -> MemoryReport:
    """Compiles optimizer steps and reads off what they need; no array is made.

    A step is `update` and `apply_updates`, with parameters and state donated. Gradients are
    arguments and count neither as state nor as scratch.

    Args:
      model: Named decoder whose shapes are used.
      optimizers: Names as `bench.methods.method` knows them.
      layout: "stacked" (layers in one leaf) or "per-layer" (a leaf for each).
      on_progress: Called with a line of text before each stage.

    Raises:
      ValueError: For an unknown model or optimizer; before any compilation.
    """
    params, axes = shapes.abstract_params(model, layout), shapes.matrix_axes(model, layout)
    rows = []
    for each in [method(name) for name in optimizers]:
        on_progress(f"compiling {each.name}")
        step = CompiledStep(each.build(axes), params)
        rows.append(
            MemoryRow(
                optimizer=each.name,
                state_bytes=tree_bytes(step.abstract_state),
                formula_bytes=state_bytes_of(each.name, model),
                temp_bytes=step.temp_bytes(),
                compile_s=step.compile_seconds,
            )
        )
    return MemoryReport(
        model=model,
        layout=layout,
        parameter_bytes=tree_bytes(params),
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "jaxopt-lab"),
        rows=tuple(rows),
    )


def _megabytes(count: int) -> float:
    return round(count / 1e6, 1)
