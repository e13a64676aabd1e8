"""Steps of fine-tuning beside one another: full, adapters, a packed base, LoRSum."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import lora, models
from jaxopt_lab.bench.adapter_memory import MINILM
from jaxopt_lab.bench.conditions import device_name, versions
from jaxopt_lab.bench.timing import CallTimer, call_timers, interleave_calls, program_bytes
from jaxopt_lab.core.packed import BLOCK, Packed
from jaxopt_lab.models import encoder
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.step import Adapted, Step
from jaxopt_lab.tasks import classification_loss, encoder_logits, language_model_loss

SMOLLM2 = models.DecoderConfig(
    vocab_size=49_152,
    width=576,
    depth=30,
    heads=9,
    kv_heads=3,
    hidden=1536,
    context=512,
    rope_base=100_000.0,
    norm_eps=1e-5,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
)
PARTS = ("decoder", "encoder")
_RANK = 8
_CLIP = 1.0
_ADAMW = optax.adamw(1e-4, weight_decay=0.0)


@dataclass(frozen=True)
class Shape:
    """Of the models and their batches."""

    decoder: models.DecoderConfig = SMOLLM2
    decoder_batch: tuple[int, int] = (16, 512)
    """Rows, tokens."""
    encoder: models.EncoderConfig = MINILM
    encoder_batch: tuple[int, int] = (32, 48)


@dataclass(frozen=True)
class Way:
    """One way to fine-tune."""

    build: Callable[[Shape], tuple[Callable[..., Any], Any, Sequence[Any]]]
    """The step (carry, *given) -> (carry, loss), its first carry, and what else it is given."""
    at_most: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What is promised of the ratio to the first row, by platform, at the full size."""


def _full(**changes: Any) -> Callable[[Shape], Any]:
    def build(shape: Shape) -> Any:
        config = replace(shape.decoder, **changes)
        params = models.init_params(config, jax.random.key(0))
        tx = optax.adamw(1e-5, weight_decay=0.0)
        step = Step(language_model_loss(config), tx, clip=_CLIP, guarded=False)
        return _timed(step, params, _text(config, shape.decoder_batch))

    return build


def _beside_decoder(
    target: lora.LoraConfig, packed: bool = False, **changes: Any
) -> Callable[[Shape], Any]:
    def build(shape: Shape) -> Any:
        config = replace(shape.decoder, **changes)
        params = models.init_params(config, jax.random.key(0))
        names, axes = models.matrix_names(config), models.matrix_axes(config)
        spec = lora.resolve(target, params, axes, names)
        base = random_packed(params, jax.random.key(3)) if packed else params
        loss = lora.loss_beside(language_model_loss(config), spec)
        step = Step(loss, _ADAMW, clip=_CLIP, guarded=False)
        return _timed(step, _adapted(base, spec), _text(config, shape.decoder_batch))

    return build


def _beside_encoder(tx: Any, **how: Any) -> Callable[[Shape], Any]:
    def build(shape: Shape) -> Any:
        config, (rows, tokens) = shape.encoder, shape.encoder_batch
        params = encoder.init_params(config, jax.random.key(0))
        wanted = lora.LoraConfig(rank=_RANK, alpha=_RANK, target=("qkv",))
        spec = lora.resolve(wanted, params, models.matrix_axes(config))
        of_model = classification_loss(encoder_logits(config), dropout=False)
        # Those of low-rank sums clip by themselves.
        options = how or {"gradient": lora.with_taps(spec)}
        step = Step(lora.loss_beside(of_model, spec), tx, guarded=False, **options)
        drawn = jax.random.randint(jax.random.key(1), (rows, tokens), 0, config.vocab_size)
        mask = jnp.arange(tokens) < tokens - 4 * (jnp.arange(rows)[:, None] % 4)
        batch = {"tokens": drawn, "mask": mask, "label": jnp.arange(rows) % 2}
        return _timed(step, _adapted(params, spec), batch)

    return build


def _adapted(base: Any, spec: lora.LoraSpec) -> Adapted:
    return Adapted(base, jax.jit(lambda key: lora.init(key, spec, base))(jax.random.key(2)))


