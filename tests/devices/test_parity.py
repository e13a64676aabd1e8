"""What the command relies on: it passes where meshes agree, and sees where they do not."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxopt_lab.core import whole_matrices
from tests.devices import __main__ as command
from tests.devices import parity


@pytest.mark.parametrize("kind", parity.KINDS, ids=str)
def test_a_mesh_that_agrees_passes(kind):
    assert parity.parity("lion_muon_p2", "fsdp", kind, 2).passed


def test_a_wrong_exchange_is_seen(monkeypatch):
    give_back = whole_matrices._give_back
    monkeypatch.setattr(whole_matrices, "_give_back", lambda *given: 2 * give_back(*given))
    assert not parity.parity("lion_muon_p1", "fsdp", AxisType.Auto, 2).passed


def test_nan_is_the_worst_difference():
    tree = {"a": np.array([1.0, np.nan]), "b": np.array([3.0])}
    wanted = {"a": np.array([1.0, 2.0]), "b": np.array([1.0])}
    assert np.isnan(parity.difference(tree, wanted))
    assert not parity.Parity("", "", "", np.nan, 1.0).passed


def test_the_table_names_what_failed(capsys, monkeypatch):
    rows = [("adamw", "fsdp 2, Auto", "ok", ""), ("SIGTERM", "all on data", "FAILED", "status 1")]
    monkeypatch.setattr(command, "_rows", lambda only: iter(rows))
    assert command.main([]) == 1
    out = capsys.readouterr().out
    assert "status 1" in out and "1 passed, 1 failed" in out and jax.__version__ in out
    monkeypatch.setattr(command, "_rows", lambda only: iter(rows[:1]))
    assert command.main([]) == 0
