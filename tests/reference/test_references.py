"""The NumPy references reproduce the released code: a part of the stored trajectories."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.reference import lion_muon as reference
from tests.reference.norm_ratios import RATIOS, norm_ratios
from tests.reference.spectral import newton_schulz, newton_schulz_bf16, polar, stable_rank

DATA = Path(__file__).parents[1] / "golden" / "data" / "lion_muon"


def load(name):
    with np.load(DATA / f"{name}.npz") as archive:
        return json.loads((DATA / f"{name}.json").read_text()), dict(archive)


def lion_muon(h, arrays, p):
    return reference.lion_muon(
        arrays[f"init.{p}"],
        arrays[f"grads.{p}"],
        rate=h["lr"],
        sign_rate=h["lion_lr"],
        b1=h["beta1"],
        b2=h["beta2"],
        period=h["muon_every_k"],
        ns_steps=h["ns_steps"],
        decay=h["weight_decay"],
        rate_factors=arrays.get("lr_mult"),
        stable_rank_threshold=h.get("srank_alpha", 0.0),
        probes=arrays.get(f"probe.{p}"),
    )


def legacy(h, arrays, p):
    return reference.sign_muon_legacy(
        arrays[f"init.{p}"],
        arrays[f"grads.{p}"],
        rate=h["lr"],
        cheap_rate=h["cheap_lr"],
        momentum=h["momentum"],
        nesterov=h["nesterov"],
        period=h["muon_every_k"],
        ns_steps=h["ns_steps"],
        cheap_mode=h["cheap_mode"],
        sign_scaling=h.get("sign_scaling", "muon"),
        decay=h["weight_decay"],
        rate_factors=arrays.get("lr_mult"),
    )


def heavy_ball_muon(function):
    def run(h, arrays, p):
        return function(
            arrays[f"init.{p}"],
            arrays[f"grads.{p}"],
            rate=h["lr"],
            momentum=h["momentum"],
            nesterov=h["nesterov"],
            ns_steps=h["ns_steps"],
            decay=h["weight_decay"],
        )

    return run


def lion(h, arrays, p):
    b1, b2 = h["betas"]
    w, grads = arrays[f"init.{p}"], arrays[f"grads.{p}"]
    return reference.lion(w, grads, rate=h["lr"], b1=b1, b2=b2, decay=h["weight_decay"])


def heavy_ball(kind):
    def run(h, arrays, p):
        return reference.heavy_ball(
            arrays[f"init.{p}"],
            arrays[f"grads.{p}"],
            kind=kind,
            rate=h["lr"],
            momentum=h["momentum"],
            dampening=h.get("dampening", 0.0),
            nesterov=h.get("nesterov", False),
            init_buffer="params",
            decay=h["weight_decay"],
        )

    return run


def adamw(h, arrays, p, rate_factors):
    b1, b2 = h["adamw_betas"]
    return reference.adamw_fallback(
        arrays[f"init.{p}"],
        arrays[f"grads.{p}"],
        rate=h.get("adamw_lr", h["lr"]),
        b1=b1,
        b2=b2,
        eps=h["adamw_eps"],
        decay=h.get("adamw_wd", h["weight_decay"]),
        rate_factors=rate_factors,
    )


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("lionmuon_P2_wd0.1", lion_muon),
        ("lionmuon_Pinf_wd0.1", lion_muon),
        ("lionmuon_conv3d", lion_muon),
        ("lionmuon_scheduled_lr", lion_muon),
        ("lionmuon_srank_a0.15", lion_muon),
        ("signmuon_legacy_cached", legacy),
        ("signmuon_legacy_cheap_ns", legacy),
        ("signmuon_legacy_norm", legacy),
        ("signmuon_legacy_scheduled_lr", legacy),
        ("signmuon_legacy_sign_muon", legacy),
        ("muon_nesterov0_wd0.1", heavy_ball_muon(reference.muon)),
        ("muon_nesterov1_wd0.1", heavy_ball_muon(reference.muon)),
        ("dmuon_nesterov0", heavy_ball_muon(reference.d_muon)),
        ("lion_wd0.1", lion),
        ("signum_m0.9_damp0.9_wd0.1", heavy_ball("sign")),
        ("signum_m0.95_nesterov_wd0.1", heavy_ball("sign")),
        ("normalized_sgd", heavy_ball("norm")),
    ],
)
def test_trajectory(name, run):
    sidecar, arrays = load(name)
    h = sidecar["hyperparameters"]
    constant = run is legacy
    for p in sidecar["param_shapes"]:
        if p in sidecar["adamw_fallback_params"]:
            ours = adamw(h, arrays, p, None if constant else arrays.get("lr_mult"))
        else:
            ours = run(h, arrays, p)
        np.testing.assert_allclose(ours.params, arrays[f"params_f64.{p}"], rtol=0, atol=1e-14)
        for buffer, value in ours.buffers.items():
            key = f"state_final_f64.{p}.{buffer}"
            if key in arrays:
                np.testing.assert_allclose(value, arrays[key], rtol=0, atol=1e-13)


def test_newton_schulz_and_its_bfloat16_recipe():
    _, arrays = load("newton_schulz")
    for name in (name for name in arrays if "_" in name):
        precision, x, steps = name.split("_")
        function = newton_schulz if precision == "f64" else newton_schulz_bf16
        got = function(arrays[x], int(steps.removeprefix("steps")))
        atol = 1e-14 if precision == "f64" else 0.0
        np.testing.assert_allclose(got, arrays[name], rtol=0, atol=atol)


def test_stable_rank():
    _, arrays = load("stable_rank")
    for name in (name for name in arrays if ".it" in name):
        matrix, rounds = name.split(".it")
        got = stable_rank(arrays[f"{matrix}.X"], arrays[f"{matrix}.v0"], int(rounds))
        np.testing.assert_allclose(got, arrays[name][1], rtol=1e-13)


def test_polar_factor_is_orthogonal():
    x = np.random.default_rng(0).normal(size=(4, 7))
    np.testing.assert_allclose(polar(x) @ polar(x).T, np.eye(4), atol=1e-14)


def test_norm_ratios():
    sidecar, arrays = load("norm_diag_every3")
    h = sidecar["hyperparameters"]
    names = [p for p in sidecar["param_shapes"] if p not in sidecar["adamw_fallback_params"]]
    runs = {p: lion_muon(h, arrays, p) for p in names}
    momenta = {p: [np.zeros(arrays[f"init.{p}"].shape)] for p in names}
    for p, m in momenta.items():
        for g in arrays[f"grads.{p}"]:
            m.append(h["beta2"] * m[-1] + (1 - h["beta2"]) * g)
    previous = None
    for i, step in enumerate(arrays["diag.step"]):
        t = int(step) - 1
        grads = [arrays[f"grads.{p}"][t] for p in names]
        params = [runs[p].params[t - 1] for p in names]
        updates = [runs[p].directions[t] for p in names]
        got = norm_ratios(grads, params, updates, [momenta[p][t] for p in names], previous)
        # The released code keeps the record in float32.
        previous = [[x.astype(np.float32) for x in group] for group in (grads, params)]
        for ratio in RATIOS:
            np.testing.assert_allclose(got[ratio], arrays[f"diag.{ratio}"][i], rtol=2e-6)
