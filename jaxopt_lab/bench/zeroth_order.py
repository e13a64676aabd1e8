"""Times zero-order steps against the forward passes that they consist of, on one device."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.bench.conditions import device_name, versions
from jaxopt_lab.bench.timing import CallTimer, call_timers, interleave_calls, program_bytes
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.step import Step, forward_only
from jaxopt_lab.tasks import language_model_loss
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of

_EVALUATION = "evaluation"
# The rate changes nothing about the time of a step; a small one keeps the numbers ordinary.
_RATE = 1e-6
_DIRECTIONS, _CANDIDATES = 4, 5
_KEY_SEED = 1


@dataclass(frozen=True)
class Setting:
    """What the rows are timed on."""

    config: models.DecoderConfig
    params: Any
    tokens: jax.Array  # (batch, context + 1)


@dataclass(frozen=True)
class Row:
    """One program to time, and what it is compared with.

    Args:
      build: (setting) -> a function (carry, tokens) -> (carry, something to wait for), whose carry
        is donated, and the first carry.
      reference: Name of the row that it is compared with.
      times: How many of these would be as long without draws and updates.
      at_most: Largest ratio to them that is promised, by platform.
    """

    build: Callable[[Setting], tuple[Callable[..., Any], Any]]
    reference: str = _EVALUATION
    times: int = 1
    at_most: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _evaluation(setting: Setting) -> tuple[Callable[..., Any], Any]:
    loss = language_model_loss(setting.config)

    def evaluate(params: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        # Parameters come back, or donating them would be of no use.
        return params, loss(params, {"tokens": tokens}, jax.random.key(0))[0]

    return evaluate, jax.tree.map(jnp.copy, setting.params)


def _step(build: Callable[..., optax.GradientTransformation], sampler: zo.Sampler, **probes: Any):
    """The row of a method: its step on the loss, unguarded."""

    def row(setting: Setting) -> tuple[Callable[..., Any], Any]:
        axes = models.matrix_axes(setting.config)
        options = zo.Probes(sampler, matrix_axes=axes, **probes)
        tx = build(key=jax.random.key(_KEY_SEED), probes=options)
        step = Step(language_model_loss(setting.config), tx, forward_only(), guarded=False)

        def take(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
            state, metrics = step.take(state, {"tokens": tokens})
            return state, metrics["loss"]

        # Compiled, or counters that start alike would be one array, which cannot be donated.
        start = jax.jit(step.start)
        return take, start(setting.params, jax.random.key(_KEY_SEED))

    return row


def _draw(sampler: zo.Sampler) -> Callable[[Setting], tuple[Callable[..., Any], Any]]:
    """The row of adding one direction to all parameters."""

    def row(setting: Setting) -> tuple[Callable[..., Any], Any]:
        divided = leaves_of(setting.params, models.matrix_axes(setting.config))

        def add(carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
            del tokens
            count, params = carry
            leaves, treedef = jax.tree.flatten(params)
            key = jax.random.fold_in(jax.random.key(_KEY_SEED), count)
            direction = Direction(sampler, key, 0, divided)
            moved = [x + _RATE * direction.of(i) for i, x in enumerate(leaves)]
            return (count + 1, treedef.unflatten(moved)), count

        return add, (jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, setting.params))

    return row


def _mezo(**options: Any) -> optax.GradientTransformation:
    return zo.mezo(_RATE, **options)


def _ldsd(**options: Any) -> optax.GradientTransformation:
    return zo.ldsd(optax.sgd(_RATE), candidates=_CANDIDATES, **options)


_MANY = {"num_directions": _DIRECTIONS}
ROWS: dict[str, Row] = {
    _EVALUATION: Row(_evaluation),
    "draw normals": Row(_draw(zo.gaussian())),
    "draw signs": Row(
        _draw(zo.signs()), "draw normals", at_most={"cpu": 0.5, "gpu": 0.5, "tpu": 0.5}
    ),
    "MeZO, signs": Row(_step(_mezo, zo.signs()), times=2, at_most={"gpu": 1.10}),
    "MeZO, normals": Row(_step(_mezo, zo.gaussian()), times=2, at_most={"gpu": 1.25}),
    f"LDSD of {_CANDIDATES}, signs": Row(
        _step(_ldsd, zo.signs()), times=_CANDIDATES + 1, at_most={"gpu": 1.20}
    ),
    f"LDSD of {_CANDIDATES}, normals": Row(
        _step(_ldsd, zo.gaussian()), times=_CANDIDATES + 1, at_most={"gpu": 1.40}
    ),
    f"{_DIRECTIONS} directions, sequential": Row(
        _step(_mezo, zo.signs(), **_MANY), times=2 * _DIRECTIONS
    ),
    f"{_DIRECTIONS} directions, vmapped": Row(
        _step(_mezo, zo.signs(), engine=zo.vmapped(), **_MANY), times=2 * _DIRECTIONS
    ),
}
"""What is timed, by name. A row is compared with one above it."""


@dataclass(frozen=True)
class ZerothOrderRow:
    """One program; times in milliseconds."""

    name: str
    ms: float
    """Median over rounds of one call."""
    reference: str
    times: int
    ratio: float
    """Median over rounds of the ratio to `times` of the reference in the same round."""
    at_most: float | None
    """What is promised on this platform at the full size; None: nothing."""
    temp_bytes: int | None

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None without one."""
        return None if self.at_most is None else self.ratio <= self.at_most


