"""Adaptive warm-up where no trajectory is stored: replayed against a scalar form of the spec."""

import math

import numpy as np
import pytest

from jaxopt_lab.parity.warmup import quadrature_peak_gap
from tests.golden.adaptive_warmup import replay
from tests.golden.harness import Case, NotUnderstood

STEPS, PEAK, DIV, TARGET, FINAL = 60, 0.01, 10.0, 4.0, 1e4
LOSSES = TARGET + 6 * 0.93 ** np.arange(STEPS) * (1 + 0.1 * np.sin(5.0 * np.arange(STEPS)))
BASE = {
    **{"opt": "normalized-sgd", "lr_max": PEAK, "div_factor": DIV, "loss_star": TARGET},
    **{"sigma_F": 1e-3, "mode": "linear_and_cos", "target": "linear", "rho": 2.0},
    **{"iterations": STEPS, "scheduler": "cos", "final_div_factor": FINAL},
}


def cosine(share):
    return 1 / FINAL + (1 - 1 / FINAL) * (1 + math.cos(math.pi * share)) / 2


def line(share):
    return 1 / FINAL + (1 - 1 / FINAL) * (1 - share)


def square_wsd(steps, k):
    n = int(0.5 * steps)
    return 0.1 + 0.9 * (1 - (max(k - (steps - n), 0) / n) ** 2) if k < steps else 0.1


DECAYS = {
    "cos": ({}, lambda n, k: cosine((k + 1) / n)),
    "linear": ({"scheduler": "linear"}, lambda n, k: line((k + 1) / n)),
    "wsd": (
        {
            **{"scheduler": "wsd", "wsd_fract_decay": 0.5},
            **{"wsd_final_lr_scale": 0.1, "decay_type": "square"},
        },
        square_wsd,
    ),
}


def case(changes, rate, peak_gap, decay, groups=(1.0,), first=PEAK):
    """A case as stored, its arrays from the published algorithm for a rate of the gap."""
    rates, switch = [first], -1
    for t, loss in enumerate(LOSSES):
        switch = t if switch < 0 and loss - TARGET <= peak_gap else switch
        if switch < 0:
            rates.append(min(rate(loss - TARGET), PEAK))
        else:
            rates.append(PEAK * decay(STEPS - switch, t + 1 - switch))
    assert 0 < switch < STEPS - 10
    table = np.outer(rates, groups)
    arrays = {
        **{"loss": LOSSES, "lr_used": table[:-1], "lr_after_last": table[-1]},
        **{"delta_star": np.array(peak_gap), "switch_step": np.array(switch)},
    }
    sidecar = {
        "hyperparameters": BASE | changes,
        "shapes": [[8, 4], [4, 4]],
        "kappa": 2.0,
        "param_groups": len(groups),
    }
    return Case("adaptive_warmup", "made", sidecar, arrays)


def fitted(peak_gap):
    initial = LOSSES[0] - TARGET
    return lambda gap: (
        PEAK / (1 + (DIV - 1) * (initial / gap) * ((gap - peak_gap) / (initial - peak_gap)) ** 2)
    )


PEAK_GAP = quadrature_peak_gap(LOSSES[0] - TARGET, 2e-3, DIV, PEAK)


def assert_passes(made):
    results = replay(made)
    assert results and all(r.passed for r in results), "\n".join(map(str, results))


@pytest.mark.parametrize("name", DECAYS)
def test_decays(name):
    changes, decay = DECAYS[name]
    assert_passes(case(changes, fitted(PEAK_GAP), PEAK_GAP, decay))


def test_groups_of_unequal_rates_and_our_first_step():
    made = case(
        {"official_first_step": False}, fitted(PEAK_GAP), PEAK_GAP, DECAYS["cos"][1],
        groups=(1.0, 0.05, 3.0), first=PEAK / DIV,
    )  # fmt: skip
    assert_passes(made)
    made.arrays["lr_used"][7, 1] *= 1 + 1e-12
    assert not replay(made)[0].passed


@pytest.mark.parametrize("rho", [2.0, 3.0])
def test_constants_by_hand(rho):
    # Scaled so that the peak of the rate is the peak rate.
    peak_gap = (5.0 / ((rho - 1) * 2.0)) ** (1 / rho)
    scale = peak_gap / (5.0 + 3.0 * peak_gap + 2.0 * peak_gap**rho) / PEAK
    k0, k1, k = 5.0 * scale, 3.0 * scale, 2.0 * scale
    made = case(
        {"K0": k0, "K1": k1, "Krho": k, "rho": rho},
        lambda gap: gap / (k0 + k1 * gap + k * gap**rho),
        (k0 / ((rho - 1) * k)) ** (1 / rho),
        DECAYS["cos"][1],
    )
    assert_passes(made)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rho": 3.0}, "rho 3.0 without constants by hand"),
        ({"K0": 1.0}, "only K0 of K0, K1, Krho"),
        ({"mode": "cubic"}, "mode 'cubic'"),
        ({"opt": "adamw"}, "opt 'adamw'"),
        ({"scheduler": "dd"}, "scheduler 'dd'"),
        ({"warmup_steps": 10}, "unknown hyperparameters: warmup_steps"),
    ],
)
def test_what_is_not_understood_is_named(change, reason):
    made = case(change, fitted(PEAK_GAP), PEAK_GAP, DECAYS["cos"][1])
    with pytest.raises(NotUnderstood, match=f"^{reason}"):
        replay(made)
