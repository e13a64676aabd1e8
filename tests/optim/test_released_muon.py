"""Quirks of the released classes: momenta, cheap steps, and what "cached" repeats."""

import math

import numpy as np
import pytest

import jaxopt_lab as jol
from jaxopt_lab.core.newton_schulz import newton_schulz
from jaxopt_lab.optim.lion_muon.muon import heavy_ball
from jaxopt_lab.optim.lion_muon.transform import averaged
from jaxopt_lab.parity.lion_muon import CachedState, raw_gradient, released_muon
from tests.golden.trajectory import find_states
from tests.optim.runs import fast_jit, normal, run

STEPS = 4
MATRIX = {"w": (3, 5)}


def sign_only(average, **options):
    return released_muon(1.0, average=average, period=math.inf, sign_learning_rate=1.0, **options)


def test_momentum_rules():
    params, grads = normal(3, MATRIX), normal(4, MATRIX, STEPS)
    buffer, wanted = np.zeros((3, 5)), {"nesterov": [], "buffer": [], "gradient": []}
    for g in np.asarray(grads["w"], float):
        buffer = 0.8 * buffer + g
        wanted["nesterov"].append(g + 0.8 * buffer)
        wanted["buffer"].append(buffer)
        wanted["gradient"].append(g)
    rules = {
        "nesterov": heavy_ball(0.8, True),
        "buffer": heavy_ball(0.8, False),
        "gradient": raw_gradient(0.8),
    }
    for name, directions in wanted.items():
        updates, _, state = run(sign_only(rules[name]), params, grads)
        np.testing.assert_array_equal(updates["w"], -np.sign(directions))
        (family,) = find_states(state, jol.optim.LionMuonState)
        np.testing.assert_allclose(family.mu["w"], buffer, rtol=1e-5)


def expected_cheap(mode, scaling, d):
    m, n = d.shape
    fan = math.sqrt(max(1, n / m))
    if mode == "sign":
        frob = 1 / math.sqrt(max(m, n))
        return np.sign(d) * {"none": 1, "frob": frob, "muon": fan * frob}[scaling]
    if mode == "cheap_ns":
        return 0.2 * math.sqrt(max(m, n)) * newton_schulz(d, steps=3)
    # Nothing was ever cached: "cached" is "norm".
    return d / np.linalg.norm(d) * math.sqrt(min(m, n)) * fan


@pytest.mark.parametrize(
    ("mode", "scaling"),
    [
        *(("sign", scaling) for scaling in ("none", "frob", "muon")),
        *((mode, "none") for mode in ("norm", "cheap_ns", "cached")),
    ],
)
def test_cheap_steps(mode, scaling):
    shapes = {"wide": (3, 5), "tall": (5, 3)}
    grads = normal(4, shapes)
    tx = sign_only(
        averaged(0.0, 0.99),
        cheap_mode=mode,
        sign_scaling=scaling,
        cheap_ns_steps=3,
        newton_schulz=jol.NewtonSchulz(dtype="float32"),
    )
    updates, _ = fast_jit(tx.update)(grads, tx.init(grads), grads)
    for name, g in grads.items():
        wanted = expected_cheap(mode, scaling, g)
        np.testing.assert_allclose(-updates[name], wanted, rtol=1e-4, atol=1e-5)


def test_cached_steps_repeat_the_last_spectral_one():
    params, grads = normal(5, MATRIX), normal(6, MATRIX, STEPS)
    options = {"period": 3, "newton_schulz": jol.NewtonSchulz(steps=2)}
    options |= {"average": averaged(0.9, 0.99), "sign_learning_rate": 0.25}
    cached, _, state = run(released_muon(1.0, cheap_mode="cached", **options), params, grads)
    plain, _, _ = run(released_muon(1.0, **options), params, grads)
    first, last = np.asarray(plain["w"][0]), np.asarray(plain["w"][3])
    wanted = [first, 0.25 * first, 0.25 * first, last]
    np.testing.assert_allclose(cached["w"], wanted, rtol=1e-6)
    (kept,) = find_states(state, CachedState)
    np.testing.assert_allclose(-kept.cached["w"], last, rtol=1e-6)
