"""What no stored trajectory covers, against the NumPy references through the same replay."""

import functools
import json

import numpy as np
import pytest

from tests.golden import harness
from tests.reference import lion_muon as reference

SHAPES = {"wide": (4, 6), "tall": (6, 4), "square": (5, 5), "vec": (3,)}
STEPS = 12
ADAM = {"adamw_lr": 0.01, "adamw_betas": [0.8, 0.99], "adamw_eps": 1e-8, "adamw_wd": 0.05}


def matrices_and_adamw(matrix, h, factors, adam_factors, probes=None):
    """One reference trajectory a parameter: `matrix` for matrices, AdamW for vectors."""

    def trajectory(w, grads, name):
        if w.ndim < 2:
            b1, b2 = h["adamw_betas"]
            return reference.adamw_fallback(
                w,
                grads,
                rate=h.get("adamw_lr", h["lr"]),
                b1=b1,
                b2=b2,
                eps=h["adamw_eps"],
                decay=h.get("adamw_wd", h["weight_decay"]),
                rate_factors=adam_factors,
            )
        extra = {} if probes is None else {"probes": probes[name]}
        return matrix(w, grads, decay=h["weight_decay"], rate_factors=factors, **extra)

    return trajectory


def legacy(h, factors, probes=None):
    def matrix(w, grads, **extra):
        return reference.sign_muon_legacy(
            w,
            grads,
            rate=h["lr"],
            cheap_rate=h["cheap_lr"],
            momentum=h["momentum"],
            nesterov=h["nesterov"],
            period=h["muon_every_k"],
            ns_steps=h["ns_steps"],
            cheap_mode=h["cheap_mode"],
            sign_scaling=h["sign_scaling"],
            cheap_ns_steps=h.get("cheap_ns_steps", 2),
            stable_rank_threshold=h.get("srank_alpha", 0.0),
            **extra,
        )

    return matrices_and_adamw(matrix, h, factors, None, probes)


def legacy_case(rng, factors, **changes):
    h = {
        **{"lr": 0.02, "cheap_lr": 0.003, "momentum": 0.9, "nesterov": True, "ns_steps": 4},
        **{"muon_every_k": 4, "cheap_mode": "norm", "sign_scaling": "none", "weight_decay": 0.1},
        **ADAM,
        **changes,
    }
    probes = None
    if "srank_alpha" in h:
        probes = {p: rng.normal(size=(STEPS, s[1])) for p, s in SHAPES.items() if len(s) == 2}
    return "SignMuon (legacy)", h, legacy(h, factors, probes), probes


def preset_case(kind, function, h, factors):
    h = h | {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True}

    def matrix(w, grads, **extra):
        return function(
            w,
            grads,
            rate=h["lr"],
            momentum=h["momentum"],
            nesterov=h["nesterov"],
            ns_steps=h["ns_steps"],
            **extra,
        )

    return kind, h, matrices_and_adamw(matrix, h, factors, factors), None


def elementwise_case(kind, factors, **h):
    h = {"lr": 0.01, "weight_decay": 0.1, **h}

    def trajectory(w, grads, name):
        del name
        options = {"rate": h["lr"], "decay": h["weight_decay"], "rate_factors": factors}
        if kind == "Lion":
            b1, b2 = h["betas"]
            return reference.lion(w, grads, b1=b1, b2=b2, **options)
        return reference.heavy_ball(
            w,
            grads,
            kind="sign" if kind == "Signum" else "norm",
            momentum=h["momentum"],
            dampening=h["dampening"],
            nesterov=h["nesterov"],
            init_buffer="params",
            **options,
        )

    return kind, h, trajectory, None


CASES = {
    "legacy_srank_sign": lambda r, f: legacy_case(
        r, f, cheap_mode="sign", sign_scaling="frob", srank_alpha=0.35, nesterov=False
    ),
    # A matrix whose first step is cheap has nothing cached and falls back to `norm`.
    "legacy_srank_cached": lambda r, f: legacy_case(r, f, cheap_mode="cached", srank_alpha=0.32),
    "legacy_srank_cheap_ns": lambda r, f: legacy_case(
        r, f, cheap_mode="cheap_ns", cheap_ns_steps=3, srank_alpha=0.35
    ),
    "legacy_no_nesterov": lambda r, f: legacy_case(r, f, nesterov=False, muon_every_k=5),
    "muon_scheduled": lambda r, f: preset_case("Muon", reference.muon, ADAM | {"ns_steps": 6}, f),
    "dmuon_scheduled": lambda r, f: preset_case(
        "DistributedMuon (d-muon)",
        reference.d_muon,
        {"ns_steps": 3, "adamw_betas": [0.95, 0.95], "adamw_eps": 1e-6},
        f,
    ),
    "dmuon_other_rms": lambda r, f: preset_case(
        "DistributedMuon (d-muon)",
        functools.partial(reference.d_muon, rms=0.5),
        {
            **{"ns_steps": 5, "adamw_betas": [0.9, 0.95], "adamw_eps": 1e-8},
            "matched_adamw_rms": 0.5,
        },
        f,
    ),
    "lion_scheduled": lambda r, f: elementwise_case("Lion", f, betas=[0.8, 0.95]),
    "signum_scheduled": lambda r, f: elementwise_case(
        "Signum", f, momentum=0.8, dampening=0.3, nesterov=True
    ),
    "normalized_sgd_nesterov": lambda r, f: elementwise_case(
        "NormalizedSGD", f, momentum=0.8, dampening=0.3, nesterov=True
    ),
}


def write_case(folder, name, rng, build):
    factors = np.linspace(0.1, 1.0, STEPS)
    kind, h, trajectory, probes = build(rng, factors)
    arrays = {"lr_mult": factors}
    spectral = {}
    for p, shape in SHAPES.items():
        w = rng.normal(size=shape)
        # Gradients of slowly changing rank, so that a trigger decides both ways.
        grads = rng.normal(size=(STEPS, *shape)) + 2 * np.sin(np.arange(STEPS)).reshape(
            -1, *[1] * len(shape)
        )
        run = trajectory(w, grads, p)
        spectral[p] = run.spectral
        arrays |= {f"init.{p}": w, f"grads.{p}": grads, f"params_f64.{p}": run.params}
        arrays |= {f"state_final_f64.{p}.{buffer}": x for buffer, x in run.buffers.items()}
        if probes and p in probes:
            arrays[f"probe.{p}"] = probes[p]
    sidecar = {
        "optimizer_class": kind,
        "steps": STEPS,
        "hyperparameters": h,
        "param_shapes": {p: list(s) for p, s in SHAPES.items()},
        "adamw_fallback_params": ["vec"] if "adamw_betas" in h else [],
    }
    np.savez(folder / f"{name}.npz", **arrays)
    (folder / f"{name}.json").write_text(json.dumps(sidecar))
    return spectral


@pytest.mark.parametrize("name", CASES)
def test_reference(tmp_path, name):
    spectral = write_case(tmp_path, name, np.random.default_rng(7), CASES[name])
    if "srank" in name:
        taken = np.concatenate([spectral[p] for p in ("wide", "tall", "square")])
        assert 0 < taken.mean() < 1, "the trigger must decide both ways"
    (result,) = harness.replay_case("lion_muon", tmp_path / name)
    assert result.passed, str(result)
