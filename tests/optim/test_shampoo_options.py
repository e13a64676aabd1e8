"""Shampoo's refusals, its routing, its keywords, and gradients that nobody wants to see."""

import functools
import inspect

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim import AdamW, Graft, InverseRoot, Routing
from tests.examples import examples
from tests.optim.runs import fast_jit, normal, run, scan

STACK = MuonDimensionNumbers(1, 2)
# Two matrices in one leaf, each of two blocks.
STACKED = {"w": (2, 4, 6)}


@functools.cache
def stacked_step(stagger=False, **options):
    options = {"precondition_frequency": 1, "eps": 1e-8} | dict(options)
    root = InverseRoot(max_precond_dim=4, stagger=stagger)
    tx = jol.scale_by_shampoo(matrix_axes=STACK, inverse_root=root, **options)
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


def test_gradients_are_refused_that_would_make_sums_overflow():
    """Finite squares, but their sum is not."""
    tx, step = stacked_step(b2=1.0)
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


@pytest.mark.parametrize("bad", [np.nan, 1e25])
def test_matrices_and_vectors_recover_from_a_bad_gradient(bad):
    tx = jol.shampoo(1e-2)
    step = fast_jit(tx.update)
    shapes = {"w": (4, 6), "b": (5,)}
    params = normal(0, shapes)
    state = tx.init(params)
    for t in range(14):  # the bad ones before and after the first roots
        grads = normal(t, shapes)
        if t in (3, 11):
            grads = {k: x * bad for k, x in grads.items()}
        updates, state = step(grads, state, params)
        for name, u in updates.items():
            assert np.isfinite(u).all() and (np.asarray(u) == 0).all() == (t in (3, 11)), (t, name)
            assert np.abs(u).max() < 0.1
    assert finite(state)
    assert state.inner_states["shampoo"].inner_state[0].notfinite_count["w"] == 2


def last_update(grads, scale, **options):
    tx = jol.scale_by_shampoo(precondition_frequency=2, **options)
    updates, _, state = run(tx, {"w": jnp.zeros((4, 6))}, {"w": grads["w"] * scale})
    assert finite(state) and finite(updates)
    return np.asarray(updates["w"][-1], float)


def test_where_the_scale_of_gradients_does_not_matter():
    grads = normal(0, {"w": (4, 6)}, 5)
    wanted = last_update(grads, 1.0)
    for scale in (1e-3, 1e17):
        np.testing.assert_allclose(last_update(grads, scale), wanted, atol=2e-3 * abs(wanted).max())
    # With a ridge of the factors' own size, float32 alone sets the limit.
    relative = {"inverse_root": InverseRoot(relative_eps=True), "graft": Graft(eps=0.0)}
    wanted = last_update(grads, 1.0, **relative)
    for scale in (1e-15, 1e17):
        got = last_update(grads, scale, **relative)
        np.testing.assert_allclose(got, wanted, atol=2e-3 * abs(wanted).max())
    # Far below epsilon the steps of the graft vanish, and those of Shampoo with them.
    assert np.abs(last_update(grads, 1e-30)).max() < 1e-15


def test_roots_of_tiny_gradients_do_not_stop_a_large_one():
    """They make it so large that its square overflows, until the next refresh."""
    tx = jol.scale_by_shampoo(precondition_frequency=2)
    sizes = jnp.array([1e-10, 1e-10, 1e18])[:, None, None]
    grads = {"w": normal(0, {"w": (4, 6)}, 3)["w"] * sizes}
    updates, _, state = run(tx, {"w": jnp.zeros((4, 6))}, grads)
    assert finite(state) and (np.abs(updates["w"][-1]) > 1e-3).all()


@functools.cache
def robust_run():
    shapes = {"matrix": (4, 6), "vector": (5,)}
    root = InverseRoot(max_precond_dim=4)
    tx = jol.scale_by_shampoo(b2=0.9, precondition_frequency=2, inverse_root=root)

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
        assert sorted(len(c) for c in window) == [2, 3, 3]
        assert sorted(np.concatenate(window)) == list(range(8))


