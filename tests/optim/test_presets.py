"""Presets are the parts they are made of; and where the family meets Optax's Lion and Muon."""

import math

import chex
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

import jaxopt_lab as jol
from tests.optim.runs import normal, run

SHAPES = {"wide": (3, 5), "tall": (5, 3), "b": (4,)}
LABELS = {"wide": "m", "tall": "m", "b": "a"}
STEPS = 6


def rate(step):
    return 0.01 * (step + 1)


def tree(seed, shapes=SHAPES, steps=STEPS):
    return normal(seed, shapes), normal(seed + 1, shapes, steps)


def adamw(learning_rate, decay, b1=0.8, b2=0.999):
    return optax.chain(
        jol.scale_by_adamw_fallback(b1=b1, b2=b2, eps=1e-8),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def parts(direction, decay, rate, period=1, sign_rate=0.0):
    return optax.chain(
        direction,
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(jol.branch_rate(period, rate, sign_rate)),
    )


def heavy_ball(scale, steps, nesterov=True):
    """Muon from Optax's trace: an orthogonalised direction without a momentum of its own."""
    return optax.chain(
        optax.trace(0.95, nesterov),
        jol.scale_by_lion_muon(
            period=1, b1=0.0, spectral_scale=scale, newton_schulz=jol.NewtonSchulz(steps=steps)
        ),
    )


# Every preset with its defaults, and the same written out.
ASSEMBLED = {
    "muon": (
        jol.muon(rate, weight_decay=0.2),
        parts(heavy_ball("fan", 6), 0.2, rate),
        adamw(rate, 0.2),
    ),
    "muon, no nesterov": (
        jol.muon(rate, nesterov=False),
        parts(heavy_ball("fan", 6, nesterov=False), 0.0, rate),
        adamw(rate, 0.0),
    ),
    "d_muon": (
        jol.d_muon(rate),
        parts(heavy_ball("match_rms", 5), 0.1, rate),
        adamw(rate, 0.1, b1=0.95, b2=0.95),
    ),
    "lion_muon": (
        jol.lion_muon(rate),
        parts(
            jol.scale_by_lion_muon(period=2, b1=0.9, b2=0.99),
            0.0,
            rate,
            2,
            lambda t: 0.05 * rate(t),
        ),
        adamw(rate, 0.0),
    ),
    "sign_muon": (
        jol.sign_muon(rate, weight_decay=0.2, sign_learning_rate=1e-3),
        parts(jol.scale_by_lion_muon(b1=0.9, b2=0.9), 0.2, rate, 2, 1e-3),
        adamw(rate, 0.2),
    ),
    "legacy_sign_muon": (
        jol.legacy_sign_muon(0.02, period=1, nesterov=False),
        parts(heavy_ball("match_rms", 6, nesterov=False), 0.0, 0.02),
        adamw(3e-4, 0.1),
    ),
}


@pytest.mark.parametrize("name", ASSEMBLED)
def test_preset_is_its_parts(name):
    preset, matrix, vector = ASSEMBLED[name]
    parts = optax.partition({"m": matrix, "a": vector}, LABELS)
    params, grads = tree(0)
    ours, _, _ = run(preset, params, grads)
    wanted, _, _ = run(parts, params, grads)
    chex.assert_trees_all_close(ours, wanted, rtol=1e-4, atol=1e-7)


def test_sign_muon_that_is_never_spectral_is_averaged_signum():
    params, grads = tree(2, {"w": (3, 4)})
    tx = jol.sign_muon(0.1, period=math.inf, b1=0.8, sign_learning_rate=0.05, weight_decay=0.3)
    _, ours, _ = run(tx, params, grads)
    w, m = np.asarray(params["w"], float), np.zeros((3, 4))
    for g in np.asarray(grads["w"], float):
        m = 0.8 * m + 0.2 * g
        w = w - 0.05 * (np.sign(m) + 0.3 * w)
    np.testing.assert_allclose(ours["w"], w, rtol=1e-5, atol=1e-6)


def test_lion_muon_that_is_never_spectral_is_lion_on_matrices():
    params, grads = tree(4, {"wide": (3, 5), "tall": (5, 3)})
    options = {"weight_decay": 0.3, "b1": 0.8, "b2": 0.95}
    ours, _, _ = run(
        jol.lion_muon(rate, period=math.inf, sign_learning_rate=rate, **options), params, grads
    )
    theirs, _, _ = run(optax.lion(rate, **options), params, grads)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


# What docs/guide/from-optax-muon.md says about Optax's Muon.

MODEL = {"qkv": (4, 3, 4), "up": (2, 3, 6), "down": (6, 3), "b": (5,)}
AXES = {"qkv": Axes(0, 2), "up": Axes(-2, -1), "down": Axes(), "b": None}
BETA = 0.8


def optax_muon(**options):
    return optax.contrib.muon(rate, beta=BETA, muon_weight_dimension_numbers=AXES, **options)


def ours_as_muon(learning_rate=rate, **options):
    fixed = {"period": 1, "b2": BETA, "matrix_axes": AXES, "fallback": jol.AdamW(b1=0.9)}
    fixed["newton_schulz"] = jol.NewtonSchulz(dtype="float32")
    return jol.lion_muon(learning_rate, **(fixed | options))


@pytest.mark.parametrize(
    ("consistent_rms", "scale"), [(0.2, "match_rms"), (None, "fan")], ids=["rms", "fan"]
)
def test_without_nesterov_the_two_agree_at_every_step(consistent_rms, scale):
    params, grads = tree(6, MODEL)
    theirs, _, _ = run(
        optax_muon(
            nesterov=False, consistent_rms=consistent_rms, weight_decay=0.1, adam_weight_decay=0.1
        ),
        params,
        grads,
    )
    ours, _, _ = run(ours_as_muon(b1=BETA, weight_decay=0.1, spectral_scale=scale), params, grads)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_with_nesterov_they_agree_once_the_bias_correction_has_faded():
    params, grads = tree(8, MODEL, steps=50)
    theirs, _, _ = run(optax_muon(consistent_rms=0.2), params, grads)
    ours, _, _ = run(ours_as_muon(b1=BETA**2), params, grads)
    for name in ("qkv", "up", "down"):
        size = np.abs(theirs[name]).max(axis=(1, 2) if name == "down" else (1, 2, 3))
        gap = np.abs(ours[name] - theirs[name]).reshape(50, -1).max(axis=1) / size
        assert gap[0] < 1e-3 and gap[1] > 1e-2 and gap[-5:].max() < 1e-3


def test_heavy_ball_muon_is_the_averaged_one_with_b1_squared():
    params, grads = tree(10, {"wide": (3, 5), "tall": (5, 3)})
    ours, _, _ = run(
        jol.muon(rate, momentum=BETA, newton_schulz=jol.NewtonSchulz(dtype="float32")),
        params,
        grads,
    )
    averaged, _, _ = run(
        ours_as_muon(b1=BETA**2, matrix_axes=None, spectral_scale="fan"), params, grads
    )
    chex.assert_trees_all_close(ours, averaged, rtol=1e-3, atol=1e-5)


def test_a_rate_of_the_fan_scale_converts_by_the_fan_in():
    params, grads = tree(12, {"wide": (6, 9), "tall": (6, 3)}, steps=2)
    options = {"b1": 0.9, "matrix_axes": None}
    fan, _, _ = run(ours_as_muon(spectral_scale="fan", **options), params, grads)
    converted = ours_as_muon(lambda t: 5 / math.sqrt(6) * rate(t), **options)
    rms, _, _ = run(converted, params, grads)
    chex.assert_trees_all_close(fan, rms, rtol=1e-5)
