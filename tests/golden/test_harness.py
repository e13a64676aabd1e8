"""The replay must fail when it should: wrong numbers, unknown content, broken or missing files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.golden import harness
from tests.golden.__main__ import main
from tests.golden.harness import Check

DATA = Path(__file__).parent / "data" / "lion_muon"
CASE = "signum_m0.9_damp0.9_wd0.1"  # one of the cheapest


@pytest.fixture
def family(tmp_path):
    folder = tmp_path / "lion_muon"
    folder.mkdir()
    for suffix in (".json", ".npz"):
        shutil.copy(DATA / (CASE + suffix), folder)
    return folder


def rewrite(family, change_arrays=None, change_sidecar=None):
    path = family / (CASE + ".npz")
    with np.load(path) as archive:
        arrays = dict(archive)
    if change_arrays:
        change_arrays(arrays)
        np.savez_compressed(path, **arrays)
    if change_sidecar:
        path = path.with_suffix("").with_name(CASE + ".json")
        sidecar = json.loads(path.read_text())
        change_sidecar(sidecar)
        path.write_text(json.dumps(sidecar))


def run(directory, only=""):
    lines = []
    return harness.replay_directory(directory, only, report=lines.append), lines


def test_root_and_family_folder_give_the_same_lines(family):
    passed, lines = run(family.parent)
    assert passed and lines[0].startswith(f"lion_muon/{CASE}  ")
    name, error, tolerance, verdict = lines[0].split()
    assert (name, verdict) == (f"lion_muon/{CASE}", "PASS")
    assert 0 <= float(error) <= float(tolerance) == 1e-12 or float(tolerance) == 1e-11
    assert run(family) == (passed, lines)


def test_only_selects_by_family_and_name(family):
    assert run(family.parent, "lion_muon/signum")[0]
    assert run(family.parent, "damp0.9")[0]
    passed, lines = run(family.parent, "no such case")
    assert not passed and "no case below" in lines[0]


@pytest.mark.parametrize(
    "array", ["params_f64.W1", "state_final_f64.emb.momentum_buffer", "init.vec", "grads.W3"]
)
def test_a_changed_number_fails(family, array):
    def change(arrays):
        arrays[array] = arrays[array].copy()
        arrays[array].flat[3] += 1e-3

    rewrite(family, change)
    passed, lines = run(family)
    assert not passed and "FAIL" in lines[0]


def test_one_nan_fails(family):
    def change(arrays):
        arrays["params_f64.W1"][4, 1, 1] = np.nan

    rewrite(family, change)
    passed, lines = run(family)
    assert not passed and "NaN in different places" in lines[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(optimizer_class="Signum2"), "unknown optimizer class 'Signum2'"),
        (lambda s: s.pop("optimizer_class"), "no optimizer class"),
        (
            lambda s: s["hyperparameters"].update(clip=1.0),
            "unknown hyperparameters of Signum: clip",
        ),
        (lambda s: s["param_shapes"].update(extra=[2, 2]), "array init.extra is missing"),
    ],
)
def test_an_unknown_sidecar_fails_with_the_reason(family, change, reason):
    rewrite(family, change_sidecar=change)
    passed, lines = run(family)
    assert not passed and f"FAIL  not understood: {reason}" in lines[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("velocity.W1", "unknown arrays velocity"),
        ("trace.cosine", "unknown trace trace.cosine"),
        ("state_final_f64.W1.velocity", "unknown buffer state_final_f64.W1.velocity"),
    ],
)
def test_unknown_arrays_fail_with_the_reason(family, name, reason):
    rewrite(family, lambda arrays: arrays.update({name: np.zeros((8, 12))}))
    passed, lines = run(family)
    assert not passed and reason in lines[0]


def test_unknown_family_fails(family):
    family.rename(family.with_name("adam"))
    passed, lines = run(family.parent)
    assert not passed and "unknown family 'adam'" in lines[0]


def test_broken_files_fail_and_do_not_hide_other_cases(family):
    (family / "half.npz").write_bytes(b"PK\x03\x04 truncated")
    (family / "half.json").write_text("{}")
    (family / "alone.json").write_text("{}")
    passed, lines = run(family)
    assert not passed
    assert "alone.npz is missing" in lines[0]
    assert "unreadable" in lines[1]
    assert lines[2].split()[3] == "PASS"
    assert lines[3] == "3 cases, 3 comparisons, 2 failed"


def test_exit_codes(family, capsys):
    assert main([str(family)]) == 0
    assert main([str(family), "--only", "nothing"]) == 1
    rewrite(family, change_sidecar=lambda s: s["hyperparameters"].update(lr=0.002))
    assert main([str(family)]) == 1
    assert "params_f64" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([str(family / "missing")])
    assert stopped.value.code == 2


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "tests.golden", str(DATA), "--only", "lr_schedules"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("lion_muon/lr_schedules  ")


def test_checks():
    assert Check.of("x", [1.0, np.nan], [1.0, np.nan], 0.0).passed
    assert not Check.of("x", [1.0], [[1.0]], 1.0).passed
    assert not Check.of("x", [np.inf], [1.0], 1.0).passed
    assert Check.of("x", [2.02], [2.0], 0.011, relative=True).passed
    assert not harness.Result("empty", ()).passed
