"""What compiled programs need, against stored values: `python -m tests.compiled_programs`.

Counts of the compiler, the same at every run on a machine of any speed: FLOPs, bytes that
operations read and write, scratch memory, and the arrays as large as all logits that are written.
Values depend on the version of JAX. With `--update` those of this version are stored; either way
what changed is shown.
"""

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # as the tests have it
    from tests.quick_compile import FLAGS

    os.environ.setdefault("XLA_FLAGS", FLAGS)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import models
from jaxopt_lab.bench import shapes
from jaxopt_lab.bench.methods import method
from jaxopt_lab.bench.timing import CompiledStep
from jaxopt_lab.step import Step

STORED = Path(__file__).with_suffix(".json")
TOLERANCE = 0.02  # of what changes with the kind of processor
ROWS = 8
CONFIG = models.DecoderConfig(vocab_size=1024, width=64, depth=2, heads=4, context=64)
OPTIMIZERS = ("adamw", "lion_muon_p2", "soap_f10", "dykaf_f10", "shampoo_f10")
# Outside of a fusion: the name and the shape of what is written.
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) .*\{$")
_WRITTEN = re.compile(r"^ *(?:ROOT )?%[\w.-]+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(")
_FREE = ("parameter", "bitcast", "get-tuple-element", "constant", "reshape")


def measured() -> dict[str, dict[str, float]]:
    """The quantities of all programs, by their names."""
    found = {"training step": _quantities(_training_step())}
    # Known by its name here alone.
    with mock.patch.dict(shapes.SHAPES, guarded=shapes.DecoderShape(256, 64, 2, 64)):
        params, axes = shapes.abstract_params("guarded"), shapes.matrix_axes("guarded")
    for name in OPTIMIZERS:
        step = CompiledStep(method(name).build(axes), params)
        found[f"update of {name}"] = _quantities(step.compiled)
    return found


def compared(found: dict[str, dict[str, float]], stored: dict[str, dict[str, float]]) -> list[str]:
    """A line for each quantity that is not as stored, those that grew marked."""
    lines = []
    for program, quantities in found.items():
        for name, value in quantities.items():
            before = stored.get(program, {}).get(name)
            if before is None or abs(value - before) > TOLERANCE * before:
                grew = before is None or value > before
                lines.append(f"{'!' if grew else ' '} {program}, {name}: {before} -> {value}")
    return lines


def stored() -> dict[str, dict[str, dict[str, float]]]:
    """The stored values by minor version of JAX."""
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def version() -> str:
    """The minor version of JAX."""
    return ".".join(jax.__version__.split(".")[:2])


def _training_step() -> jax.stages.Compiled:
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])

    def loss(params, batch, key):
        del key
        value, aux = models.loss(CONFIG, params, batch, mesh=mesh)
        return value, aux["tokens"], {}

    step = Step(loss, optax.adamw(1e-3), clip=0.5)
    state = jax.eval_shape(step.start, models.abstract_params(CONFIG), jax.random.key(0))
    batch = {"tokens": jax.ShapeDtypeStruct((ROWS, CONFIG.context + 1), jnp.int32)}
    return jax.jit(step.take, donate_argnums=0).lower(state, batch).compile()


def _quantities(compiled: Any) -> dict[str, float]:
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "FLOPs": costs["flops"],
        "bytes": costs["bytes accessed"],
        "scratch bytes": memory.temp_size_in_bytes,
        "arrays as large as the logits": _large_arrays(compiled.as_text()),
    }


def _large_arrays(text: str) -> int:
    least, inside, count = ROWS * CONFIG.context * CONFIG.vocab_size, "", 0
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            inside = begun[1]
        written = _WRITTEN.match(line)
        if written and "fused" not in inside and written[2] not in _FREE:
            count += math.prod(map(int, written[1].split(","))) >= least
    return count


def main(arguments: list[str]) -> int:
    """Compares or updates; 1 where something grew."""
    found, before = measured(), stored()
    lines = compared(found, before.get(version(), {}))
    print("\n".join(lines) or "as stored")  # noqa: T201
    if "--update" in arguments:
        STORED.write_text(json.dumps(before | {version(): found}, indent=1) + "\n")
        return 0
    return int(any(line.startswith("!") for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
