"""Properties of DyKAF as an optimizer, in double precision.

Those of its factors alone are in tests/core/test_kronecker.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.core.kronecker import ksl_step
from tests.optim.eigenbasis_runs import (
    NEVER,
    NUMBERS,
    RATE,
    build,
    delayed_adam,
    draw,
    orthogonal,
    reordered,
    run,
    turned,
)

SHAPES = {"square": (4, 4), "wide": (4, 6)}
STEPS = 9
# Four leaves of seven matrices, all of them (4, 6) or the transpose.
LAYOUTS = {
    "heads": MuonDimensionNumbers(0, (1, 2)),
    "stack": MuonDimensionNumbers(1, 2),
    "tall": MuonDimensionNumbers(0, 1),
    "wide": MuonDimensionNumbers(0, 1),
}
MIXED = {"heads": (4, 2, 3), "stack": (4, 4, 6), "tall": (6, 4), "wide": (4, 6)}

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


def all_close(a, b, atol=1e-10):
    chex.assert_trees_all_close(a, b, rtol=0, atol=atol)


@functools.cache
def usual(**options):
    """One run of the defaults that many tests look at."""
    return run("dykaf", draw(0, SHAPES, STEPS), params=draw(1, SHAPES), **options)


def test_first_bases_are_the_singular_vectors():
    """From multiples of the identity, for distinct singular values; by decreasing value."""
    grads = draw(0, SHAPES, 1)
    state = run("dykaf", grads, init="eps").state(1)
    for name in SHAPES:
        u, sizes, vh = np.linalg.svd(grads[name][0], full_matrices=False)
        k = len(sizes)
        close(np.abs(state.row_basis[name].T @ u), np.eye(4))
        close(np.abs(state.column_basis[name][:, :k].T @ vh.T), np.eye(k))


def test_kronecker_start_and_the_step_after_it():
    grads = draw(0, SHAPES, STEPS)
    state = usual().state(1)
    b = NUMBERS["b2"]
    for name in SHAPES:
        u, sizes, vh = np.linalg.svd(grads[name][0])
        start = [sizes[0] * np.outer(x, x) for x in (u[:, 0], vh[0])]
        with jax.enable_x64(True):
            want = ksl_step(*map(jnp.asarray, (*start, grads[name][0])), decay=b, weight=1 - b)
        close(state.row_factor[name], want[0])
        close(state.column_factor[name], want[1])
        close(np.abs(state.row_basis[name][:, 0] @ u[:, 0]), 1)
        close(np.abs(state.column_basis[name][:, 0] @ vh[0]), 1)


@pytest.mark.parametrize("options", [{}, {"integrator": "parallel"}, {"init": "eps"}], ids=str)
def test_turned_axes_turn_the_steps(options):
    """The whole optimizer commutes with W -> P W Q^T; first bases are a choice, and turned too."""
    grads = draw(0, SHAPES, STEPS)
    rows = {k: orthogonal(1, s[0]) for k, s in SHAPES.items()}
    columns = {k: orthogonal(2, s[1]) for k, s in SHAPES.items()}

    def turn(tree):
        return jax.tree.map(lambda x, p, q: p @ x @ q.T, tree, rows, columns)

    plain = run("dykaf", grads, eps=0.0, **options)
    later = jax.tree.map(lambda g: g[1:], turn(grads))
    state = turned(plain.state(1), rows, columns)
    other = run("dykaf", later, eps=0.0, state=state, **options)
    want = jax.tree.map(lambda x: x[1:], turn(plain.directions))
    all_close(other.directions, want, atol=1e-7)
    assert np.abs(want["wide"]).max() > 1


def test_order_and_signs_of_basis_columns_are_a_choice():
    """And the refresh, at the third step and after, puts shuffled columns into order."""
    rest = jax.tree.map(lambda g: g[2:], draw(0, SHAPES, STEPS))
    state = run("dykaf", draw(0, SHAPES, STEPS), precondition_frequency=2).state(2)
    plain = run("dykaf", rest, state=state, precondition_frequency=3)
    other = run("dykaf", rest, state=reordered(state, 5), precondition_frequency=3)
    all_close(other.directions, plain.directions)
    assert not np.allclose(other.states.mu["wide"][0], plain.states.mu["wide"][0])


def test_without_sides_it_is_adam_that_ignores_the_first_gradient():
    grads = draw(0, {"wide": (4, 6)}, STEPS)
    found = run("dykaf", grads, max_precond_dim=0)
    close(found.directions["wide"], delayed_adam(grads["wide"]))


@pytest.mark.parametrize("max_precond_dim", [0, None])
def test_zero_gradients_after_the_first_leave_pure_decay(max_precond_dim):
    shapes = SHAPES if max_precond_dim is None else {"wide": (4, 6)}
    params, grads = draw(1, shapes), draw(0, shapes, 4)
    for grad in grads.values():
        grad[1:] = 0
    options = {} if max_precond_dim is None else {"max_precond_dim": max_precond_dim}
    found = run("dykaf", grads, params=params, weight_decay=0.5, **options)
    shrinking = (1 - RATE * 0.5) ** np.arange(4)
    close(found.params["wide"], shrinking[:, None, None] * params["wide"])


def test_zero_gradients_shrink_the_factors_alone():
    started = usual().state(STEPS)
    b = NUMBERS["b2"]
    zeros = {k: np.zeros((1, *s)) for k, s in SHAPES.items()}
    state = run("dykaf", zeros, state=started, precondition_frequency=NEVER).state(1)
    for name in ("row_factor", "column_factor"):
        shrunk = jax.tree.map(lambda x: np.sqrt(b) * x, getattr(started, name))
        all_close(getattr(state, name), shrunk, atol=1e-13)
    chex.assert_trees_all_equal(state.row_basis, started.row_basis)
    chex.assert_trees_all_equal(state.column_basis, started.column_basis)


def test_bases_change_every_so_many_steps_and_at_no_other():
    for frequency in (1, 3, NEVER):
        states = usual(precondition_frequency=frequency).states
        for name in ("row_basis", "column_basis"):
            for basis in getattr(states, name).values():
                changed = [not np.array_equal(basis[t], basis[t - 1]) for t in range(1, STEPS)]
                assert changed == [t % frequency == 0 for t in range(1, STEPS)]
                gram = basis.mT @ basis
                close(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=1e-12)


def test_refresh_follows_the_factors():
    """One power iteration in decreasing order, and what is stored in the bases goes with them."""
    never = usual(precondition_frequency=NEVER).state(4)
    state = usual().state(4)
    for name in SHAPES:
        orders = []
        for side in ("row", "column"):
            factor = getattr(never, f"{side}_factor")[name]
            old = getattr(never, f"{side}_basis")[name]
            orders.append(np.argsort(-np.diag(old.T @ factor @ old)))
            want = np.linalg.qr(factor @ old[:, orders[-1]])[0]
            close(np.abs(want.T @ getattr(state, f"{side}_basis")[name]), np.eye(len(want)))
        close(state.nu[name], never.nu[name][orders[0]][:, orders[1]], atol=0)
        momenta = [s.row_basis[name] @ s.mu[name] @ s.column_basis[name].T for s in (never, state)]
        close(*momenta)


DECAY = 0.5


def test_decay_beside_the_step_or_after_it():
    free = usual(precondition_frequency=NEVER).directions
    options = {"precondition_frequency": NEVER, "weight_decay": DECAY}
    beside, after = usual(**options), usual(**options, decay_rate=RATE)
    for name, w in draw(1, SHAPES).items():
        v = w
        for t in range(STEPS):
            if t > 0:  # nothing happens at the first gradient
                w = w - RATE * free[name][t] - RATE * DECAY * w
                v = (1 - RATE * DECAY) * (v - RATE * free[name][t])
            close(beside.params[name][t], w)
            close(after.params[name][t], v)
    assert not np.allclose(beside.params["wide"], after.params["wide"], atol=1e-3)


def test_first_gradient_without_skipping():
    """It enters its own basis: every singular value becomes 1, and weights decay at once."""
    grads, params = draw(0, SHAPES, STEPS), draw(1, SHAPES)
    options = {"init": "eps", "weight_decay": DECAY, "skip_first_step": False}
    found = run("dykaf", grads, params=params, **options)
    for name in SHAPES:
        u, _, vh = np.linalg.svd(grads[name][0], full_matrices=False)
        close(found.directions[name][0], u @ vh + DECAY * params[name], atol=1e-6)
        changed = [not np.array_equal(*found.states.row_basis[name][t - 1 : t + 1])
                   for t in range(1, STEPS)]  # fmt: skip
        assert changed == [(t + 1) % 3 == 0 for t in range(1, STEPS)], (
            "the third, sixth, ... update"
        )
    assert found.states.age["wide"].tolist() == list(range(2, STEPS + 2))


def mixed_gradients():
    """One matrix waits for its first gradient, one starts with rank one, all others are usual."""
    grads = draw(0, MIXED, STEPS)
    grads["stack"][:2, 1] = 0
    grads["stack"][0, 2] = np.outer(grads["stack"][0, 2][:, 0], grads["stack"][0, 2][0])
    return grads


@functools.cache
def mixed_run(**options):
    options = {"weight_decay": 0.1, **options}
    return run("dykaf", mixed_gradients(), params=draw(1, MIXED), layouts=LAYOUTS, **options)


def matrices(tree):
    """The seven matrices of a mixed tree, each after the axes that come first."""
    out = {f"stack{i}": tree["stack"][..., i, :, :] for i in range(4)}
    heads = tree["heads"]
    return out | {
        **{"wide": tree["wide"], "tall": tree["tall"]},
        "heads": heads.reshape((*heads.shape[:-3], 4, 6)),
    }


def test_leaves_and_stacks_equal_matrices_alone():
    """Also one that starts late, and attention heads as the matrix that they form."""
    together = mixed_run()
    grads = matrices(mixed_gradients())
    params = matrices(draw(1, MIXED))
    found = matrices(together.params)
    for name in grads:
        alone = run("dykaf", {"w": grads[name]}, params={"w": params[name]}, weight_decay=0.1)
        close(found[name], alone.params["w"], atol=1e-9)
    assert together.states.age["stack"].T.tolist() == [
        list(range(1, STEPS + 1)),
        [0, 0, *range(1, STEPS - 1)],
        *[list(range(1, STEPS + 1))] * 2,
    ]
    np.testing.assert_array_equal(found["stack1"][:3], np.broadcast_to(params["stack1"], (3, 4, 6)))
    assert np.abs(found["stack1"][3] - params["stack1"]).max() > 1e-3


def test_staggered_refreshes_take_turns():
    """Of seven matrices three, three and one; each is what a refresh at that step gives."""
    period = 3
    # Factors of full rank from the start, so that all basis vectors are determined.
    options = {"init": "eps", "layouts": LAYOUTS}
    staggered = mixed_run(stagger=True, precondition_frequency=period, init="eps")
    grads = mixed_gradients()
    refreshed = np.zeros((7, STEPS), bool)
    for t in range(1, STEPS):
        state = staggered.state(t)
        one = jax.tree.map(lambda g, t=t: g[t : t + 1], grads)
        with_refresh, without = (
            sides(run("dykaf", one, state=state, precondition_frequency=f, **options).state(1))
            for f in (1, NEVER)
        )
        after = sides(staggered.state(t + 1))
        for i, name in enumerate(after):
            refreshed[i, t] = not np.array_equal(after[name][0], without[name][0])
            for x, y in zip(after[name], (with_refresh if refreshed[i, t] else without)[name],
                            strict=True):  # fmt: skip
                close(x, y)
    # Nothing is refreshed at the start, and one matrix has only zeros until its third gradient.
    np.testing.assert_array_equal(refreshed[:, 0], False)
    started = np.array([name != "stack1" for name in after])
    for first in (1, 4, 6):
        counts = refreshed[:, first : first + period].sum(axis=1)
        np.testing.assert_array_equal(counts[started], 1)
    np.testing.assert_array_equal(refreshed[~started, 3:].sum(), 2)
    np.testing.assert_array_equal(refreshed[started, 1:].sum(axis=0) <= 3, True)


def sides(state):
    """Bases and moments of each of the seven matrices."""
    fields = (state.row_basis, state.column_basis, state.mu, state.nu)
    out = {f"stack{i}": [x["stack"][i] for x in fields] for i in range(4)}
    return out | {name: [x[name] for x in fields] for name in ("heads", "tall", "wide")}


def loops(jaxpr):
    """Every `while` of a program, not looking inside, and all other primitives outside of one."""
    whiles, others = [], set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            whiles.append(eqn)
            continue
        others.add(eqn.primitive.name)
        for inner in jaxprs_in_params(eqn.params):
            more, names = loops(inner)
            whiles, others = whiles + more, others | names
    return whiles, others


def primitives(jaxpr):
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        for inner in jaxprs_in_params(eqn.params):
            names |= primitives(inner)
    return names


def carried(eqn):
    """What a loop hands from round to round, the predicate first."""
    return eqn.params["body_jaxpr"].in_avals[eqn.params["body_nconsts"] :]


def program(members=None):
    tx = build("dykaf", {"orthogonalizer": "householder", "init": "eps"}, {"weight_decay": 0.1})
    params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
    state = tx.init(params)
    if members is None:
        return jax.make_jaxpr(tx.update)(params, state, params).jaxpr

    def copies(tree):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (members, *x.shape)), tree)

    axes = jax.tree.map(lambda _: 0, state)._replace(count=None)
    mapped = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))
    states = copies(state)._replace(count=state.count)
    return jax.make_jaxpr(mapped)(copies(params), states, copies(params)).jaxpr


def test_decompositions_are_in_branches_that_other_steps_skip():
    whiles, others = loops(program())
    start, refresh = (primitives(eqn.params["body_jaxpr"].jaxpr) for eqn in whiles)
    assert "eigh" in start and {"qr", "sort"} <= refresh and "eigh" not in refresh
    assert not others & {"eigh", "qr", "sort"} and "dot_general" in others
    assert [carried(eqn)[0].shape for eqn in whiles] == [(), ()], "one number decides"


def test_members_share_the_branch_of_the_refresh():
    """Under `vmap` over members with one counter, the predicate is one number still."""
    start, refresh = loops(program(members=2))[0]
    (due, *arrays), (starting, *_) = map(carried, (refresh, start))
    assert due.shape == () and {x.shape[0] for x in arrays} == {2}
    assert starting.shape == (2,), "members start when they start"


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"rank1_second_moment": True}], ids=str)
def test_types_of_the_state_never_change(options):
    """So that the second call runs what the first one compiled."""
    tx = jol.dykaf(1e-3, matrix_axes=LAYOUTS, **options)
    params = {k: jnp.zeros(s, "bfloat16") for k, s in MIXED.items()}

    def types(tree):
        return jax.tree.map(jax.typeof, tree)

    first = tx.init(params)
    second = jax.eval_shape(tx.update, params, first, params)[1]
    assert types(first) == types(second)
    weak = [x.weak_type for x in jax.tree.leaves(types(first)) + jax.tree.leaves(types(second))]
    assert not any(weak)


def text(tx, params):
    """The programs of `init` and `update`."""
    state = jax.eval_shape(tx.init, params)
    update = jax.make_jaxpr(tx.update)(params, state, params)
    return str(jax.make_jaxpr(tx.init)(params)) + str(update)


def test_the_released_configuration_spelled_out():
    shapes = {"embedding": (9, 4), "kernel": (4, 6), "scale": (4,), "tensor": (2, 3, 4)}
    params = {k: jnp.zeros(s) for k, s in shapes.items()}
    spelled = {
        **{"b1": 0.95, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "decay_after_step": True},
        **{"integrator": "parallel", "init": "kron", "kron_init_scale": "sqrt_sigma"},
        **{"one_sided": "code", "rank1_second_moment": True, "rank1_eps_in_denominator": False},
        **{"precondition_frequency": 10, "on_uncovered": "modes", "orthogonalizer": "householder"},
        **{"factor_precision": "highest", "rotation_precision": "highest"},
        "matrix_axes": {
            **{"embedding": MuonDimensionNumbers(), "kernel": MuonDimensionNumbers()},
            **{"scale": None, "tensor": None},
        },
    }
    official = text(jol.dykaf_official(1e-3), params)
    assert official == text(jol.dykaf(1e-3, **spelled), params)
    for name, value in {"rank1_second_moment": False, "integrator": "ksl", "eps": 1e-7}.items():
        assert official != text(jol.dykaf(1e-3, **spelled | {name: value}), params)


def test_describe_counts_factors_and_bases_with_their_leaf():
    shapes = {"bias": (6,), "kernel": (4, 6), "stack": (2, 4, 6), "vocabulary": (12, 4)}
    params = {k: jax.ShapeDtypeStruct(s, "bfloat16") for k, s in shapes.items()}
    layouts = {
        **{"bias": None, "kernel": MuonDimensionNumbers()},
        **{"stack": MuonDimensionNumbers(1, 2), "vocabulary": MuonDimensionNumbers()},
    }

    def rows(**options):
        found = jol.describe(jol.dykaf(1e-3, matrix_axes=layouts, **options), params)
        state = jax.eval_shape(jol.dykaf(1e-3, matrix_axes=layouts, **options).init, params)
        assert found.total_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return {r.path[2:-2]: (r.rule, r.state_bytes // 4) for r in found.rows}

    numbers = 2  # age and rejected, one of each a matrix
    matrix = 2 * 24 + 2 * (16 + 36) + numbers
    assert rows(max_precond_dim=10) == {
        "bias": ("adamw", 2 * 6 + numbers),
        "kernel": ("dykaf", matrix),
        "stack": ("dykaf", 2 * matrix),
        "vocabulary": ("dykaf", 2 * 48 + 2 * 16 + numbers),  # one side alone
    }
    ranked = rows(max_precond_dim=10, rank1_second_moment=True)
    assert ranked["kernel"] == ("dykaf", matrix - 24 + 10)
    assert rows(max_precond_dim=3)["kernel"] == ("adamw", 2 * 24 + numbers)


@pytest.mark.parametrize("factory", [jol.dykaf, jol.soap])
def test_optax_finds_the_parameters_in_the_state(factory):
    params = {"bias": jnp.zeros(6), "kernel": jnp.zeros((4, 6))}
    tx = factory(1e-3)
    state = tx.init(params)
    marked = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    moments = [x for x in jax.tree.leaves(marked) if x.shape in ((6,), (4, 6))]
    assert len(moments) == 4 and all((x == 1).all() for x in moments)
