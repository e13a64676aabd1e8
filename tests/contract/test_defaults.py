"""The contract at default options: finite, guarded, of stable types, for every public factory."""

import functools
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from tests.contract.not_yet import NOT_YET
from tests.contract.optimizers import DIRECTIONS, FACTORIES, SCALE_FREE, WHOLE_MODEL
from tests.contract.trees import plain

HALVES = ("bfloat16", "float16")
BAD = {"nan": jnp.nan, "inf": jnp.inf, "huge": 1e25}
SCALES = {"tiny": 2.0**-99, "small": 2.0**-33, "large": 2.0**33, "huge": 2.0**59}
RATES = {
    "float64": np.float64(1e-3),
    "float32": np.float32(1e-3),
    "bfloat16": np.array(1e-3, jnp.bfloat16),
}


def every(names=FACTORIES, cases=("",)):
    """Parametrise over factories and cases; what `NOT_YET` lists under this test must fail."""

    def decorate(test):
        row = test.__name__.removeprefix("test_")
        params = []
        for name in names:
            for case in cases:
                key = (row, name, case) if case else (row, name)
                marks = [pytest.mark.xfail(strict=True)] if key in NOT_YET else []
                values = (name, case) if case else (name,)
                params.append(pytest.param(*values, marks=marks, id="-".join(values)))
        argument = "name,case" if cases != ("",) else "name"
        return pytest.mark.parametrize(argument, params)(test)

    return decorate


@functools.cache
def make(name):
    factory, kwargs = FACTORIES[name]
    return factory(**kwargs)


def parameters(name, dtype="float32"):
    tree = plain()
    if name in DIRECTIONS:
        tree = [layer["kernel"] for layer in tree["layers"]]
    return jax.tree.map(lambda p: p.astype(dtype), tree)


def normal(params, seed):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten([g.astype(x.dtype) for g, x in zip(drawn, leaves, strict=True)])


def step_of(tx):
    # A loss for those that follow it; the others ignore what they do not know.
    def step(grads, state, params, value=2.0):
        updates, state = tx.update(grads, state, params, value=value)
        return updates, optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(name):
    """One jitted step a factory, shared by the tests; its state and parameters are given away."""
    return jax.jit(step_of(make(name)), donate_argnums=(1, 2))


def run(name, grads, params=None):
    """One step a gradient; updates, parameters and states after each."""
    params = parameters(name) if params is None else params
    state, seen = make(name).init(params), []
    for i, gradient in enumerate(grads):
        given = jax.tree.map(jnp.copy, (state, params))
        updates, params, state = compiled(name)(gradient, *given, 2.0 - 0.1 * i)
        seen.append((updates, params, state))
    return seen


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def not_finite(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(p) for p, x in found if not np.isfinite(x).all()]


def check_three_steps(tx, step, params, start_grads):
    """The whole state is looked at, and three steps: some take none at the first gradient.

    What `init` returns is donated as it is: no two leaves may be one buffer.
    """
    state = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    before, start, moved = types(state), types(params), []
    for i, gradient in enumerate(start_grads):
        updates, params, state = step(gradient, state, params, 2.0 - 0.1 * i)
        assert not not_finite((updates, params, state))
        assert types(state) == before
        assert types(updates) == types(params) == start
        moved.append([bool(u.any()) for u in jax.tree.leaves(updates)])
    # Steps may be too small for a half-precision parameter, updates are not.
    assert all(map(any, zip(*moved, strict=True)))


@every(cases=("float32", *HALVES))
def test_three_steps(name, case):
    params = parameters(name, case)
    check_three_steps(make(name), compiled(name), params, [normal(params, i) for i in range(3)])


