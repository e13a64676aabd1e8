"""Whether the machine can train a configuration at all: kernels, precisions and memory."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxopt_lab.models import abstract_params, parameter_count
from jaxopt_lab.models.config import check_dtypes
from jaxopt_lab.report.files import open_gguf
from jaxopt_lab.train.config.finetune import FinetuneConfig, gguf_file, model_directory
from jaxopt_lab.train.config.optimizers_zeroth_order import ZerothOrderConfig
from jaxopt_lab.train.config.run import PretrainConfig, RunConfig
from jaxopt_lab.train.config.trainable import FullConfig
from jaxopt_lab.train.errors import ConfigError, within
from jaxopt_lab.train.trainable import frozen_in

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LARGEST_DEVICE = 2**40  # a TiB, more than any has; the compiler fails at sizes not far above
_SIZES = ("vocab_size", "width", "depth", "hidden_width", "context")


def check_machine(config: RunConfig) -> None:
    """Refuses kernels and precisions that are not there.

    Raises:
      ConfigError: Names the setting and what there is.
    """
    with within("model"):
        check_dtypes(config.model)
    platform = jax.default_backend()
    if config.model.attention == "cudnn" and platform != "gpu":
        raise ConfigError("model.attention", "cudnn", f"expected auto or xla on a {platform}")


def check_memory(
    config: RunConfig,
    sizes: tuple[int, int, int] = (1, 1, 1),
    accumulation: int = 1,
    *,
    dry_run: bool = False,
) -> str | None:
    """Refuses arrays larger than the memory, by arithmetic alone: nothing is allocated or compiled.

    Args:
      config: The run.
      sizes: Of the axes data, fsdp and tensor of the mesh.
      accumulation: Microbatches of a step.
      dry_run: It will only be compiled, for another machine perhaps: what a larger device could
        hold is not refused.

    Returns:
      What is not refused, in a sentence.

    Raises:
      ConfigError: Names the setting that is the largest multiple of the preset's own.
    """
    data, fsdp, tensor = sizes
    rows = config.batch_size // (accumulation * data * fsdp)
    needed, available = smallest_bytes(config, rows, fsdp * tensor), memory_bytes()
    if available is None or sum(needed.values()) <= available:
        return None
    usual_model, _ = config.named_model(config.preset)
    grown = {"batch_size": (config.batch_size, RunConfig.batch_size)}
    for size in _SIZES:
        sizes_of = (getattr(model, size) for model in (config.model, usual_model))
        grown[f"model.{size.removesuffix('_width')}"] = tuple(sizes_of)
    name = max(grown, key=lambda name: grown[name][0] / grown[name][1])
    value, usual = grown[name]
    if value <= usual:
        name, value = "model", config.preset
    parts = " and ".join(f"{_text(size)} for {what}" for what, size in needed.items())
    wanted = f"expected less: a device needs at least {parts}, and has {_text(available)}"
    shortage = ConfigError(name, value, wanted)
    if dry_run and sum(needed.values()) <= _LARGEST_DEVICE:
        return f"this machine could not train it: {shortage}"
    raise shortage


def smallest_bytes(config: RunConfig, rows: int, parts: int) -> dict[str, int]:
    """What a training step holds at least, on one device.

    Every parameter, and its gradient where all parameters move by one; of the activations, the
    tokens, the residual stream of one layer, and the logits of a chunk of the head. The optimizer's
    state, adapters, a head's gradient and all that the backward pass keeps come on top.

    Args:
      config: The run.
      rows: Windows that one device holds at a time.
      parts: Devices that share parameters and logits.
    """
    model = config.model
    computed = jnp.dtype(model.compute_dtype).itemsize
    tokens = rows * config.row_tokens
    logits = config.row_logits * rows * computed // config.head_chunks // parts
    return {
        "weights": _weight_bytes(config) // parts,
        "activations": tokens * (4 + model.width * computed) + logits,
    }


def _weight_bytes(config: RunConfig) -> int:
    """Of parameters as they are held, and of the gradient of all of them if there is one."""
    stored = jnp.dtype(config.model.param_dtype).itemsize * parameter_count(config.model)
    if isinstance(config, FinetuneConfig) and not isinstance(config.trainable, FullConfig):
        if config.packed:
            file = gguf_file(model_directory("model", config.preset))
            assert file is not None
            return sum(int(tensor.n_bytes) for tensor in open_gguf(file).tensors)
        if not config.trainable.adapters:
            return stored
        as_held = functools.partial(frozen_in, config.model.compute_dtype)
        leaves = jax.tree.leaves(jax.eval_shape(as_held, abstract_params(config.model)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    forward_only = isinstance(config, PretrainConfig) and isinstance(
        config.optimizer, ZerothOrderConfig
    )
    return stored if forward_only else 2 * stored


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


def _text(size: int) -> str:
    return f"{size:,} bytes" if size < 2**20 else f"{size / 2**30:,.1f} GiB ({size:,} bytes)"
