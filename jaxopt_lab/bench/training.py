"""Times training steps of a named decoder on random tokens, on one device."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from jaxopt_lab import models
from jaxopt_lab.bench.conditions import Report, device_name, versions
from jaxopt_lab.bench.floors import CeilingProbe, Ceilings
from jaxopt_lab.bench.methods import DECAY, RATE, method
from jaxopt_lab.bench.timing import (
    CompiledStep,
    OptimizerTimer,
    program_bytes,
    random_gradients,
)
from jaxopt_lab.bench.torch_training import TorchTrainer, peer_for
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.step import Step, TrainState, compiler_options
from jaxopt_lab.tasks import language_model_loss

_ROUNDS = 5


@dataclass(frozen=True)
class PeerReport:
    """What PyTorch needs for a step of the same model with AdamW."""

    version: str
    loss: float
    """Of the parameters that ours starts from, as a check of what is compared."""
    step_ms: float
    tokens_per_second: float
    compile_s: float
    peak_bytes: int | None


@dataclass(frozen=True)
class TrainingReport(Report):
    """Result of `run_training`."""

    model: str
    optimizer: str
    device: str
    versions: dict[str, str]
    batch: int
    context: int
    compute_dtype: str
    loop: str
    parameters: int
    step_ms: float
    """Median over rounds; whole periods of the optimizer."""
    tokens_per_second: float
    mfu: float
    """6 N + 12 L d T FLOPs per token over the measured bf16 product rate."""
    mfu_of_peak: float | None
    """The same over the peak rate that was given."""
    optimizer_ms: float
    """Its step alone, timed apart."""
    optimizer_share: float
    compile_s: float
    temp_bytes: int | None
    peak_bytes: int | None
    ceilings: Ceilings
    loss: float
    """Of the first step."""
    peer: PeerReport | None = None
    """PyTorch in the same rounds."""

    def __str__(self) -> str:
        """A table with the conditions above it."""
        row = {
            "ms/step": self.step_ms,
            "tokens/s": f"{self.tokens_per_second:,.0f}",
            "MFU": f"{self.mfu:.1%}",
            "of peak": "-" if self.mfu_of_peak is None else f"{self.mfu_of_peak:.1%}",
            "optimizer ms": self.optimizer_ms,
            "share": f"{self.optimizer_share:.1%}",
            "temp GiB": _gib(self.temp_bytes),
            "peak GiB": _gib(self.peak_bytes),
            "compile s": round(self.compile_s, 1),
        }
        table = format_table(list(row), [list(row.values())])
        return (
            f"{self.model}: {self.parameters:,} parameters, {self.optimizer}, "
            f"{self.batch} x {self.context} tokens, {self.compute_dtype}, layers {self.loop}, "
            f"on {self.device}, jax {self.versions['jax']}\n"
            f"bf16 product {self.ceilings.flops_per_second / 1e12:,.3g} TFLOP/s\n\n{table}"
            + ("" if self.peer is None else f"\n\n{self._beside(self.peer)}")
        )

    def _beside(self, peer: PeerReport) -> str:
        """A table of ours and PyTorch's."""
        rows = [
            [f"jaxopt-lab, {self.optimizer}", *_columns(self), f"{self.loss:.4f}"],
            [f"PyTorch {peer.version}, adamw", *_columns(peer), f"{peer.loss:.4f}"],
        ]
        header = ["", "ms/step", "tokens/s", "peak GiB", "compile s", "first loss"]
        ratio = self.tokens_per_second / peer.tokens_per_second
        return f"{format_table(header, rows)}\n\n{ratio:.3f} x the tokens/s of PyTorch"