@dataclass(frozen=True)
class ZerothOrderReport:
    """Result of `run_zeroth_order`."""

    model: str
    parameters: int
    batch: int
    context: int
    compute_dtype: str
    loop: str
    """That of the two in which an evaluation is faster."""
    device: str
    versions: dict[str, str]
    repeats: int
    compile_seconds: float
    rows: tuple[ZerothOrderRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        rows = [dataclasses.asdict(row) | {"holds": row.holds} for row in self.rows]
        return dataclasses.asdict(self) | {"rows": rows}

    def __str__(self) -> str:
        """A table with the conditions above it."""
        headers = ["", "ms", "against", "ratio", "at most", "holds", "temp MB"]
        cells = [
            [
                row.name, row.ms, f"{row.times} x {row.reference}", f"{row.ratio:.3f}",
                row.at_most, row.holds,
                None if row.temp_bytes is None else round(row.temp_bytes / 1e6, 1),
            ]
            for row in self.rows
        ]  # fmt: skip
        return (
            f"{self.model}: {self.parameters:,} parameters, {self.batch} x {self.context} tokens, "
            f"{self.compute_dtype}, layers {self.loop}, on {self.device}, jax "
            f"{self.versions['jax']}\nmedians of {self.repeats} interleaved rounds, compiled in "
            f"{self.compile_seconds:.0f} s\n\n{format_table(headers, cells)}"
        )


def run_zeroth_order(
    model: str | None = None,
    *,
    batch: int | None = None,
    context: int | None = None,
    compute_dtype: str | None = None,
    rows: Sequence[str] | None = None,
    repeats: int = 7,
    seconds_per_round: float = 0.3,
    on_progress: Callable[[str], None] = lambda text: None,
) -> ZerothOrderReport:
    """Times evaluations, draws and whole zero-order steps, all in turn within each round.

    Args:
      model: Named decoder; None: gpt2-124m, on a CPU tiny.
      batch: Sequences; None: 16, on a CPU 4.
      context: Tokens of a sequence; None: 512, on a CPU 128.
      compute_dtype: Of activations and products; None: bfloat16, on a CPU float32.
      rows: Names among `ROWS`, the rows that they are compared with included anyway; None: all.
      repeats: Rounds; medians are taken over them.
      seconds_per_round: Aimed duration of one row's sample in a round.
      on_progress: Called with a line of text before each stage.

    Raises:
      ValueError: For an unknown model or row, or no rounds.
    """
    on_cpu = jax.default_backend() == "cpu"
    model = model or ("tiny" if on_cpu else "gpt2-124m")
    if model not in models.PRESETS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(models.PRESETS)}")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, wanted at least 1")
    chosen = _chosen(rows)
    config = dataclasses.replace(
        models.PRESETS[model],
        context=context or (128 if on_cpu else 512),
        compute_dtype=compute_dtype or ("float32" if on_cpu else "bfloat16"),
    )
    batch = batch or (4 if on_cpu else 16)
    params = models.init_params(config, jax.random.key(0))
    shape = (batch, config.context + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    start = time.perf_counter()
    on_progress("compiling an evaluation, layers unrolled and scanned")
    settings = [
        Setting(dataclasses.replace(config, loop=loop), params, tokens)
        for loop in ("unrolled", "scanned")
    ]
    both = _timers([(ROWS[_EVALUATION], setting) for setting in settings])
    interleave_calls(both, 3, seconds_per_round)
    faster = int(np.argmin([np.median(timer.seconds) for timer in both]))
    on_progress(f"compiling {len(chosen) - 1} rows, layers {settings[faster].config.loop}")
    rest = [name for name in chosen if name != _EVALUATION]
    timers = {_EVALUATION: both[faster]}
    timers |= dict(zip(rest, _timers([(ROWS[n], settings[faster]) for n in rest]), strict=True))
    compile_seconds = time.perf_counter() - start
    on_progress("timing")
    interleave_calls(list(timers.values()), repeats, seconds_per_round)
    return ZerothOrderReport(
        model=model,
        parameters=models.parameter_count(config),
        batch=batch,
        context=config.context,
        compute_dtype=config.compute_dtype,
        loop=settings[faster].config.loop,
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "flax", "jaxopt-lab"),
        repeats=repeats,
        compile_seconds=compile_seconds,
        rows=tuple(_row(name, timers) for name in chosen),
    )


def _chosen(rows: Sequence[str] | None) -> list[str]:
    """The rows and what they are compared with, in the order of the table."""
    wanted = set(ROWS if rows is None else rows) | {_EVALUATION}
    if unknown := wanted - set(ROWS):
        raise ValueError(f"rows: {sorted(unknown)} not among {'; '.join(ROWS)}")
    wanted |= {ROWS[name].reference for name in wanted}
    return [name for name in ROWS if name in wanted]


def _timers(rows: Sequence[tuple[Row, Setting]]) -> list[CallTimer]:
    built = [(*row.build(setting), setting.tokens) for row, setting in rows]
    return call_timers([(program, carry, (tokens,)) for program, carry, tokens in built])


def _row(name: str, timers: Mapping[str, CallTimer]) -> ZerothOrderRow:
    row, timer = ROWS[name], timers[name]
    reference = row.times * np.asarray(timers[row.reference].seconds)
    return ZerothOrderRow(
        name=name,
        ms=1e3 * float(np.median(timer.seconds)),
        reference=row.reference,
        times=row.times,
        ratio=float(np.median(np.asarray(timer.seconds) / reference)),
        at_most=row.at_most.get(jax.default_backend()),
        temp_bytes=program_bytes(timer.program)["temp"],
    )
