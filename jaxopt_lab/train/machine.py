"""Whether the machine can train a configuration at all: kernels, precisions and memory."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxopt_lab.models import DecoderConfig
from jaxopt_lab.models.config import check_dtypes
from jaxopt_lab.train.config import RunConfig
from jaxopt_lab.train.errors import ConfigError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_machine(
    config: RunConfig, sizes: tuple[int, int, int] = (1, 1, 1), accumulation: int = 1
) -> None:
    """Refuses what cannot run here, by arithmetic alone: nothing is allocated or compiled.

    Args:
      config: The run.
      sizes: Of the axes data, fsdp and tensor of the mesh.
      accumulation: Microbatches of a step.

    Raises:
      ConfigError: For an attention kernel or a precision that is not there, or arrays larger than
        the memory.
    """
    try:
        check_dtypes(config.model)
    except ValueError as error:
        raise ConfigError.inside("model", error) from error
    platform = jax.default_backend()
    if config.model.attention == "cudnn" and platform != "gpu":
        raise ConfigError("model.attention", "cudnn", f"expected auto or xla on a {platform}")
    data, fsdp, tensor = sizes
    rows = config.batch_size // (accumulation * data * fsdp)
    needed, available = smallest_bytes(config, rows, fsdp * tensor), memory_bytes()
    if available is not None and sum(needed.values()) > available:
        name, size = max(needed.items(), key=lambda item: item[1])
        raise ConfigError(
            name,
            _setting(config, name),
            f"expected less: a device needs at least {_text(sum(needed.values()))}, "
            f"{_text(size)} of them for this; it has {_text(available)}",
        )


def smallest_bytes(config: RunConfig, rows: int, parts: int) -> dict[str, int]:
    r"""What a training step holds at least, on one device, by the setting that is to blame.

    A parameter and its gradient are held for each of the $V d$ entries of the embedding, those of
    a position table and those of the layers' matrices; of the activations, the tokens, the residual
    stream of one layer, and the logits of a chunk of the head. The optimizer's state and all that
    the backward pass keeps come on top.

    Args:
      config: The run.
      rows: Windows that one device holds at a time.
      parts: Devices that share parameters and logits.
    """
    model = config.model
    stored, computed = (jnp.dtype(d).itemsize for d in (model.param_dtype, model.compute_dtype))
    tokens = rows * model.context
    stream = tokens * (4 + model.width * computed)
    logits = tokens * model.vocab_size * computed // config.head_chunks // parts
    lengths = {"model.context": model.context, "batch_size": rows}
    of_stream = max(lengths, key=lambda name: lengths[name])
    lengths["model.vocab_size"] = model.vocab_size
    of_logits = max(lengths, key=lambda name: lengths[name])
    weights = {
        "model.vocab_size": model.vocab_size * model.width,
        _largest_side(model): model.depth * model.width * _layer_columns(model),
    }
    if model.positions == "learned":
        weights["model.context"] = model.context * model.width
    needed = {name: 2 * stored * count // parts for name, count in weights.items()}
    for name, size in ((of_stream, stream), (of_logits, logits)):
        needed[name] = needed.get(name, 0) + size
    return needed


def memory_bytes() -> int | None:
    """Memory of a device; on a CPU that of the machine or of its container. None: not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return total


def _layer_columns(model: DecoderConfig) -> int:
    """Columns of all matrices of a layer when each has `width` rows."""
    of_attention = 2 * (model.width + model.num_kv_heads * model.head_width)
    return of_attention + (3 if model.mlp == "swiglu" else 2) * model.hidden_width


def _largest_side(model: DecoderConfig) -> str:
    """The setting that makes the layers large."""
    sides = {"width": model.width, "depth": model.depth}
    if model.hidden is not None:
        sides["hidden"] = model.hidden
    return "model." + max(sides, key=lambda name: sides[name])


def _setting(config: RunConfig, name: str) -> int:
    section, dot, field = name.partition(".")
    return getattr(getattr(config, section), field) if dot else getattr(config, name)


def _text(size: int) -> str:
    return f"{size:,} bytes" if size < 2**20 else f"{size / 2**30:,.1f} GiB ({size:,} bytes)"