def _columns(report: TrainingReport | PeerReport) -> list[Any]:
    tokens = f"{report.tokens_per_second:,.0f}"
    return [report.step_ms, tokens, _gib(report.peak_bytes), round(report.compile_s, 1)]


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def run_training(
    model: str = "gpt2-124m",
    *,
    optimizer: str = "lion_muon_p2",
    batch: int = 32,
    context: int | None = None,
    steps: int = 20,
    compute_dtype: str | None = None,
    loop: str = "unrolled",
    remat: str = "none",
    head_chunks: int = 1,
    peak_tflops: float | None = None,
    peers: Sequence[str] = (),
    on_progress: Callable[[str], None] = lambda text: None,
) -> TrainingReport:
    """Times forward, backward and update in one compiled program with donated state.

    Args:
      model: Named decoder.
      optimizer: Name as `bench.methods.method` knows it.
      batch: Sequences a step.
      context: Tokens a sequence; the model's own by default.
      steps: Steps a round, rounded up to whole periods of the optimizer.
      compute_dtype: Of activations and products; bfloat16 by default, float32 on a CPU.
      loop: "unrolled" or "scanned" layers.
      remat: What the backward pass recomputes: "none", "full" or "dots".
      head_chunks: Pieces in which the head is evaluated.
      peak_tflops: Rate in the data sheet, to state the MFU against it as well.
      peers: ("torch",) times the step of PyTorch with AdamW in the same rounds, on the same
        parameters and tokens; torch must be installed.
      on_progress: Called with a line of text before each stage.

    Raises:
      ValueError: For an unknown model, optimizer or peer or a setting that does not fit.
    """
    if set(peers) - {"torch"}:
        raise ValueError(f"peers: got {', '.join(peers)}; wanted torch or none")
    if model not in models.PRESETS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(models.PRESETS)}")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps, batch: got {steps}, {batch}; wanted at least 1")
    if compute_dtype is None:
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    preset = models.PRESETS[model]
    config = dataclasses.replace(
        preset,
        context=preset.context if context is None else context,
        compute_dtype=compute_dtype,
        loop=loop,
        remat=remat,
    )
    if peers:
        peer_for(config)
    chosen = method(optimizer)
    tx = chosen.build(models.matrix_axes(config))
    periods = -(-steps // chosen.period)
    on_progress("compiling")
    params = models.init_params(config, jax.random.key(0))
    tokens = jax.random.randint(
        jax.random.key(1), (batch, config.context + 1), 0, config.vocab_size
    )
    start = time.perf_counter()
    begin, program = _training_step(config, tx, head_chunks, params, tokens)
    compile_seconds = time.perf_counter() - start
    alone = CompiledStep(tx, params)
    peer = _Peer(config, params, tokens) if peers else None
    on_progress("timing")
    probe = CeilingProbe()
    optimizer_seconds = _time_optimizer(alone, chosen.period, params)
    seconds, loss = _time_training(program, begin(), tokens, periods * chosen.period, probe, peer)
    ceilings = probe.ceilings()
    tokens_per_second = batch * config.context / seconds
    flops_per_second = tokens_per_second * models.flops_per_token(config)
    return TrainingReport(
        model=model,
        optimizer=optimizer,
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "flax", "jaxopt-lab"),
        batch=batch,
        context=config.context,
        compute_dtype=config.compute_dtype,
        loop=config.loop,
        parameters=models.parameter_count(config),
        step_ms=1e3 * seconds,
        tokens_per_second=tokens_per_second,
        mfu=flops_per_second / ceilings.flops_per_second,
        mfu_of_peak=None if peak_tflops is None else flops_per_second / (peak_tflops * 1e12),
        optimizer_ms=1e3 * optimizer_seconds,
        optimizer_share=optimizer_seconds / seconds,
        compile_s=compile_seconds,
        temp_bytes=program_bytes(program)["temp"],
        peak_bytes=program_bytes(program)["peak"],
        ceilings=ceilings,
        loss=loss,
        peer=None if peer is None else peer.report(batch * config.context),
    )


def _training_step(
    config: models.DecoderConfig,
    tx: optax.GradientTransformation,
    head_chunks: int,
    params: Any,
    tokens: jax.Array,
) -> tuple[Callable[[], TrainState], Any]:
    """What makes the first state, and the compiled step: bare, as nothing is clipped or guarded."""
    step = Step(language_model_loss(config, head_chunks=head_chunks), tx, guarded=False)

    def take(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        state, metrics = step.take(state, {"tokens": tokens})
        return state, metrics["loss"]

    start = functools.partial(jax.jit(step.start), params, jax.random.key(0))
    abstract_state = jax.eval_shape(start)
    options = compiler_options(jax.default_backend())
    lowered = jax.jit(take, donate_argnums=0).lower(abstract_state, tokens)
    return start, lowered.compile(compiler_options=options)


class _Peer:
    """PyTorch's steps, and how long they took."""

    def __init__(self, config: models.DecoderConfig, params: Any, tokens: jax.Array):
        self._trainer = TorchTrainer(config, params, tokens, rate=RATE, decay=DECAY)
        self._loss = self._trainer.loss()
        self._compile_seconds = self._trainer.warm_up()
        self._seconds: list[float] = []

    def round(self, steps: int) -> None:
        self._seconds.append(self._trainer.run(steps))

    def report(self, tokens: int) -> PeerReport:
        seconds = _after_first(self._seconds)
        return PeerReport(
            version=self._trainer.torch.__version__,
            loss=self._loss,
            step_ms=1e3 * seconds,
            tokens_per_second=tokens / seconds,
            compile_s=self._compile_seconds,
            peak_bytes=self._trainer.peak_bytes(),
        )


def _time_training(
    program: Any,
    state: TrainState,
    tokens: jax.Array,
    steps: int,
    probe: CeilingProbe,
    peer: _Peer | None,
) -> tuple[float, float]:
    """Seconds a step, in the same rounds as the peer's, and the loss of the first step."""
    rounds, first_loss = [], None
    for _ in range(_ROUNDS + 1):
        probe.sample()
        start = time.perf_counter()
        for _ in range(steps):
            state, loss = program(state, tokens)
            first_loss = loss if first_loss is None else first_loss
        jax.block_until_ready((state, loss))
        rounds.append((time.perf_counter() - start) / steps)
        if peer is not None:
            peer.round(steps)
    assert first_loss is not None  # steps and rounds are at least 1
    return _after_first(rounds), float(first_loss)


def _after_first(rounds: Sequence[float]) -> float:
    """The median over rounds without the first, which is not warm."""
    return float(np.median(rounds[1:]))


def _time_optimizer(step: CompiledStep, period: int, params: Any) -> float:
    grads = random_gradients(params)
    copy = jax.tree.map(jax.numpy.copy, params)  # the step donates its parameters
    timer = OptimizerTimer(step, period, copy)
    copy = timer.warm_up(copy, grads, seconds_per_round=0.1)
    for _ in range(_ROUNDS):
        copy = timer.round(copy, grads)
    return float(np.median(timer.amortised))
