"""The programs of SOAP and DyKAF: their branches, types and memory, without running them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim.kronecker import step
from jaxopt_lab.parity.dykaf import dykaf as parity_dykaf
from jaxopt_lab.parity.soap import soap as parity_soap
from tests.optim.eigenbasis_runs import build

SHAPES = {"square": (4, 4), "wide": (4, 6)}
LAYOUTS = {
    "heads": MuonDimensionNumbers(0, (1, 2)),
    "stack": MuonDimensionNumbers(1, 2),
    "tall": MuonDimensionNumbers(0, 1),
    "wide": MuonDimensionNumbers(0, 1),
}
MIXED = {"heads": (4, 2, 3), "stack": (4, 4, 6), "tall": (6, 4), "wide": (4, 6)}


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


def inside(eqn):
    return eqn.params["body_jaxpr"].jaxpr


def program(members=None):
    numbers = {"b1": 0.95, "b2": 0.95, "eps": 1e-8, "precondition_frequency": 10}
    options = {"orthogonalizer": "householder", "init": "eps"}
    tx = build("dykaf", options, numbers | {"weight_decay": 0.1})
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


@pytest.mark.parametrize("waits", [False, True])
def test_decompositions_are_in_branches_that_other_steps_skip(waits, monkeypatch):
    """On a GPU, whose host waits, no loop follows the products of a step without a refresh."""
    monkeypatch.setattr(step, "on_gpu", lambda: waits)
    whiles, others = loops(program())
    start, refresh = (primitives(inside(eqn)) for eqn in whiles)
    assert "eigh" in start and {"qr", "sort"} <= refresh and "eigh" not in refresh
    assert not others & {"eigh", "qr", "sort"} and "dot_general" in others
    assert ("cond" in others) == waits
    assert [carried(eqn)[0].shape for eqn in whiles] == [(), ()], "one number decides"


def test_members_share_the_branch_of_the_refresh(monkeypatch):
    """Under `vmap` over members with one counter, its predicate is one number still."""
    monkeypatch.setattr(step, "on_gpu", lambda: True)
    (start, refresh), others = loops(program(members=2))
    (due, *arrays), (starting, *_) = map(carried, (refresh, start))
    assert due.shape == () and {x.shape[0] for x in arrays} == {2}
    assert "cond" in others, "steps without a refresh do not compute both"
    assert starting.shape == (2,), "members start when they start"


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"second_moment": "rank_one"}], ids=str)
def test_types_of_the_state_never_change(options):
    """So that the second call runs what the first one compiled."""
    tx = jol.dykaf(1e-3, matrix_axes=LAYOUTS, eigenbasis=jol.Eigenbasis(**options))
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
    basis = {
        **{"init": "kron", "second_moment": "rank_one", "orthogonalizer": "householder"},
        **{"factor_precision": "highest", "rotation_precision": "highest"},
    }
    spelled = {
        **{"b1": 0.95, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "decay_after_step": True},
        **{"integrator": "parallel", "kron_init_scale": "sqrt_sigma", "one_sided": "code"},
        **{"rank1_eps_in_denominator": False, "precondition_frequency": 10},
        "matrix_axes": {
            **{"embedding": MuonDimensionNumbers(), "kernel": MuonDimensionNumbers()},
            **{"scale": None, "tensor": None},
        },
    }

    def other(**changes):
        changed = {k: v for k, v in changes.items() if k not in basis}
        kept = jol.Eigenbasis(**basis | {k: v for k, v in changes.items() if k in basis})
        return text(parity_dykaf(1e-3, eigenbasis=kept, **spelled | changed), params)

    official = text(jol.dykaf_official(1e-3), params)
    assert official == other()
    for changes in ({"second_moment": "full"}, {"integrator": "ksl"}, {"eps": 1e-7}):
        assert official != other(**changes)


@pytest.mark.parametrize("factory", [parity_dykaf, parity_soap])
@pytest.mark.parametrize("orthogonalizer", ["cholesky_qr", "householder"])
def test_tensors_and_vectors_follow_the_choice_of_orthogonalizer(factory, orthogonalizer):
    """Only Householder's method has a QR decomposition."""
    params = {"scale": jnp.zeros(4), "tensor": jnp.zeros((2, 3, 4))}
    basis = jol.Eigenbasis(orthogonalizer=orthogonalizer)
    tx = factory(1e-3, eigenbasis=basis, precondition_1d=True)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    assert ("qr" in primitives(jaxpr)) == (orthogonalizer == "householder")


def test_describe_counts_factors_and_bases_with_their_leaf():
    shapes = {"bias": (6,), "kernel": (4, 6), "stack": (2, 4, 6), "vocabulary": (12, 4)}
    params = {k: jax.ShapeDtypeStruct(s, "bfloat16") for k, s in shapes.items()}
    layouts = {
        **{"bias": None, "kernel": MuonDimensionNumbers()},
        **{"stack": MuonDimensionNumbers(1, 2), "vocabulary": MuonDimensionNumbers()},
    }

    def rows(**options):
        tx = jol.dykaf(1e-3, matrix_axes=layouts, eigenbasis=jol.Eigenbasis(**options))
        found = jol.describe(tx, params)
        state = jax.eval_shape(tx.init, params)
        assert found.total_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return {r.path[2:-2]: (r.rule, r.state_bytes // 4) for r in found.rows}

    numbers = 2  # age and notfinite_count, one of each a matrix
    matrix = 2 * 24 + 2 * (16 + 36) + numbers  # factors and bases in float32
    assert rows(max_precond_dim=10) == {
        "bias": ("adamw", 1.5 * 6),
        "kernel": ("dykaf", matrix),
        "stack": ("dykaf", 2 * matrix),
        "vocabulary": ("dykaf", 2 * 48 + 2 * 16 + numbers),  # one side alone
    }
    ranked = rows(max_precond_dim=10, second_moment="rank_one")
    assert ranked["kernel"] == ("dykaf", matrix - 24 + 10)
    assert rows(max_precond_dim=3)["kernel"] == ("adamw", 1.5 * 24)


@pytest.mark.parametrize("factory", [jol.dykaf, jol.soap])
def test_optax_finds_the_parameters_in_the_state(factory):
    params = {"bias": jnp.zeros(6), "kernel": jnp.zeros((4, 6))}
    tx = factory(1e-3)
    state = tx.init(params)
    marked = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    moments = [x for x in jax.tree.leaves(marked) if x.shape in ((6,), (4, 6))]
    assert len(moments) == 4 and all((x == 1).all() for x in moments)


@pytest.mark.parametrize(
    ("precision", "dtype", "kept"),
    [
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("highest", "float32", "float32"),
        ("bfloat16", "float64", "float64"),
    ],
)
def test_bases_are_kept_as_rotations_use_them(precision, dtype, kept):
    with jax.enable_x64(True):
        tx = jol.scale_by_soap(
            precondition_frequency=1, eigenbasis=jol.Eigenbasis(rotation_precision=precision)
        )
        params = {"w": jnp.ones((2, 3), dtype)}
        state = tx.init(params)
        for _ in range(2):
            _, state = jax.jit(tx.update)(params, state, params)
        assert state.row_basis["w"].dtype == state.column_basis["w"].dtype == kept
        assert state.row_factor["w"].dtype == jnp.promote_types(dtype, "float32")
