"""The schedules against a scalar float64 evaluation of their formulas, and their properties."""

import doctest
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.schedules import (
    DecayShape,
    decay,
    warmup_stable_decay,
)

SHAPES = get_args(DecayShape)

lengths = st.integers(1, 500).flatmap(
    lambda total: st.tuples(st.just(total), st.integers(0, total))
)


def values(schedule, steps):
    # One array length for all examples, so that every operation is compiled once.
    with jax.enable_x64(True):
        return np.asarray(schedule(jnp.arange(512)))[:steps]


def cosine(peak, total, warmup):
    """Warm-up and half a cosine, without a plateau."""
    return warmup_stable_decay(
        peak, total, warmup, decay_fraction=(total - warmup) / total, decay_shape="cosine"
    )


def test_without_a_plateau_it_is_optax_s():
    ours, theirs = (
        values(schedule, 400)
        for schedule in (
            cosine(3e-3, 320, 64),
            optax.warmup_cosine_decay_schedule(3e-5, 3e-3, 64, 320),
        )
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-15, rtol=0)


@given(lengths, st.floats(0, 1), st.sampled_from(SHAPES), st.floats(0, 1, allow_subnormal=False))
def test_wsd_is_its_formula(length, share, shape, final):
    total, warmup = length
    fraction = share * (total - warmup) / total
    n = math.floor(fraction * total)
    q = {
        "linear": lambda x: 1 - x,
        "sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "square": lambda x: 1 - x**2,
    }[shape]
    expected = []
    for t in range(total):
        if t < warmup:
            expected.append(0.01 + 0.99 * t / warmup)
        elif t < total - n:
            expected.append(1.0)
        else:
            expected.append(final + (1 - final) * q((t - total + n) / n))
    schedule = warmup_stable_decay(
        2.0, total, warmup, decay_fraction=fraction, decay_shape=shape, final_fraction=final
    )
    np.testing.assert_allclose(values(schedule, total), 2 * np.array(expected), atol=1e-14, rtol=0)


@given(lengths, st.sampled_from(SHAPES), st.floats(0, 1))
def test_rises_then_falls_within_bounds(length, shape, final):
    total, warmup = length
    fraction = (total - warmup) / total / 2
    schedule = warmup_stable_decay(
        1.0, total, warmup, decay_fraction=fraction, decay_shape=shape, final_fraction=final
    )
    s = values(schedule, total + 5)
    assert np.all(np.diff(s[:warmup]) >= 0)
    assert np.all(np.diff(s[warmup:]) <= 1e-15)
    assert s.min() >= 0.0 and s.max() <= 1.0
    assert np.all(s[total:] == s[total])


def test_end_points_are_exact():
    for shape in SHAPES:
        wsd = warmup_stable_decay(1.0, 100, 10, decay_shape=shape, final_fraction=0.25)
        assert [float(wsd(t)) for t in (10, 79, 80, 100, 200)] == [1.0, 1.0, 1.0, 0.25, 0.25]


def test_late_cosine_keeps_its_relative_precision_in_float32():
    total = 64_000
    left = float(cosine(1.0, total, 0)(total - 1))
    np.testing.assert_allclose(left, (math.pi / 2 / total) ** 2, rtol=1e-5)


def test_scalar_counts_traced_counts_and_dtypes():
    schedule = warmup_stable_decay(0.1, 50, 5)
    eager = schedule(7)
    traced = jax.jit(schedule)(jnp.int32(7))
    assert eager.shape == traced.shape == ()
    assert eager.dtype == traced.dtype == jnp.float32
    np.testing.assert_allclose(eager, traced, rtol=1e-6)
    with jax.enable_x64(True):
        assert schedule(jnp.int32(7)).dtype == jnp.float64


def test_drives_an_optax_chain():
    tx = optax.chain(optax.scale_by_learning_rate(cosine(1.0, 4, 2)))
    state = tx.init(jnp.ones(2))
    rates = []
    for _ in range(5):
        updates, state = tx.update(jnp.ones(2), state)
        rates.append(-float(updates[0]))
    np.testing.assert_allclose(rates, [0.01, 0.505, 1.0, 0.5, 0.0], atol=1e-7)


def test_traced_peak_is_accepted():
    assert float(jax.jit(lambda peak: cosine(peak, 10, 0)(0))(0.5)) == 0.5


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: warmup_stable_decay(math.nan, 10, 1), "peak"),
        (lambda: warmup_stable_decay(-1.0, 10, 1), "peak"),
        (lambda: warmup_stable_decay(math.inf, 10, 1), "peak"),
        (lambda: warmup_stable_decay(1.0, 0, 0), "total_steps"),
        (lambda: warmup_stable_decay(1.0, 10, 11), "warmup_steps"),
        (lambda: warmup_stable_decay(1.0, 10, -1), "warmup_steps"),
        (lambda: warmup_stable_decay(1.0, 10, 1, decay_fraction=1.5), "decay_fraction"),
        (lambda: warmup_stable_decay(1.0, 10, 1, final_fraction=math.nan), "final_fraction"),
        (lambda: warmup_stable_decay(1.0, 10, 1, decay_shape="exp"), "decay_shape"),
        (lambda: warmup_stable_decay(1.0, 10, 6, decay_fraction=0.5), "warmup_steps"),
    ],
)
def test_bad_arguments_name_the_field(build, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        build()


def test_doctests():
    results = doctest.testmod(decay)
    assert results.attempted and not results.failed
