"""The replay of SOAP and DyKAF must fail when it should."""

import copy
from pathlib import Path

import numpy as np
import pytest

from tests.golden import dykaf, harness, soap

DATA = Path(__file__).parent / "data"


def load(family, name):
    case = harness._load(family, DATA / family / name)
    return case._replace(sidecar=copy.deepcopy(case.sidecar), arrays=dict(case.arrays))


@pytest.mark.parametrize(
    ("array", "where", "what"),
    [
        ("p9x9/params", (20, 3), "p9x9/params"),
        ("p9x9/exp_avg_sq", (5, 2), "p9x9/exp_avg_sq step"),
        ("p9x9/exp_avg", (5, 2), "p9x9/params step"),
        ("p9x9/factor1", (6, 4), "p9x9/factor1"),
        ("p9x9/Q0", (0, 1), "p9x9/"),
        ("p4x3x5/Q2", (2, 1), "p4x3x5/"),
        ("p7/grads", (9, 2), "p7/"),
    ],
)
def test_a_changed_number_fails(array, where, what):
    case = load("soap", "s05_tensor3d_and_precond1d")
    case.arrays[array] = case.arrays[array].copy()
    case.arrays[array][where] += 1e-5
    results = soap.replay(case)
    failed = [check.what for result in results for check in result.checks if not check.passed]
    assert any(name.startswith(what) for name in failed)
    assert all(name.startswith(array.split("/")[0]) for name in failed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s["hyperparameters"].update(clip=1.0), "hyperparameters: clip"),
        (lambda s: s["hyperparameters"].pop("eps"), "hyperparameters: eps"),
        (lambda s: s["spec_options"].update(sweeps=2), "spec_options: sweeps"),
        (lambda s: s["spec_options"].update(f=3), "f is 3, expected 5"),
        (lambda s: s["spec_options"].update(b=0.5), "b is 0.5, expected 0.95"),
        (lambda s: s["spec_options"].update(skip_first_step=False), "skip_first_step is False"),
        (lambda s: s["spec_options"].update(rank1_second_moment=True), "adam_rank_one is False"),
        (lambda s: s.update(momentum="nesterov"), "sidecar entries: momentum"),
        (lambda s: s.update(method="soap"), "method is 'soap', expected 'dykaf'"),
        (lambda s: s.update(dtype="bfloat16"), "dtype bfloat16"),
        (lambda s: s["params"].pop("p7"), "unknown array p7/"),
    ],
)
def test_an_unknown_sidecar_is_not_understood(change, reason):
    case = load("dykaf", "d12_tensor3d_and_precond1d")
    change(case.sidecar)
    with pytest.raises(harness.NotUnderstood, match=reason):
        dykaf.replay(case)


def test_unknown_and_missing_arrays_are_not_understood():
    case = load("dykaf", "d12_tensor3d_and_precond1d")
    case.arrays["p7/velocity"] = np.zeros(3)
    with pytest.raises(harness.NotUnderstood, match="unknown array p7/velocity"):
        dykaf.replay(case)
    del case.arrays["p7/velocity"], case.arrays["p9x9/grads"]
    with pytest.raises(harness.NotUnderstood, match="array p9x9/grads is missing"):
        dykaf.replay(case)


def test_a_state_of_other_parts_fails():
    case = load("soap", "s05_tensor3d_and_precond1d")
    case.sidecar["hyperparameters"]["precondition_1d"] = False
    with pytest.raises(ValueError, match=r"other parts: p7: Q0 factor0"):
        soap.replay(case)