def test_no_matrices_at_all():
    params = {"w": jnp.ones((0, 4, 6)), "v": jnp.ones((2, 0, 3))}
    tx = jol.scale_by_shampoo(matrix_axes=STACK, precondition_frequency=1)
    updates = fast_jit(lambda p: tx.update(p, tx.init(p))[0])(params)
    chex.assert_trees_all_equal(updates, params)


def test_decay_follows_its_own_schedule_and_the_mask():
    tx = jol.shampoo(
        lambda count: 0.02 + 0 * count,
        weight_decay=optax.linear_schedule(1.0, 0.0, 2),
        mask={"w": True, "still": False, "b": True},
    )
    params = {"w": jnp.ones((2, 3)), "still": jnp.ones((2, 3)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, step = tx.init(params), fast_jit(tx.update)
    for decay in (1.0, 0.5, 0.0):
        updates, state = step(zeros, state, params)
        np.testing.assert_allclose(updates["w"], -0.02 * decay, rtol=1e-6)
        np.testing.assert_allclose(updates["b"], -0.02 * decay, rtol=1e-6)
        assert (updates["still"] == 0).all()


def test_refused_matrices_do_not_decay():
    tx = jol.shampoo(1e-2, weight_decay=1.0)
    params = {"bad": jnp.ones((2, 3)), "good": jnp.ones((2, 3))}
    grads = {"bad": jnp.full((2, 3), jnp.nan), "good": jnp.zeros((2, 3))}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert (updates["bad"] == 0).all()
    np.testing.assert_allclose(updates["good"], -1e-2, rtol=1e-6)


def test_routing():
    shapes = {"w": (4, 6), "conv": (3, 4, 5), "b": (6,), "scale": (), "embedding": (8, 4)}
    params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}

    def preconditioned(**options):
        rows = jol.describe(jol.shampoo(1e-3, **options), params).rows
        return {r.path[2:-2] for r in rows if r.rule == "shampoo"}

    assert preconditioned() == {"w"}
    assert preconditioned(routing=Routing(on_uncovered="modes")) == {"w", "conv"}
    layouts = dict.fromkeys(shapes) | {"conv": MuonDimensionNumbers(1, 2)}
    assert preconditioned(matrix_axes=layouts) == {"conv"}
    with pytest.raises(ValueError, match=r"leaf \['conv'\] of shape \(3, 4, 5\) has more than two"):
        jol.shampoo(1e-3, routing=Routing(on_uncovered="error")).init(params)
    # Factors, roots, two moments and one counter; nothing grows with the unused modes.
    (row,) = [r for r in jol.describe(jol.shampoo(1e-3), params).rows if r.path == "['w']"]
    assert row.state_bytes == 4 * (2 * 24 + 2 * (16 + 36) + 1)


def test_too_many_modes():
    params = {"w": jnp.ones((2, 2, 2, 2, 2))}
    tx = jol.scale_by_shampoo(inverse_root=InverseRoot(max_precond_dim=3))
    with pytest.raises(ValueError, match=r"leaf \['w'\] of shape .* has 5 modes"):
        tx.init(params)
    jol.scale_by_shampoo().init(params)


def test_other_leaves_take_the_numbers_of_the_method_unless_told():
    params = {"b": jnp.ones(3)}
    grads = {"b": jnp.array([1.0, -2.0, 1e-9])}
    updates, _, _ = scan(jol.shampoo(1e-2, b2=1.0), params, {"b": jnp.stack([grads["b"]] * 3)})
    adam = optax.chain(jol.scale_by_adamw_fallback(b1=0.9), optax.scale(-1e-2))  # b2 of 0.999
    wanted, _, _ = scan(adam, params, {"b": jnp.stack([grads["b"]] * 3)})
    np.testing.assert_allclose(updates["b"], wanted["b"], rtol=1e-6)
    tx = jol.shampoo(1e-2, fallback=AdamW(lr_ratio=0.5))
    halved, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(halved["b"], wanted["b"][0] / 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_steps_as_float32_does(dtype):
    params = {"w": jnp.full((4, 4), 1e-3, dtype), "b": jnp.full(4, 1e-3, dtype)}
    steps = {}
    for to in (dtype, "float32"):
        start = jax.tree.map(lambda x, to=to: x.astype(to), params)
        grads = jax.tree.map(lambda x: jnp.stack([x] * 30), start)
        steps[to], _, state = run(jol.shampoo(1e-3), start, grads)
        assert all(x.dtype == to for x in jax.tree.leaves(steps[to]))
        nu = jax.tree.leaves([s.inner_state[0].nu for s in state.inner_states.values()])
        assert {str(x.dtype) for x in nu} == {"float32"}
    for half, full in zip(*map(jax.tree.leaves, steps.values()), strict=True):
        np.testing.assert_allclose(half.astype("float32"), full, rtol=1e-2)


@pytest.mark.parametrize("rate", [np.float64(1e-3), np.array(1e-3, "bfloat16"), jnp.float32(1e-3)])
def test_updates_have_the_dtype_of_their_leaf_whatever_that_of_the_rate(rate):
    params = {"w": jnp.ones((2, 3), "bfloat16"), "b": jnp.ones(3, "bfloat16")}
    tx = jol.shampoo(rate, weight_decay=np.float64(0.1))
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_injected_hyperparameters():
    params, shapes = normal(0, {"w": (4, 6), "b": (3,)}), {"w": (4, 6), "b": (3,)}
    tx = optax.inject_hyperparams(jol.shampoo)(1e-3, weight_decay=0.1)
    grads = normal(1, shapes, 12)
    a, _, state = run(tx, params, grads)
    b, _, _ = run(jol.shampoo(1e-3, weight_decay=0.1), params, grads)
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-8)
    numbers = {"learning_rate", "b1", "b2", "eps", "precondition_frequency", "weight_decay"}
    assert set(state.hyperparams) == numbers
    state = tx.init(params)
    state.hyperparams["precondition_frequency"] = jnp.asarray(1)
    _, state = fast_jit(tx.update)(params, state, params)
    (root,) = jax.tree.leaves(state.inner_state.inner_states["shampoo"].inner_state[0].roots[0])
    assert not (root == jnp.eye(4)).all()


@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_no_rank_is_promoted(method):
    params = {"stack": jnp.ones((2, 4, 6)), "w": jnp.ones((5, 3)), "b": jnp.ones(3)}
    root = InverseRoot(method=method, relative_eps=method == "newton")
    routing = Routing(on_uncovered="modes")
    tx = jol.shampoo(1e-3, precondition_frequency=1, inverse_root=root, routing=routing)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_forward_differentiation_works_and_reverse_says_why_not():
    tx = jol.shampoo(1e-2, precondition_frequency=1)
    x, direction = normal(0, {"w": (4, 6)}), normal(1, {"w": (4, 6)})
    state = tx.init(x)

    @jax.jit
    def update(grads):
        return tx.update(grads, state, x)[0]["w"]

    _, slope = jax.jvp(update, (x,), (direction,))
    step = 1e-2
    ends = [update({"w": x["w"] + s * direction["w"]}) for s in (step, -step)]
    np.testing.assert_allclose(
        slope, (ends[0] - ends[1]) / (2 * step), atol=5e-3 * abs(slope).max()
    )
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda grads: update(grads).sum())(x)


