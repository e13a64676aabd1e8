"""What the hardware allows: measured ceilings, and the least a step can take under them."""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# (bytes of the copied array, side of the multiplied matrices): far beyond any cache on an
# accelerator, and small enough for a CPU to finish in a tenth of a second.
_CPU_SIZES = (1 << 27, 1024)
_ACCELERATOR_SIZES = (1 << 30, 8192)


@dataclass(frozen=True)
class Ceilings:
    """The two rates of a device that bound an optimizer step."""

    bytes_per_second: float
    """Memory traffic of a large copy, bytes read plus bytes written."""
    flops_per_second: float
    """A large bf16 matrix product, 2 n^3 FLOPs."""


class CeilingProbe:
    """Measures the ceilings a little at a time, so that they can be interleaved with other work."""

    def __init__(self) -> None:
        """Compiles the two programs and runs them once."""
        on_cpu = jax.default_backend() == "cpu"
        copied_bytes, side = _CPU_SIZES if on_cpu else _ACCELERATOR_SIZES
        self._calls = 2 if on_cpu else 10
        # Random data: products of zeros have been seen to run faster than products of numbers.
        keys = jax.random.split(jax.random.key(0))
        self._vector = jax.random.normal(keys[0], (copied_bytes // 4,), jnp.float32)
        self._matrix = jax.random.normal(keys[1], (side, side), jnp.bfloat16)
        # A negation in place reads and writes every byte; a fresh result would add the cost of
        # mapping new pages on a CPU.
        self._copy = jax.jit(jnp.negative, donate_argnums=0)
        self._product = jax.jit(lambda x: x @ x)
        self._rates: list[tuple[float, float]] = []
        self._vector = self._copy(self._vector)
        jax.block_until_ready((self._vector, self._product(self._matrix)))

    def sample(self) -> None:
        """Measures both rates once."""
        start = time.perf_counter()
        for _ in range(self._calls):
            self._vector = self._copy(self._vector)
        self._vector.block_until_ready()
        copied = time.perf_counter()
        product = self._matrix
        for _ in range(self._calls):
            product = self._product(self._matrix)
        product.block_until_ready()
        multiplied = time.perf_counter()
        self._rates.append(
            (
                self._calls * 2 * self._vector.nbytes / (copied - start),
                self._calls * 2 * len(self._matrix) ** 3 / (multiplied - copied),
            )
        )

    def ceilings(self) -> Ceilings:
        """Medians of the samples so far."""
        if not self._rates:
            self.sample()
        return Ceilings(*map(float, np.median(self._rates, axis=0)))


def step_bytes(params: Any, state: Any) -> int:
    """The least memory traffic of one optimizer step.

    Gradients are read; parameters and state are read and written. Counters are included.

    Args:
      params: Tree of arrays or shapes; the gradients have the same.
      state: State of the optimizer.
    """
    return 3 * tree_bytes(params) + 2 * tree_bytes(state)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
