"""Which steps are recorded, and how recorders are combined."""

import doctest

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.diagnostics import Every, Recorders, Snapshot, find_state, recording
from jaxopt_lab.optim import LionMuonState, lion_muon


class LossRecorder:
    """The smallest recorder: the loss after a plain gradient step on the same minibatch."""

    def __init__(self, name, interval):
        self.name = name
        self.due = Every(interval).due

    def record(self, snapshot):
        later, _ = snapshot.value_and_grad(optax.apply_updates(snapshot.params, snapshot.updates))
        return {"before": float(snapshot.loss), "after": float(later)}


def snapshot(step):
    w = jnp.array([2.0])
    return Snapshot(
        step=step,
        params=w,
        grads=w,
        opt_state=(),
        updates=-0.5 * w,
        loss=2.0,
        value_and_grad=lambda w: (0.5 * jnp.sum(w**2), w),
    )


@pytest.mark.parametrize("interval", [1, 2, 3, 10])
def test_default_steps_are_the_multiples(interval):
    every = Every(interval)
    assert [s for s in range(1, 31) if every.due(s)] == list(range(interval, 31, interval))


def test_two_residues_see_both_kinds_of_alternating_steps():
    # With period 2, step s (1 for the first) is spectral when s is odd.
    trap = [s for s in range(1, 101) if Every(10).due(s)]
    both = [s for s in range(1, 101) if Every(10, residues=(0, 1)).due(s)]
    assert {s % 2 for s in trap} == {0}
    assert {s % 2 for s in both} == {0, 1}
    assert len(both) == 2 * len(trap)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((0,), "interval"), ((4, (4,)), "residues"), ((4, (-1,)), "residues"), ((4, ()), "residues")],
)
def test_bad_schedules_name_the_field(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        Every(*arguments)


def test_recorders_prefix_their_metrics_and_keep_their_own_steps():
    recorders = Recorders([LossRecorder("fast", 2), LossRecorder("slow", 6)])
    assert not recorders.due(1) and recorders.due(2)
    assert recorders.record(snapshot(2)) == {"fast/before": 2.0, "fast/after": 0.5}
    assert set(recorders.record(snapshot(6))) == {
        *("fast/before", "fast/after"),
        *("slow/before", "slow/after"),
    }


def test_names_must_differ():
    with pytest.raises(ValueError, match="two share a name"):
        Recorders([LossRecorder("a", 1), LossRecorder("a", 2)])


def test_find_state_looks_into_chains_and_partitions():
    tx = optax.chain(optax.clip_by_global_norm(1.0), lion_muon(0.1))
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    found = find_state(tx.init(params), LionMuonState)
    np.testing.assert_array_equal(found.mu["w"], np.zeros((3, 4)))
    with pytest.raises(ValueError, match="holds no LionMuonState"):
        find_state(optax.adam(0.1).init(params), LionMuonState)


def test_doctests():
    results = doctest.testmod(recording)
    assert results.attempted and not results.failed