@every(cases=("nan_state", "zero_updates", "dtype", "late_dtype"))
def test_three_steps_can_fail(name, case):
    tx, params = make(name), parameters(name)

    def broken(grads, state, params, value):
        updates, new, after = compiled(name)(grads, state, params, value)
        if case == "nan_state":
            leaves, treedef = jax.tree.flatten(after)
            spoilt = [x * jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves]
            after = treedef.unflatten(spoilt)
            if not floats(after):
                pytest.skip("no float in the state")
        elif case == "zero_updates":
            updates = jax.tree.map(jnp.zeros_like, updates)
        elif case == "dtype":
            updates = jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates)
        else:
            after = jax.tree.map(lambda x: x.astype(jnp.float16), after)
        return updates, new, after

    with pytest.raises(AssertionError):
        check_three_steps(tx, broken, params, [normal(params, i) for i in range(3)])


@every(tuple(n for n in FACTORIES if n != "adaptive_warmup"), HALVES)
def test_half_precision_parameters_step_as_float32(name, case):
    # Gradients whose squares float16 cannot hold.
    params = parameters(name)
    grads = [jax.tree.map(lambda g: 1e-3 * g, normal(params, i)) for i in range(3)]
    exact = run(name, grads)
    half = [jax.tree.map(lambda g: g.astype(case), g) for g in grads]
    rounded = run(name, half, parameters(name, case))
    for path, leaf in jax.tree_util.tree_leaves_with_path(rounded[-1][2]):
        if "nu" in jax.tree_util.keystr(path) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert leaf.dtype == jnp.float32, path
    for a, b in zip(*(jax.tree.leaves(x[-1][0]) for x in (exact, rounded)), strict=True):
        size, other = (float(jnp.linalg.norm(x.astype(jnp.float32))) for x in (a, b))
        assert 0.7 * size < other < 1.4 * size, (a.shape, size, other)


def spoilt(tree, value):
    """The tree with this value in the first entry of the first kernel and bias."""
    if isinstance(tree, list):
        return [tree[0].at[0, 0].set(value), tree[1]]
    layer = {k: x.at[(0,) * x.ndim].set(value) for k, x in tree["layers"][0].items()}
    return tree | {"layers": [layer, tree["layers"][1]]}


@every(tuple(n for n in FACTORIES if n != "adaptive_warmup"), tuple(BAD))
def test_what_is_not_finite_is_refused(name, case):
    params = parameters(name)
    grads = [normal(params, i) for i in range(6)]
    grads[2] = spoilt(grads[2], BAD[case])
    seen = run(name, grads)
    # Both an odd number of steps: spectral steps and steps by sign differ in size.
    before, bad, after, later = seen[1], seen[2], seen[3], seen[5]
    assert not not_finite((bad, after, later))
    touched = jax.tree.leaves(spoilt(jax.tree.map(jnp.zeros_like, params), 1.0))

    def moved(a, b):
        pairs = zip(*(jax.tree.leaves(t[1]) for t in (a, b)), strict=True)
        return [np.asarray(x != y) for x, y in pairs]

    for mask, at in zip(moved(before, bad), touched, strict=True):
        assert not (mask & (np.asarray(at) == 1)).any()  # decay included
        assert np.asarray(at).any() or mask.any()  # the other leaves go on
    for mask, at in zip(moved(after, later), touched, strict=True):
        assert mask[np.asarray(at) == 1].all()  # the next good gradients move it
    sizes = [float(optax.tree.norm(x[0])) for x in (before, later)]
    assert 0.2 < sizes[1] / sizes[0] < 5


@every(SCALE_FREE, tuple(SCALES))
def test_scale_never_matters(name, case):
    grads = [normal(parameters(name), i) for i in range(3)]
    scaled = [jax.tree.map(lambda g: SCALES[case] * g, g) for g in grads]
    for one, other in zip(run(name, grads), run(name, scaled), strict=True):
        for a, b in zip(*(jax.tree.leaves(x[0]) for x in (one, other)), strict=True):
            if a.ndim == 2 and a.shape[0] != 12:  # embeddings are AdamW's
                assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(a)
            assert np.isfinite(b).all()


