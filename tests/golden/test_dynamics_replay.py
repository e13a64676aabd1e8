"""The replay of SGD dynamics fails when it should and works on parts of a file."""

from pathlib import Path

import numpy as np
import pytest

from tests.golden import dynamics, harness
from tests.golden.harness import Case, NotUnderstood

STEM = Path(__file__).parent / "data" / "dynamics" / "sgd_dynamics_golden"


@pytest.fixture(scope="module")
def whole():
    return harness._load("dynamics", STEM)


def part(case: Case, section: str, **changes) -> Case:
    """One section alone, with some arrays replaced."""
    sidecar = {section: case.sidecar[section]}
    if section == "A":
        sidecar["A"] = {"rows": [row for row in case.sidecar["A"]["rows"] if row["id"] in (10, 11)]}
        names = [n for n in case.arrays if n.startswith(("A10_", "A11_"))]
    elif section == "B":
        sidecar["B"] = case.sidecar["B"] | {"cases": case.sidecar["B"]["cases"][:1]}
        names = [n for n in case.arrays if n.startswith(("B_", "B0_"))]
    else:
        names = [n for n in case.arrays if n.startswith(section)]
    return case._replace(sidecar=sidecar, arrays={n: case.arrays[n] for n in names} | changes)


@pytest.mark.parametrize("section", "ABCDEF")
def test_sections_stand_alone(whole, section):
    (result,) = dynamics.replay(part(whole, section))
    assert result.passed, str(result)
    assert result.label.endswith(f"[{section}]")


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("A10_var", lambda x: x * (1 + 1e-8)),
        ("A10_mean", lambda x: x + 1e-8),
        ("A11_var_trunc", lambda x: np.nan_to_num(x, nan=1.0)),
        ("B0_cov", lambda x: x * (1 + 1e-8)),
        ("B_replay_w", lambda x: x + 1e-8),
        ("B0_mc_mean", lambda x: x + 0.1),
        ("C_var", lambda x: x * (1 + 1e-8)),
        ("D_rho", lambda x: x + 1e-8),
        ("D_disc_stable", lambda x: ~x),
        ("D_trunc_stable", lambda x: ~x),
        ("E_err", lambda x: x * (1 + 1e-5)),
        ("F_table", lambda x: x + 1e-8),
    ],
)
def test_a_changed_array_fails(whole, array, change):
    changes = {array: change(whole.arrays[array].copy())}
    (result,) = dynamics.replay(part(whole, array[0], **changes))
    assert not result.passed
    assert any(array.split("_mc")[0] in c.what for c in result.checks if not c.passed)


def test_other_sizes(whole):
    """Fewer directions, steps and rates than in the stored file."""
    c = {name: whole.arrays[name] for name in ("C_Gamma", "C_lam", "C_d", "C_var")}
    shorter = part(whole, "C", C_var=c["C_var"][:21])
    assert dynamics.replay(shorter)[0].passed
    fewer = {"E_eta": whole.arrays["E_eta"][:3], "E_err": whole.arrays["E_err"][:3]}
    case = part(whole, "E", **fewer)
    slopes = np.polyfit(np.log(fewer["E_eta"]), np.log(fewer["E_err"]), 1)[0].tolist()
    case = case._replace(sidecar={"E": case.sidecar["E"] | {"slopes": slopes}})
    assert dynamics.replay(case)[0].passed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s, a: s.update(G={}), "unknown sidecar entries: G"),
        (lambda s, a: a.update(G_var=np.ones(3)), "unknown arrays: G_var"),
        (lambda s, a: a.pop("C_d"), "array C_d is missing"),
        (lambda s, a: s.clear(), "neither sections"),
    ],
)
def test_what_is_not_understood(whole, change, reason):
    case = part(whole, "C")
    sidecar, arrays = dict(case.sidecar), dict(case.arrays)
    change(sidecar, arrays)
    with pytest.raises(NotUnderstood, match=reason):
        dynamics.replay(case._replace(sidecar=sidecar, arrays=arrays))