def _timed(step: Step, params: Any, batch: Any) -> Any:
    """A program and what it is given; what is frozen is no part of the carry, which is donated."""
    state = jax.jit(step.start)(params, jax.random.key(4))

    def program(state: Any, frozen: Any, batch: Any) -> Any:
        state, metrics = step.take(state._replace(frozen=frozen), batch)
        return state._replace(frozen=()), metrics["loss"]

    return program, state._replace(frozen=()), (state.frozen, batch)


def _text(config: models.DecoderConfig, batch: tuple[int, int]) -> dict[str, jax.Array]:
    shape = (batch[0], batch[1] + 1)
    return {"tokens": jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)}


def random_packed(params: Any, key: jax.Array) -> Any:
    """Random blocks as a Q4_1 file has them: kernels of the layers Q4_1, the token table Q8_0.

    Args:
      params: Of a decoder; read for shapes and dtypes alone.
      key: Of the codes.
    """

    def pack(x: Any, axis: int, codes: Any, scale: float, minimum: float | None) -> Packed:
        shape = list(x.shape)
        blocks = (*shape[: x.ndim + axis], *shape[x.ndim + axis + 1 :], x.shape[axis] // BLOCK)
        width = BLOCK if minimum is None else BLOCK // 2
        drawn = jax.random.randint(key, (*blocks, width), *codes).astype(codes[2])
        filled = [None if v is None else jnp.full(blocks, v, jnp.float16) for v in (scale, minimum)]
        return Packed(drawn, filled[0], filled[1], axis=axis, dtype=x.dtype)

    def leaf(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            return pack(x, 1 - x.ndim, (0, 256, jnp.uint8), 4e-3, -3e-2)
        if "tokens" in name:
            return pack(x, -1, (-127, 128, jnp.int8), 2e-4, None)
        return x

    return jax.tree_util.tree_map_with_path(leaf, params)


_TWO = lora.LoraConfig(rank=_RANK, target=("q_proj", "v_proj"))
_ALL = lora.LoraConfig(rank=_RANK)
# A packed base scans its layers, as `models.load_gguf` has it.
_DECODER = {
    "full, AdamW": Way(_full()),
    "full, AdamW, float32 parameters": Way(_full(param_dtype="float32")),
    "q and v, AdamW": Way(_beside_decoder(_TWO), {"gpu": 0.80}),
    "all linear, AdamW": Way(_beside_decoder(_ALL)),
    "all linear, AdamW, scanned": Way(_beside_decoder(_ALL, loop="scanned")),
    "q and v, AdamW, packed": Way(_beside_decoder(_TWO, packed=True, loop="scanned")),
    "all linear, AdamW, packed": Way(_beside_decoder(_ALL, packed=True, loop="scanned")),
}
_ENCODER = {
    "AdamW": Way(_beside_encoder(_ADAMW, clip=_CLIP)),
    "scaled LoRSum": Way(
        _beside_encoder(lora.scaled_lorsum(0.2, clip=_CLIP)), {"gpu": 1.5, "cpu": 1.4}
    ),
    "scaled LoRSum, no clip": Way(_beside_encoder(lora.scaled_lorsum(0.2, clip=None))),
    "scaled LoRSum, no momentum": Way(
        _beside_encoder(lora.scaled_lorsum(0.2, b1=None, clip=_CLIP))
    ),
    "LoRSum": Way(_beside_encoder(lora.lorsum(1e-2, momentum=0.9, clip=_CLIP))),
}
WAYS: dict[str, dict[str, Way]] = {"decoder": _DECODER, "encoder": _ENCODER}
"""What is timed, by part and name. Every row is compared with the first of its part."""


@dataclass(frozen=True)
class FineTuningRow:
    """One way to fine-tune."""

    part: str
    name: str
    ms: float
    """Median over rounds of a step."""
    ratio: float
    """To the first row of the part; both medians of interleaved rounds."""
    at_most: float | None
    """What is promised of the ratio; None: nothing."""
    gflop: float | None
    """Of a step as the compiler counts them, which takes the body of a scan once."""
    temp_bytes: int | None
    peak_bytes: int | None

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None without one."""
        return None if self.at_most is None else self.ratio <= self.at_most


@dataclass(frozen=True)
class FineTuningReport:
    """Result of `run_fine_tuning`."""

    decoder_batch: tuple[int, int]
    encoder_batch: tuple[int, int]
    device: str
    versions: dict[str, str]
    rounds: int
    compile_seconds: float
    rows: tuple[FineTuningRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        rows = [dataclasses.asdict(row) | {"holds": row.holds} for row in self.rows]
        return dataclasses.asdict(self) | {"rows": rows}

    def __str__(self) -> str:
        """A table with the conditions above it."""
        headers = ["", "step", "ms", "ratio", "at most", "holds", "GFLOP", "temp MiB", "peak MiB"]
        cells = [
            [
                row.part, row.name, row.ms, f"{row.ratio:.3f}", row.at_most, row.holds, row.gflop,
                *(None if n is None else round(n / 2**20) for n in (row.temp_bytes, row.peak_bytes))
            ]
            for row in self.rows
        ]  # fmt: skip
        sizes = ["{} x {}".format(*batch) for batch in (self.decoder_batch, self.encoder_batch)]
        return (
            f"decoder {sizes[0]} tokens, encoder {sizes[1]}, on {self.device}, jax "
            f"{self.versions['jax']}\nmedians of {self.rounds} interleaved rounds, compiled in "
            f"{self.compile_seconds:.0f} s\n\n{format_table(headers, cells)}"
        )


def run_fine_tuning(
    parts: Sequence[str] | None = None,
    *,
    rounds: int = 11,
    seconds_per_round: float = 0.3,
    shape: Shape = Shape(),
    on_progress: Callable[[str], None] = lambda text: None,
) -> FineTuningReport:
    """Times whole steps of fine-tuning on random weights and tokens, in turn within each round.

    The decoder has the shape of SmolLM2-135M, the encoder that of MiniLM with adapters of rank 8
    beside queries, keys and values. All gradients are clipped to norm 1.

    Args:
      parts: Among `PARTS`; None: both, on a CPU the encoder alone.
      rounds: Samples of each row; medians are taken over them.
      seconds_per_round: Aimed duration of one row's sample.
      shape: Of models and batches.
      on_progress: Called with a line of text before each stage.

    Raises:
      ValueError: For an unknown part, or no rounds.
    """
    if parts is None:
        parts = PARTS[1:] if jax.default_backend() == "cpu" else PARTS
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"parts: {sorted(unknown)} not among {', '.join(PARTS)}")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, wanted at least 1")
    compile_seconds, rows = 0.0, []
    for part in parts:
        start = time.perf_counter()
        on_progress(f"{part}: compiling {len(WAYS[part])} steps")
        timers = call_timers([way.build(shape) for way in WAYS[part].values()])
        compile_seconds += time.perf_counter() - start
        on_progress(f"{part}: timing")
        interleave_calls(timers, rounds, seconds_per_round)
        rows += _rows(part, timers)
    return FineTuningReport(
        decoder_batch=shape.decoder_batch,
        encoder_batch=shape.encoder_batch,
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "flax", "jaxopt-lab"),
        rounds=rounds,
        compile_seconds=compile_seconds,
        rows=tuple(rows),
    )


def _rows(part: str, timers: Sequence[CallTimer]) -> list[FineTuningRow]:
    first, rows = float(np.median(timers[0].seconds)), []
    for (name, way), timer in zip(WAYS[part].items(), timers, strict=True):
        seconds, size = float(np.median(timer.seconds)), program_bytes(timer.program)
        flops = (timer.program.cost_analysis() or {}).get("flops")
        rows.append(
            FineTuningRow(
                part=part,
                name=name,
                ms=1e3 * seconds,
                ratio=seconds / first,
                at_most=way.at_most.get(jax.default_backend()),
                gflop=None if flops is None else flops / 1e9,
                temp_bytes=size["temp"],
                peak_bytes=size["peak"],
            )
        )
    return rows
