"""Peak memory of training steps against what they have to hold; nothing is run.

`python -m tests.bench.training_memory` prints the table of `docs/performance.md`, for a CPU.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax._src.ad_checkpoint import saved_residuals  # what `print_saved_residuals` prints

from jaxopt_lab import models
from jaxopt_lab.bench.floors import tree_bytes
from jaxopt_lab.bench.timing import program_bytes
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.step import Step
from jaxopt_lab.tasks import language_model_loss
from tests.quick_compile import OPTIONS

BATCH = 8
# By default XLA starts on a CPU what can start, whatever it has to keep for it.
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class TrainingBytes(NamedTuple):
    """Bytes of one training step with AdamW."""

    state: int
    """Parameters and moments."""
    gradients: int
    residuals: int
    """What the forward pass saves for the backward pass, beside parameters."""
    recomputed: int
    """What the backward pass of one layer computes again, and then has to hold."""
    peak: int

    @property
    def held(self) -> int:
        """The sum that the peak is compared with."""
        return self.state + self.gradients + self.residuals

    @property
    def ratio(self) -> float:
        """Peak over the sum."""
        return self.peak / self.held

    @property
    def ratio_with_layer(self) -> float:
        """Peak over the sum and the layer that is computed again."""
        return self.peak / (self.held + self.recomputed)


def decoder(model: str, loop: Any, remat: Any) -> models.DecoderConfig:
    """A preset that runs its layers in this loop."""
    return dataclasses.replace(models.PRESETS[model], loop=loop, remat=remat)


def training_bytes(
    config: models.DecoderConfig,
    *,
    head_chunks: int = 1,
    donate: bool = True,
    scheduler: Mapping[str, Any] = LEAST_MEMORY,
) -> TrainingBytes:
    """Compiles a training step, and lists what its loss saves.

    Args:
      config: Of the decoder.
      head_chunks: Pieces into which the positions are cut for the head.
      donate: Whether the new state takes the place of the old one.
      scheduler: Compiler options of the CPU.
    """
    step = Step(language_model_loss(config, head_chunks=head_chunks), optax.adamw(1e-3))
    params = models.abstract_params(config)
    state = jax.eval_shape(step.start, params, jax.eval_shape(lambda: jax.random.key(0)))
    batch = {"tokens": jax.ShapeDtypeStruct((BATCH, config.context + 1), jnp.int32)}
    take = jax.jit(step.take, donate_argnums=(0,) if donate else ())
    # How fast it would run does not matter, and its buffers do not depend on it.
    compiled = take.lower(state, batch).compile(compiler_options=OPTIONS | dict(scheduler))
    peak = program_bytes(compiled)["peak"]
    assert peak is not None
    residuals = residual_bytes(config, head_chunks)
    everything = residual_bytes(dataclasses.replace(config, remat="none"), head_chunks)
    recomputed = (everything - residuals) // config.depth
    return TrainingBytes(tree_bytes(state), tree_bytes(params), residuals, recomputed, peak)


def residual_bytes(config: models.DecoderConfig, head_chunks: int) -> int:
    """Bytes of what the loss saves for its gradient, without arguments: those are parameters."""
    loss = language_model_loss(config, head_chunks=head_chunks)
    batch = {"tokens": jnp.zeros((BATCH, config.context + 1), jnp.int32)}
    saved = saved_residuals(
        lambda params: loss(params, batch, jax.random.key(0))[0], models.abstract_params(config)
    )
    return tree_bytes([array for array, source in saved if "argument" not in source])


def main() -> None:
    """A table of two models, both loops, heads and every choice of what is recomputed."""
    rows = []
    choices = [("scanned", 1), ("scanned", 8), ("unrolled", 1)], ("none", "dots", "full")
    for model, ((loop, chunks), remat) in itertools.product(
        ("gpt2-124m", "llama-124m"), itertools.product(*choices)
    ):
        config = decoder(model, loop, remat)
        usual, least = (
            training_bytes(config, head_chunks=chunks, scheduler=scheduler)
            for scheduler in ({}, LEAST_MEMORY)
        )
        sizes = (usual.residuals, usual.held, usual.recomputed)
        ratios = usual.ratio, usual.ratio_with_layer, least.ratio, least.ratio_with_layer
        cells = [*(f"{x / 1e9:.2f}" for x in sizes), *(f"{x:.2f}" for x in ratios)]
        rows.append([model, loop, chunks, remat, *cells])
    headers = ["model", "loop", "head chunks", "remat", "residuals GB", "sum GB", "layer GB"]
    headers += ["peak / sum", "with layer", "least memory", "with layer"]
    print(f"jax {jax.__version__}\n\n{format_table(headers, rows)}")


if __name__ == "__main__":
    main()