@every(tuple(n for n in WHOLE_MODEL if n != "adaptive_warmup"), tuple(RATES))
def test_rates_of_numpy_keep_dtypes(name, case):
    tx, params = FACTORIES[name][0](RATES[case]), parameters(name, "bfloat16")
    state = jax.eval_shape(tx.init, params)
    updates, _, after = jax.eval_shape(step_of(tx), params, state, params)
    assert types(updates) == types(params) and types(after) == types(state)


@every()
def test_hyperparameters_can_be_injected(name):
    factory, kwargs = FACTORIES[name]
    tx, params = optax.inject_hyperparams(factory)(**kwargs), parameters(name)
    state = jax.eval_shape(tx.init, params)
    updates, _, after = jax.eval_shape(step_of(tx), params, state, params)
    assert types(updates) == types(params) and types(after) == types(state)


@every(tuple(n for n in FACTORIES if n != "row_descent"))  # has no average
def test_injected_numbers_have_the_dtype_of_the_parameters_or_what_one_asks_for(name):
    factory, kwargs = FACTORIES[name]
    params = parameters(name, "bfloat16")

    def dtypes(**options):
        tx = optax.inject_hyperparams(factory, **options)(**kwargs)
        state = jax.eval_shape(tx.init, params)
        updates, _, after = jax.eval_shape(step_of(tx), params, state, params)
        assert types(updates) == types(params) and types(after) == types(state)
        return {str(x.dtype) for x in state.hyperparams.values()} - {"int32"}

    # In bfloat16 a decay of 0.999 is 1, so this is said.
    with pytest.warns(UserWarning, match="hyperparam_dtype=jnp.float32"):
        assert dtypes() == {"bfloat16"}
    assert dtypes(hyperparam_dtype=jnp.float32) == {"float32"}


@every()
def test_state_is_plain_arrays(name):
    state = make(name).init(parameters(name))
    written = flax.serialization.to_bytes(state)
    read = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), written)
    jax.tree.map(np.testing.assert_array_equal, read, state)


@every()
def test_rank_promotion(name):
    tx, params = make(name), parameters(name)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(step_of(tx), params, jax.eval_shape(tx.init, params), params)


@every(
    tuple(n for n in FACTORIES if "weight_decay" in inspect.signature(FACTORIES[n][0]).parameters)
)
def test_weight_decay_as_a_schedule(name):
    factory, kwargs = FACTORIES[name]
    params = parameters(name)
    tx = factory(**kwargs, weight_decay=lambda count: 0.1 / (1 + count))
    state = jax.eval_shape(tx.init, params)
    updates, _, _ = jax.eval_shape(step_of(tx), params, state, params)
    assert types(updates) == types(params)


@every(cases=("complex", "function"))
def test_leaves_no_optimizer_can_move_are_named(name, case):
    odd = jnp.ones((6, 8), jnp.complex64) if case == "complex" else jax.nn.relu
    tree = [*parameters(name), odd] if name in DIRECTIONS else parameters(name) | {"odd_one": odd}
    where = r"\[2\]" if name in DIRECTIONS else "odd_one"
    with pytest.raises((TypeError, ValueError), match=where):
        make(name).init(tree)


def test_every_public_factory_is_here():
    names = {n for n in jol.__all__ if callable(getattr(jol, n)) and n.islower()}
    explained = {n for n in names if hasattr(getattr(jol, n), "__wrapped__")}
    assert explained == set(FACTORIES) - {"row_descent"} | {
        "scale_by_adamw_fallback", "scale_by_stable_rank", "track_params_ema"
    }  # fmt: skip
    # Not optimizers: averages of parameters, and a view of states.
    others = {"describe", "flax_matrix_axes", "params_ema", "state_shardings", "track_params_ema"}
    # Of the fallback, of a period, and of a threshold that has no default.
    others |= {"scale_by_adamw_fallback", "branch_rate", "scale_by_stable_rank"}
    assert names - others | {"row_descent"} == set(FACTORIES)  # and that of the guide
