"""The two branches of the LionMuon family and the momentum they share."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.descent import (
    SIGN_SCALES,
    SPECTRAL_SCALES,
    frobenius_direction,
    sign_scale,
    spectral_scale,
)
from jaxopt_lab.core.newton_schulz import COEFFICIENTS, newton_schulz
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.spectral import stable_rank
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.matrix_leaves import MatrixLeaves

Leaves = list[Array]

zip_strict = functools.partial(zip, strict=True)


class Family(NamedTuple):
    """Which member of the family: every choice that does not change during a run."""

    b1: Scalar
    b2: Scalar
    momentum: str
    heavy_ball_direction: str
    ns_steps: int
    ns_dtype: str
    ns_coefficients: str
    spectral_scale: str
    cheap_mode: str
    cheap_ns_steps: int
    sign_scaling: str
    round_newton_schulz: bool
    round_update: bool
    replicated_work: ReplicatedWork
    period: Scalar
    first_step_spectral: bool
    stable_rank_threshold: Scalar | None

    def check(self) -> None:
        """Raise `ValueError` for a choice that does not exist or does not fit the others."""
        choices = {
            "momentum": ("ema", "heavy_ball"),
            "heavy_ball_direction": ("nesterov", "buffer", "gradient"),
            "ns_coefficients": tuple(COEFFICIENTS),
            "spectral_scale": SPECTRAL_SCALES,
            "cheap_mode": ("sign", "norm", "cheap_ns", "cached"),
            "sign_scaling": SIGN_SCALES,
            "replicated_work": ("repeat", "share"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        for name in ("ns_steps", "cheap_ns_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(
                    f"{name} is {steps!r}; it must be a Python integer of at least 1 "
                    "(with optax.inject_hyperparams, one of its static_args)"
                )
        if not _is_floating(self.ns_dtype):
            raise ValueError(f"ns_dtype is {self.ns_dtype!r}; it must be a floating-point dtype")
        _check_period(self.period)
        threshold = self.stable_rank_threshold
        if isinstance(threshold, int | float) and not threshold > 0:
            raise ValueError(f"stable_rank_threshold is {threshold}; it must be positive")

    def advance(self, gradient: Array, momentum: Array) -> tuple[Array, Array]:
        """The direction to descend along, and the next momentum, both in at least float32."""
        wide = jnp.promote_types(gradient.dtype, jnp.float32)
        g, m = gradient.astype(wide), momentum.astype(wide)
        if self.momentum == "ema":
            # The buffer averages gradients, not directions: it does not depend on the branch.
            return self.b1 * m + (1 - self.b1) * g, self.b2 * m + (1 - self.b2) * g
        new = self.b1 * m + g
        directions = {"nesterov": g + self.b1 * new, "buffer": new, "gradient": g}
        return directions[self.heavy_ball_direction], new

    def spectral(self, directions: Leaves, leaves: MatrixLeaves) -> Leaves:
        """Orthogonalised directions in `ns_dtype`, not yet scaled."""
        dtype = jnp.dtype(self.ns_dtype)
        # Cast first: what crosses the mesh is then the small dtype, both ways.
        return self._orthogonalise([d.astype(dtype) for d in directions], leaves, self.ns_steps)

    def cheap(self, directions: Leaves, cached: Leaves, leaves: MatrixLeaves) -> Leaves:
        """The direction of a step that is not spectral, not yet multiplied by its scale."""
        if cached and isinstance(self.period, int | float):
            return cached
        if self.cheap_mode == "cheap_ns":
            return self._orthogonalise(directions, leaves, self.cheap_ns_steps)
        if self.cheap_mode == "sign":
            return [jnp.sign(d).astype(self.ns_dtype) for d in directions]
        normalised = [
            frobenius_direction(d, leaves.inner_axes(i), *leaves.matrix_shape(i, d)[1:])
            for i, d in enumerate(directions)
        ]
        if not cached:
            return normalised
        # Only a traced period comes here: were it infinite, no step would ever fill the cache.
        filled = jnp.isfinite(self.period)
        return [jnp.where(filled, *pair) for pair in zip_strict(cached, normalised)]

    def scales(self, index: int, leaf: Array, leaves: MatrixLeaves) -> tuple[float, float]:
        """Factors on the spectral and on the cheap direction of one leaf."""
        _, m, n = leaves.matrix_shape(index, leaf)
        spectral = spectral_scale(self.spectral_scale, m, n)
        cheap = {"sign": sign_scale(self.sign_scaling, m, n), "cheap_ns": spectral}
        return spectral, cheap.get(self.cheap_mode, 1.0)

    def apply_scale(self, direction: Array, scale: Scalar, dtype) -> Array:
        """Scaled direction in `dtype`, rounded where the released code rounds it."""
        scaled = scale * direction.astype(dtype)
        return jax.lax.reduce_precision(scaled, 8, 7) if self.round_update else scaled

    def periodic_step(
        self, count: Array, leaves: MatrixLeaves, gradients: Leaves, momenta: Leaves, cached: Leaves
    ) -> tuple[Leaves, Leaves, list]:
        """One step whose branch is decided by the step count, for all leaves alike.

        Returns:
          Unscaled directions, the next momenta, and for each leaf whether it took the spectral one.
        """
        spectral = _is_spectral_step(count, self.period, self.first_step_spectral)
        # Step 0 fills the cache before anything reads it, unless no step is ever spectral.
        readable = cached if spectral is not False else []

        # The momentum belongs into the branches: computed outside, the direction would have to be
        # written to memory and read again across the conditional.
        def branch(is_spectral: bool) -> Callable:
            def run(gradients: Leaves, momenta: Leaves, readable: Leaves):
                directions, new = self._advance_all(gradients, momenta)
                if is_spectral:
                    u = self.spectral(directions, leaves)
                else:
                    u = self.cheap(directions, readable, leaves)
                return [x.astype(self._direction_dtype(d)) for x, d in zip_strict(u, directions)], [
                    x.astype(m.dtype) for x, m in zip_strict(new, momenta)
                ]

            return run

        operands = (gradients, momenta, readable)
        if isinstance(spectral, bool):
            u, new = branch(spectral)(*operands)
        else:
            u, new = jax.lax.cond(spectral, branch(True), branch(False), *operands)
        return u, new, [spectral] * len(gradients)

    def triggered_step(
        self,
        starts: Sequence[Array],
        leaves: MatrixLeaves,
        gradients: Leaves,
        momenta: Leaves,
        cached: Leaves,
    ) -> tuple[Leaves, Leaves, list]:
        """One step in which every matrix decides alone, by its stable rank.

        Args:
          starts: Start vectors (batch, n) of the power iteration, one array a leaf.
          leaves: Layouts of the leaves.
          gradients: One a leaf.
          momenta: One a leaf.
          cached: One a leaf with cheap_mode="cached", else empty.

        Returns:
          As `periodic_step`.
        """
        directions, new = self._advance_all(gradients, momenta)
        u, decided = leaves.map_whole(
            self._decide,
            # The legacy class measures its buffer, not the direction it descends along.
            (directions, new if self.momentum == "heavy_ball" else directions),
            vectors=(list(starts),),
            numbers=1,
            replicated_work=self.replicated_work,
        )
        flags = [leaves.per_matrix(i, f, g) for i, (f, g) in enumerate(zip_strict(decided, u))]
        for i, last in enumerate(cached):
            filled = jnp.any(last != 0, axis=leaves.inner_axes(i), keepdims=True)
            u[i] = jnp.where(~flags[i] & filled, last, u[i])
        return u, [x.astype(m.dtype) for x, m in zip_strict(new, momenta)], flags

    def _advance_all(self, gradients: Leaves, momenta: Leaves) -> tuple[Leaves, Leaves]:
        pairs = [self.advance(g, m) for g, m in zip_strict(gradients, momenta)]
        return [d for d, _ in pairs], [m for _, m in pairs]

    def _direction_dtype(self, direction: Array):
        exact = self.cheap_mode in ("sign", "cheap_ns")
        return jnp.dtype(self.ns_dtype) if exact else direction.dtype

    def _decide(self, stack: Array, measured: Array, start: Array) -> tuple[Array, Array]:
        assert self.stable_rank_threshold is not None
        limit = self.stable_rank_threshold * min(stack.shape[-2:])
        # The released weights are (out, in): the iteration starts on the reduction side.
        spectral = stable_rank(measured.mT, start.astype(measured.dtype)) <= limit
        # A loop over matrices, not a batch: only then does `cond` skip what is not taken.
        return jax.lax.map(lambda args: self._one(*args), (stack, spectral)), spectral

    def _one(self, matrix: Array, spectral: Array) -> Array:
        def cheap(x: Array) -> Array:
            if self.cheap_mode == "sign":
                return jnp.sign(x)
            if self.cheap_mode == "cheap_ns":
                return self._newton_schulz(x, self.cheap_ns_steps).astype(x.dtype)
            return frobenius_direction(x, (0, 1), *x.shape)

        def orthogonalise(x: Array) -> Array:
            return self._newton_schulz(x.astype(self.ns_dtype), self.ns_steps).astype(x.dtype)

        return jax.lax.cond(spectral, orthogonalise, cheap, matrix)

    def _orthogonalise(self, directions: Leaves, leaves: MatrixLeaves, steps: int) -> Leaves:
        (mapped,) = leaves.map_whole(
            lambda x: (self._newton_schulz(x, steps),),
            (directions,),
            transposable=True,
            replicated_work=self.replicated_work,
        )
        return mapped

    def _newton_schulz(self, x: Array, steps: int) -> Array:
        rounded = self.round_newton_schulz and jnp.dtype(self.ns_dtype) == jnp.bfloat16
        # The released weights are (out, in). Which Gram matrix a square one takes decides about its
        # rounding, and only reproduction asks for that.
        y = newton_schulz(
            x.mT if rounded else x,
            steps=steps,
            coefficients=self.ns_coefficients,
            compute_dtype=self.ns_dtype,
            round_every_op=rounded,
        )
        return y.mT if rounded else y


def _is_floating(dtype: DTypeLike) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # not the name of any dtype
        return False


def _check_period(period: Scalar) -> None:
    # Only Python numbers can be looked at: `optax.inject_hyperparams` passes tracers.
    if isinstance(period, int | float) and not (
        period == math.inf or (period >= 1 and period == int(period))
    ):
        raise ValueError(
            f"period is {period!r}; it must be an integer of at least 1, or math.inf for no "
            "spectral step at all"
        )


def _is_spectral_step(count: Array, period: Scalar, first_step_spectral: bool) -> Array | bool:
    """Whether step `count` is spectral; a Python bool where that is the same at every step."""
    if isinstance(period, int | float):
        if period == 1:
            return True
        if math.isinf(period):
            return count == 0 if first_step_spectral else False
        return count % int(period) == 0
    # count % inf is count, so an infinite traced period leaves step 0 to the second condition.
    due = count % period == 0
    return due if first_step_spectral else due & jnp.isfinite(period)
