"""Shampoo's refusals, its routing, and gradients that nobody wants to see."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim.kronecker.roots import part_of_stack
from tests.examples import examples
from tests.optim.runs import fast_jit, normal, scan

STACK = MuonDimensionNumbers(1, 2)
# Two matrices in one leaf, each of two blocks.
STACKED = {"w": (2, 4, 6)}


@functools.cache
def stacked_step(**options):
    options = {"precondition_frequency": 1, "epsilon": 1e-8} | dict(options)
    tx = jol.scale_by_shampoo(matrix_axes=STACK, max_preconditioner_dim=4, momentum=0.5, **options)
    return tx, fast_jit(tx.update)


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(tree)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_refused_gradients_leave_no_trace(bad):
    tx, step = stacked_step()
    grads = normal(0, STACKED, 3)["w"]
    grads = grads.at[1, 0, 2, 3].set(bad)  # the first matrix at the second step
    state = tx.init({"w": grads[0]})
    for t in range(3):
        before = state
        update, state = step({"w": grads[t]}, state)
        if t == 1:
            assert (update["w"][0] == 0).all() and (update["w"][1] != 0).all()
            kept, old = (jax.tree.map(lambda x: x[0], s._replace(count=0, notfinite_count=0)[3:])
                         for s in (state, before))  # fmt: skip
            chex.assert_trees_all_equal(kept, old)
    assert state.notfinite_count["w"].tolist() == [1, 0] and int(state.count) == 3 and finite(state)
    # As if that gradient had never come.
    clean = tx.init({"w": grads[0]})
    for t in (0, 2):
        expected, clean = step({"w": grads[t]}, clean)
    np.testing.assert_allclose(update["w"][0], expected["w"][0], rtol=1e-4)


@pytest.mark.parametrize("option", ["b2", "kl_factors"])
def test_gradients_are_refused_that_would_make_factors_overflow(option):
    """Finite squares, but their sum is not; nor are they times the roots of small factors."""
    tx, step = stacked_step(**{option: True})  # a b2 of 1
    grads = normal(0, STACKED, 64)["w"]
    sizes = np.array([1e-8] * 3 + [1.5e18] * 60 + [1.0])  # of the first matrix
    grads = grads.at[:, 0].multiply(sizes[:, None, None])
    state = tx.init({"w": grads[0]})
    refused = []
    for grad in grads:
        before = state
        update, state = step({"w": grad}, state)
        refused.append(int(state.notfinite_count["w"][0] - before.notfinite_count["w"][0]))
        assert (update["w"][1] != 0).all() and state.notfinite_count["w"][1] == 0
        assert finite(state) and finite(update)
        assert (update["w"][0] == 0).all() == bool(refused[-1])
    assert not refused[0] and 0 < sum(refused) and not refused[-1]


@functools.cache
def robust_run():
    shapes = {"matrix": (4, 6), "vector": (5,)}
    tx = jol.scale_by_shampoo(b2=0.9, precondition_frequency=2, max_preconditioner_dim=4)

    def go(grads):
        params = {k: jnp.ones(s, "bfloat16") for k, s in shapes.items()}
        updates, params, state = scan(tx, params, grads)
        return updates, state

    return shapes, fast_jit(go)


@examples(200)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    size=st.floats(-20, 15),
    spread=st.floats(0, 6),
    rank=st.integers(0, 3),
    idle_row=st.booleans(),
    zero_steps=st.integers(0, 4),
)
def test_finite_whatever_comes(seed, size, spread, rank, idle_row, zero_steps):
    shapes, go = robust_run()
    rng = np.random.default_rng(seed)
    scales = np.logspace(0, -spread, 4)[:, None]  # of rows: factors of condition 10^(2 spread)
    matrix = scales * (rng.normal(size=(4, 4, rank)) @ rng.normal(size=(4, rank, 6)))
    grads = {"matrix": matrix, "vector": rng.normal(size=(4, 5))}
    if idle_row:
        matrix[:, 1] = 0
    for g in grads.values():
        g[:zero_steps] = 0
    updates, state = go({k: jnp.asarray(10**size * g, "bfloat16") for k, g in grads.items()})
    assert finite(updates) and finite(state)
    assert state.notfinite_count["matrix"] == 0 and updates["matrix"].dtype == jnp.bfloat16
    for k, u in updates.items():
        assert u.shape == (4, *shapes[k])
        # Adam's steps are of the order of 1, and so are those of a block with their norm.
        assert np.abs(np.asarray(u, float)).max() < 10
        assert (np.asarray(u[:zero_steps]) == 0).all()


def test_staggered_roots_are_refreshed_in_turn():
    tx, step = stacked_step(precondition_frequency=3, stagger=True)
    grads = normal(2, STACKED, 9)["w"]
    state, changed = tx.init({"w": grads[0]}), []
    for t in range(9):
        before = np.concatenate([x["w"].reshape(-1, 4, 4) for x in state.roots[:2]])
        _, state = step({"w": grads[t]}, state)
        after = np.concatenate([x["w"].reshape(-1, 4, 4) for x in state.roots[:2]])
        changed.append(np.flatnonzero((before != after).any(axis=(1, 2))))
    # All at the start, step 3; then a third of the eight at every step, each in its turn.
    assert [len(c) for c in changed[:3]] == [0, 0, 8]
    for window in (changed[3:6], changed[6:9]):
        assert [len(c) for c in window] == [3, 3, 3]
        assert set(np.concatenate(window)) == set(range(8))


def test_parts_of_a_stack_smaller_than_the_frequency():
    old, ones = jnp.zeros((3, 1, 1)), jnp.ones(3)
    for j in range(5):
        new = part_of_stack(lambda x, *_: x + 1, old, ones, old, (jnp.int32(j), 5))
        assert np.flatnonzero(new).tolist() == ([j] if j < 3 else [])


def test_no_matrices_at_all():
    params = {"w": jnp.ones((0, 4, 6)), "v": jnp.ones((2, 0, 3))}
    tx = jol.scale_by_shampoo(matrix_axes=STACK, precondition_frequency=1)
    updates = fast_jit(lambda p: tx.update(p, tx.init(p))[0])(params)
    chex.assert_trees_all_equal(updates, params)


@pytest.mark.parametrize(
    ("kind", "factor"), [("decoupled", 0.02), ("corrected", 0.004), ("independent", 0.2)]
)
def test_decay_types(kind, factor):
    # At a rate of 0.02 under a maximum of 0.1, decay 1: without gradient only the decay moves.
    tx = jol.shampoo(
        lambda count: 0.02 + 0 * count,
        weight_decay=1.0,
        weight_decay_type=kind,
        max_learning_rate=0.1,
        mask={"w": True, "still": False, "b": True},
    )
    params = {"w": jnp.ones((2, 3)), "still": jnp.ones((2, 3)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = fast_jit(lambda p: tx.update(zeros, tx.init(p), p)[0])(params)
    np.testing.assert_allclose(updates["w"], -factor, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -factor, rtol=1e-6)
    assert (updates["still"] == 0).all()


def test_routing():
    shapes = {"w": (4, 6), "conv": (3, 4, 5), "b": (6,), "scale": (), "embedding": (8, 4)}
    params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}

    def preconditioned(**options):
        rows = jol.describe(jol.shampoo(1e-3, **options), params).rows
        return {r.path[2:-2] for r in rows if r.rule == "shampoo"}

    assert preconditioned() == {"w"}
    assert preconditioned(on_uncovered="modes") == {"w", "conv"}
    assert preconditioned(precondition_1d=True) == {"w", "b"}
    layouts = dict.fromkeys(shapes) | {"conv": MuonDimensionNumbers(1, 2)}
    assert preconditioned(matrix_axes=layouts) == {"conv"}
    with pytest.raises(ValueError, match=r"leaf \['conv'\] of shape \(3, 4, 5\) has more than two"):
        jol.shampoo(1e-3, on_uncovered="error").init(params)
    # Factors, roots, two moments and one counter; nothing grows with the unused modes.
    (row,) = [r for r in jol.describe(jol.shampoo(1e-3), params).rows if r.path == "['w']"]
    assert row.state_bytes == 4 * (2 * 24 + 2 * (16 + 36) + 1)


def test_too_many_modes():
    params = {"w": jnp.ones((2, 2, 2, 2, 2))}
    with pytest.raises(ValueError, match=r"leaf \['w'\] of shape .* has 5 modes"):
        jol.scale_by_shampoo(merge="never").init(params)
    jol.scale_by_shampoo().init(params)


BAD = [
    *((name, 1.0, r"must be in \[0, 1\)") for name in ("b1", "b3", "graft_b2", "momentum")),
    ("b2", 1.5, r"must be in \[0, 1\]"),
    ("epsilon", -1e-3, "must be a finite number of at least 0"),
    ("graft_eps", float("nan"), "must be a finite number of at least 0"),
    ("weight_decay", -0.1, "must be a finite number of at least 0"),
    *(("precondition_frequency", f, "integer of at least 1") for f in (0, -1, 2.5, float("inf"))),
    ("start_preconditioning_step", 3, "at least the precondition_frequency of 10"),
    ("max_preconditioner_dim", 0, "a Python integer of at least 1"),
    ("max_preconditioner_dim", 8.5, "a Python integer of at least 1"),
    ("exponent", -0.5, "must be a positive number"),
    ("exponent", 0.4, "method 'newton' needs the inverse of an integer"),
    ("exponent", {7: 0.5}, "entry for order 7; orders are 1 to 4"),
    ("exponent", "half", "must be a Python number"),
    ("root_method", "qr", "choose one of eigh, newton"),
    *((name, "other", "choose one of ") for name in ("graft", "merge", "replicated_work")),
    *((name, "fp8", "choose one of ") for name in ("root_precision", "factor_precision")),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_input(name, value, message):
    word = "method" if name == "root_method" else name
    with pytest.raises(ValueError, match=rf"{word} (is|has) .*{message}"):
        jol.scale_by_shampoo(**{name: value})


def test_bad_input_of_the_ready_optimizer():
    with pytest.raises(ValueError, match="learning_rate is -1"):
        jol.shampoo(-1.0)
    with pytest.raises(ValueError, match="weight_decay_type is 'l1'; choose one of decoupled"):
        jol.shampoo(1e-3, weight_decay_type="l1")
    with pytest.raises(ValueError, match="max_learning_rate is None; .* needs it where"):
        jol.shampoo(optax.constant_schedule(1e-3), weight_decay_type="corrected")
    with pytest.raises(ValueError, match="max_learning_rate is 0"):
        jol.shampoo(0.0, weight_decay_type="independent")
    with pytest.raises(ValueError, match="on_uncovered is 'sgd'"):
        jol.shampoo(1e-3, on_uncovered="sgd")
    with pytest.raises(ValueError, match="weight_decay needs the parameters"):
        tx = jol.scale_by_shampoo(weight_decay=0.1)
        tx.update({"w": jnp.ones((2, 2))}, tx.init({"w": jnp.ones((2, 2))}))
    with pytest.raises(ValueError, match="with stagger=True it must be a Python integer"):
        jol.scale_by_shampoo(stagger=True, precondition_frequency=jnp.asarray(3))
    with pytest.raises(ValueError, match=r"matrix_axes of leaf \['w'\]"):
        jol.scale_by_shampoo(matrix_axes=STACK).init({"w": jnp.ones((2, 2))})
