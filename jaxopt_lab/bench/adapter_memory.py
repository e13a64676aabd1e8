"""Memory of fine-tuning MiniLM with adapters, from the compiled programs: nothing is run."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import lora, models
from jaxopt_lab.bench.conditions import Report, device_name, versions
from jaxopt_lab.bench.timing import program_bytes
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.step import Adapted, Step
from jaxopt_lab.tasks import classification_loss, encoder_logits

MINILM = models.EncoderConfig(
    vocab_size=30_522, width=384, depth=6, heads=12, hidden=1536, classes=2
)
COUNTS = (1, 3, 6, 12, 18)
_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One way to fine-tune the kernels of query, key and value."""

    adapters: int
    """How many of them have an adapter."""
    rank: int
    dropout: float
    """Of the inputs of adapters."""
    first: str
    """Where the first adapters are: in the `bottom` layer or in the `top` one."""
    optimizer: str
    """`adamw`, or `scaled_lorsum`, which needs taps."""


@dataclass(frozen=True)
class MemoryRow(Case):
    """Bytes of one training step; None where the backend does not say."""

    scratch_bytes: int | None
    """Activations, gradients and taps: all that is neither argument nor result."""
    parameters: int
    """Numbers in the adapters."""
    state_numbers: int
    """Floats in the state of the optimizer."""
    tap_bytes: int
    """Layer inputs and output gradients, a copy of the inputs for each kernel."""


@dataclass(frozen=True)
class MemoryReport(Report):
    """Result of `run_adapter_memory`."""

    batch: int
    length: int
    device: str
    versions: dict[str, str]
    rows: tuple[MemoryRow, ...]

    def __str__(self) -> str:
        """A table with the conditions above it."""
        headers = ["optimizer", "dropout", "first", "rank", "adapters"]
        headers += ["scratch MiB", "parameters", "state", "taps MiB"]
        rows = [
            [
                *(row.optimizer, f"{row.dropout:g}", row.first, row.rank, row.adapters),
                None if row.scratch_bytes is None else f"{row.scratch_bytes / _MIB:.1f}",
                *(row.parameters, row.state_numbers),
                f"{row.tap_bytes / _MIB:.1f}" if row.tap_bytes else None,
            ]
            for row in self.rows
        ]
        return (
            f"MiniLM, {self.batch} rows of {self.length} tokens, unrolled ({self.device}), jax "
            f"{self.versions['jax']}\n\n{format_table(headers, rows)}"
        )


def cases(counts: Sequence[int] = COUNTS, ranks: Sequence[int] = (8, 64, 256)) -> list[Case]:
    """What the report compares: numbers of adapters, ranks, dropout, places, optimizers.

    >>> len(cases()), cases()[0]
    (32, Case(adapters=1, rank=8, dropout=0.05, first='bottom', optimizer='adamw'))
    """
    found = [
        Case(count, rank, dropout, "bottom", "adamw")
        for dropout in (0.05, 0.0)
        for rank in (ranks if dropout else (ranks[0], ranks[-1]))
        for count in counts
    ]
    few = [count for count in counts if count < MINILM.depth * 3]
    found += [Case(count, ranks[0], 0.05, "top", "adamw") for count in few]
    ends = ((counts[0], ranks[0]), (counts[-1], ranks[0]), (counts[-1], ranks[-1]))
    return [*found, *(Case(*end, 0.0, "bottom", "scaled_lorsum") for end in ends)]


def run_adapter_memory(
    *,
    batch: int = 64,
    length: int = 128,
    chosen: Sequence[Case] | None = None,
    config: models.EncoderConfig = MINILM,
    on_progress: Callable[[str], None] = lambda text: None,
) -> MemoryReport:
    """Compiles training steps and reads off what they need; no weights, no array is made.

    The base and the head are frozen, as is the dropout of the model: off.

    Args:
      batch: Rows of a step.
      length: Tokens of a row.
      chosen: What to compare; by default `cases`.
      config: Of the encoder.
      on_progress: Called with a line of text before each stage.
    """
    rows = []
    for case in cases() if chosen is None else chosen:
        on_progress(f"compiling {case}")
        rows.append(_row(config, case, batch, length))
    return MemoryReport(
        batch=batch,
        length=length,
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "flax", "jaxopt-lab"),
        rows=tuple(rows),
    )


def _row(config: models.EncoderConfig, case: Case, batch: int, length: int) -> MemoryRow:
    params = models.abstract_params(config)
    spec = _spec(config, case)
    adapters = jax.eval_shape(lambda key: lora.init(key, spec, params), jax.random.key(0))
    loss = lora.loss_beside(classification_loss(encoder_logits(config), dropout=False), spec)
    tapped = case.optimizer == "scaled_lorsum"
    if tapped:
        step = Step(loss, lora.scaled_lorsum(0.2), lora.with_taps(spec), guarded=False)
    else:
        step = Step(loss, optax.adamw(1e-3), guarded=False)
    state = jax.eval_shape(step.start, Adapted(params, adapters), jax.random.key(0))
    shape = (batch, length)
    rows = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    }
    # How fast the program would run does not matter here, and its buffers do not depend on it.
    quick: Any = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    lowered = jax.jit(lambda *given: step.take(*given)[0], donate_argnums=0).lower(state, rows)
    compiled = lowered.compile(compiler_options=quick)
    numbers = [
        x.size for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    entry = spec.adapters[0]
    inputs_and_outputs = sum(entry.matrix_shape[1:])
    return MemoryRow(
        **dataclasses.asdict(case),
        scratch_bytes=program_bytes(compiled)["temp"],
        parameters=spec.parameter_count,
        state_numbers=sum(numbers),
        tap_bytes=4 * batch * length * inputs_and_outputs * case.adapters if tapped else 0,
    )


def _spec(config: models.EncoderConfig, case: Case) -> lora.LoraSpec:
    chosen = lora.LoraConfig(rank=case.rank, alpha=case.rank, dropout=case.dropout, target=("qkv",))
    params, axes = models.abstract_params(config), models.matrix_axes(config)
    spec = lora.resolve(chosen, params, axes)
    (entry,) = spec.adapters
    layers = range(config.depth) if case.first == "bottom" else reversed(range(config.depth))
    order = [3 * layer + piece for layer in layers for piece in range(3)]
    return spec.with_adapters([entry._replace(kept=tuple(sorted(order[: case.adapters])))])