def test_closures_can_be_hashed():
    """Equinox and Optimistix look through the closures of an optimizer that they are given."""
    seen, todo = set(), [jol.shampoo(1e-3).init, jol.shampoo(1e-3).update]
    while todo:
        fn = todo.pop()
        if id(fn) in seen:
            continue
        seen.add(id(fn))
        for cell in getattr(fn, "__closure__", None) or ():
            value = cell.cell_contents
            assert not isinstance(value, set), fn
            todo += [f for f in jax.tree.leaves(value) if callable(f)]
    assert len(seen) > 10


def test_boxed_parameters_of_linen():
    dense = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, ("fsdp", None)))
    params = dense.init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    tx = jol.shampoo(1e-3)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    placed = jol.state_shardings(tx, params, nn.get_sharding(params, mesh))
    state = jax.jit(tx.init, out_shardings=placed)(params)
    assert (
        state.inner_states["shampoo"].inner_state[0].mu["kernel"].value.sharding.spec[0] == "fsdp"
    )
    updates, _ = fast_jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params) and finite(updates)


BAD = [
    ("b1", 1.0, r"b1: got 1.0, wanted a number in \[0, 1\)"),
    ("b2", 1.5, r"b2: got 1.5, wanted a number in \[0, 1\]"),
    ("eps", -1e-3, "eps: got -0.001, wanted a finite number >= 0"),
    *(
        ("precondition_frequency", f, f"precondition_frequency: got {f}, wanted an integer")
        for f in (0, -1, 2.5, float("inf"))
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_input(name, value, message):
    with pytest.raises(ValueError, match=message):
        jol.scale_by_shampoo(**{name: value})


@pytest.mark.parametrize(
    ("option", "field", "value", "wanted"),
    [
        (InverseRoot, "exponent", 0.4, "the inverse of an integer"),
        (InverseRoot, "exponent", {7: 0.5}, "orders from 1 to 4"),
        (InverseRoot, "exponent", -0.5, "a finite number > 0"),
        (InverseRoot, "exponent", {2: "half"}, "a finite number > 0"),
        (InverseRoot, "method", "qr", "one of newton, eigh"),
        (InverseRoot, "max_precond_dim", 8.5, "an integer"),
        (InverseRoot, "precision", "fp8", "one of "),
        (Graft, "kind", "other", "one of adam, rmsprop, adagrad, sgd, None"),
        (Graft, "b2", 1.0, r"a number in \[0, 1\)"),
        (Graft, "eps", float("nan"), "a finite number >= 0"),
    ],
)
def test_bad_options(option, field, value, wanted):
    with pytest.raises(ValueError, match=rf"{option.__name__}.{field}: got .*, wanted {wanted}"):
        option(**{field: value})


@pytest.mark.parametrize(
    ("keyword", "answer"),
    [
        ("epsilon", "eps="),
        ("max_preconditioner_dim", r"InverseRoot\(max_precond_dim"),
        ("root_method", r"InverseRoot\(method"),
        ("stagger", r"inverse_root=InverseRoot\(stagger=True\)"),
        ("graft_b2", r"Graft\(b2"),
        ("momentum", r"b1=.*optax.trace"),
        ("weight_decay_type", "optax.add_decayed_weights"),
        ("weight_decay_mask", "mask="),
        ("on_uncovered", r"Routing\(on_uncovered"),
        ("adam_b1", r"AdamW\(b1"),
        ("param_shardings", r"MeshWork\(param_shardings"),
        ("kl_factors", "no such option"),
    ],
)
def test_old_keywords_say_where_they_went(keyword, answer):
    for factory, args in ((jol.shampoo, (1e-3,)), (jol.scale_by_shampoo, ())):
        with pytest.raises(
            TypeError, match=f"no argument '{keyword}'; (write|there is) .*{answer}"
        ):
            factory(*args, **{keyword: 1})


def test_bad_input_of_the_ready_optimizer():
    with pytest.raises(ValueError, match="learning_rate: got -1"):
        jol.shampoo(-1.0)
    with pytest.raises(ValueError, match="weight_decay: got -0.1"):
        jol.shampoo(1e-3, weight_decay=-0.1)
    with pytest.raises(ValueError, match="wanted a Python integer, because InverseRoot.stagger"):
        jol.scale_by_shampoo(
            precondition_frequency=jnp.asarray(3), inverse_root=InverseRoot(stagger=True)
        )
    with pytest.raises(ValueError, match=r"matrix_axes of leaf \['w'\]"):
        jol.scale_by_shampoo(matrix_axes=STACK).init({"w": jnp.ones((2, 2))})
    assert len(inspect.signature(jol.shampoo).parameters) <= 14
