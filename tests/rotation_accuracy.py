"""Error of SOAP's and DyKAF's updates by the precision of their rotations.

    python -m tests.rotation_accuracy [--quick] [--json FILE]

Gradients are $Q \\operatorname{diag}(s) Z_t$ with one orthogonal $Q$, $s$ log-spaced from 1 to one
over the condition, and normal $Z_t$: 40 of them, 64 x 64, five seeds. The error is that of the last
update, in the Frobenius norm, relative to the same transform in float64; the table gives its mean
over the seeds. The control is what no rotation can mend: float32 with exact rotations, of
gradients that were rounded to bfloat16. The criterion for the default options is 1.3 times its
error in every cell.

On a GPU every precision is the real one. A CPU multiplies in float32 under all names but
"bfloat16", so there "tf32" rounds both operands to 10 bits of mantissa, "bf16_x3" multiplies
halves, "basis_split" splits the basis alone into two halves and rounds the other operand, and
"other_split" does it the other way round.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import lax

import jaxopt_lab as jol
from jaxopt_lab.core import precision as products

SIDE, STEPS, SEEDS = 64, 40, 5
CONDITIONS, FREQUENCIES = (1e2, 1e3, 1e4), (10, 1)
METHODS = {"soap": jol.scale_by_soap, "dykaf": jol.scale_by_dykaf}
WITHIN = 1.3
# Runs as the options say, and what a CPU emulates.
DEFAULT, CONTROL = "default options", "control"
EMULATED = ("tf32", "bf16_x3", "basis_split", "other_split")


def gradients(condition: float, seed: int) -> np.ndarray:
    """The gradients of one run, (steps, side, side)."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((SIDE, SIDE)))
    spectrum = np.logspace(0, -np.log10(condition), SIDE)
    return (basis * spectrum) @ rng.standard_normal((STEPS, SIDE, SIDE))


def _rounded(x: jax.Array, bits: int) -> jax.Array:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)


def _parts(x: jax.Array, number: int) -> list[jax.Array]:
    high = _rounded(x, 7)
    return [high, _rounded(x - high, 7)][:number]


@contextlib.contextmanager
def emulated(name: str) -> Iterator[None]:
    """Let products in the precision "default" be those of an accelerator."""
    plain = products._dot

    def product(a, b, transpose_a, transpose_b, precision, dtype):
        def of(x, y):
            return plain(x, y, transpose_a, transpose_b, lax.Precision.HIGHEST, dtype)

        if precision != lax.Precision.DEFAULT:
            return plain(a, b, transpose_a, transpose_b, precision, dtype)
        if name == "tf32":
            return of(_rounded(a, 10), _rounded(b, 10))
        if name == "bf16_x3":
            (a, a_low), (b, b_low) = _parts(a, 2), _parts(b, 2)
            return of(a, b) + (of(a, b_low) + of(a_low, b))
        # The basis stands on the left where it is transposed, on the right otherwise.
        on_left = transpose_a == (name == "basis_split")
        left, right = _parts(a, 1 + on_left), _parts(b, 2 - on_left)
        return sum(of(x, y) for x in left for y in right)

    with mock.patch.object(products, "_dot", product):
        yield


def last_update(
    factory: Callable[..., Any], grads: np.ndarray, dtype: Any, **options
) -> np.ndarray:
    """The update of the last gradient; `grads` is (steps, runs, side, side)."""
    with jax.enable_x64(dtype == np.float64):
        layout = optax.contrib.MuonDimensionNumbers(1, 2)
        tx = factory(matrix_axes={"w": layout}, **options)
        stream = jnp.asarray(grads, dtype)
        params = {"w": jnp.zeros(stream.shape[1:], dtype)}

        def body(carry, gradient):
            updates, state = tx.update({"w": gradient}, carry[0], params)
            return (state, updates["w"]), None

        @jax.jit
        def run(stream):
            start = tx.init(params), jnp.zeros_like(params["w"])
            return lax.scan(body, start, stream)[0][1]

        return np.asarray(run(stream), np.float64)


def with_rotations(precision: str) -> dict[str, Any]:
    """The options of a transform that rotates in this precision."""
    if "eigenbasis" in inspect.signature(jol.scale_by_soap).parameters:
        return {"eigenbasis": jol.Eigenbasis(rotation_precision=cast(Any, precision))}
    return {"rotation_precision": precision}


def errors(
    method: str, frequency: int, rows: tuple[str, ...], conditions=CONDITIONS, seeds: int = SEEDS
) -> dict[str, dict[str, float]]:
    """Mean error over the seeds, for each row and condition."""
    runs = [gradients(c, s) for c in conditions for s in range(seeds)]
    grads = np.stack(runs, axis=1).astype(np.float32)
    factory, on_cpu = METHODS[method], jax.default_backend() == "cpu"

    def update(row: str) -> np.ndarray:
        options: dict[str, Any] = {"precondition_frequency": frequency}
        given, around = grads, contextlib.nullcontext()
        if row == CONTROL:
            options |= with_rotations("highest")
            given = np.asarray(jnp.asarray(grads).astype(jnp.bfloat16).astype(jnp.float32))
        elif row in EMULATED and on_cpu:
            options |= with_rotations("default")
            around = emulated(row)
        elif row != DEFAULT:
            options |= with_rotations(row)
        with around:
            return last_update(factory, given, np.float32, **options)

    exact = with_rotations("highest") | {"precondition_frequency": frequency}
    reference = last_update(factory, grads, np.float64, **exact)
    size = np.linalg.norm(reference, axis=(-2, -1))
    found = {}
    for row in rows:
        relative = np.linalg.norm(update(row) - reference, axis=(-2, -1)) / size
        means = relative.reshape(len(conditions), seeds).mean(axis=1)
        found[row] = {f"{c:.0e}": float(m) for c, m in zip(conditions, means, strict=True)}
    return found


def all_rows() -> tuple[str, ...]:
    """Every precision that differs on this machine."""
    if jax.default_backend() == "cpu":
        return (CONTROL, DEFAULT, "highest", "bf16_x3", "tf32", *EMULATED[2:], "bfloat16")
    return (CONTROL, DEFAULT, *products.PRODUCT_PRECISIONS)


def worst(found: dict[str, dict[str, float]], row: str) -> float:
    """The largest error of a row over that of the control."""
    return max(found[row][c] / found[CONTROL][c] for c in found[CONTROL])


def main() -> None:
    """Print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description="Error of updates by the precision of rotations.")
    parser.add_argument("--json", type=pathlib.Path, help="write the table to this file")
    parser.add_argument("--quick", action="store_true", help="one seed")
    arguments = parser.parse_args()
    table = []
    print(
        f"{'method':8}{'f':>3}  {'rotations':16}", *(f"{c:>8.0e}" for c in CONDITIONS), "   worst"
    )
    for method, frequency in itertools.product(METHODS, FREQUENCIES):
        found = errors(method, frequency, all_rows(), seeds=1 if arguments.quick else SEEDS)
        for row, cells in found.items():
            ratio = worst(found, row)
            numbers = (f"{x:8.3f}" for x in cells.values())
            print(f"{method:8}{frequency:3}  {row:16}", *numbers, f"{ratio:8.2f}", flush=True)
            names = {"method": method, "frequency": frequency, "rotations": row}
            table.append(names | {"errors": cells, "worst_over_control": ratio})
    if arguments.json:
        where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": table}
        arguments.json.write_text(json.dumps(where, indent=1) + "\n")


if __name__ == "__main__":
    main()
