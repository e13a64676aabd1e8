"""The decays that a sidecar may name, as arguments of `adaptive_warmup`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tests.golden.harness import NotUnderstood

DECAY_OPTIONS = {"wsd_fract_decay", "wsd_final_lr_scale", "decay_type"}

_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
    "square": lambda x: 1 - x**2,
    "sqrt": lambda x: 1 - jnp.sqrt(x),
}


def decay_options(h: Mapping[str, Any]) -> dict[str, Any]:
    """`decay` and `final_div_factor`.

    The released one-cycle schedules, cosine and line, are one step ahead at the switch; the plateau
    with a decay at its end is not, and brings a floor of its own.
    """
    name, final = h.get("scheduler", "cos"), h.get("final_div_factor", 1e4)
    if name in ("cos", "cosine"):
        return {"decay": "cosine", "final_div_factor": final}
    if name == "linear":
        return {"decay": lambda n: lambda k: 1 - (k + 1) / n, "final_div_factor": final}
    if name != "wsd" or h.get("decay_type", "linear") not in _SHAPES:
        raise NotUnderstood(f"scheduler {name!r} with decay_type {h.get('decay_type')!r}")
    shape = _SHAPES[h.get("decay_type", "linear")]
    fraction, scale = h["wsd_fract_decay"], h["wsd_final_lr_scale"]

    def plateau_and_decay(n: jax.Array) -> Callable[[jax.Array], jax.Array]:
        steps = jnp.floor(fraction * n)
        return lambda k: (
            scale + (1 - scale) * shape(jnp.clip((k - (n - steps)) / jnp.maximum(steps, 1), 0, 1))
        )

    return {"decay": plateau_and_decay, "final_div_factor": math.inf}
