"""Per-mode SOAP against the NumPy reference, its special cases, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.optim.eigenbasis_runs import scale_by_tensor_soap
from tests.quick_compile import OPTIONS
from tests.reference.soap import merged, soap

# Of full rank from the second gradient on, so that every refresh is well defined.
SHAPES = {"tensor": (2, 2, 6), "matrix": (5, 5), "vector": (2,), "scalar": ()}
STEPS, RATE = 9, 0.02
fast_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
# Householder compiles fastest.
BASE = {
    **{"b1": 0.9, "b2": 0.95, "eps": 1e-6},
    **{"precondition_frequency": 3, "orthogonalizer": "householder"},
}


def draw(seed, *lead):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(*lead, *s)) for k, s in SHAPES.items()}


def advance(tx, params, state, grads):
    """Parameters and states after each gradient."""

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        params = jax.tree.map(lambda w, u: w - RATE * u, params, updates)
        return (params, state), (params, state)

    return jax.lax.scan(step, (params, state), grads)


def of_leaves(trees):
    """The arrays of each leaf, one an axis."""
    return {name: tuple(tree[name] for tree in trees) for name in SHAPES}


def take(tree, t):
    return jax.tree.map(lambda x: x[t], tree)


# The bases after one gradient are arbitrary in the null space of a factor, so the reference is
# given ours.
@pytest.mark.parametrize(
    "options",
    [
        {"orthogonalizer": "cholesky_qr"},
        {"precondition_frequency": 1, "factor_decay": 0.8},
        {"factor_decay": 1.0, "correct_bias": False, "normalize_grads": True},
        {"max_precond_dim": 4, "weight_decay": 0.3, "rate": RATE},
        {"max_precond_dim": 12, "merge_dims": True, "weight_decay": 0.3},
    ],
    ids="-".join,
)
def test_the_reference(options):
    options = BASE | options
    with jax.enable_x64(True):
        params, grads = draw(0), draw(1, STEPS)
        tx = scale_by_tensor_soap(largest_ratio=None, **options)
        out = fast_jit(functools.partial(advance, tx))(params, tx.init(params), grads)
        ours, states = jax.tree.map(np.asarray, out[1])
    if "weight_decay" in options:
        states, *_ = states
    first, first_factors = (of_leaves(take(x, 0)) for x in (states.bases, states.factors))
    last_factors, last_bases = (of_leaves(take(x, -1)) for x in (states.factors, states.bases))
    for name, w in params.items():
        limit = options.get("max_precond_dim", 100)
        axes = len(merged(w.shape, limit) if options.get("merge_dims") else w.shape)
        steps = soap(
            w,
            grads[name],
            rates=RATE,
            b1=options["b1"],
            b2=options["b2"],
            factor_decay=options.get("factor_decay"),
            eps=options["eps"],
            frequency=options["precondition_frequency"],
            max_precond_dim=options.get("max_precond_dim", 100),
            merge_dims=options.get("merge_dims", False),
            precondition_1d=True,
            correct_bias=options.get("correct_bias", True),
            normalize=options.get("normalize_grads", False),
            decay=options.get("weight_decay", 0.0),
            decay_after_step="rate" in options,
            first_bases=[
                None if isinstance(q, optax.MaskedNode) else q for q in first[name][:axes]
            ],
        )
        wanted = np.stack([step.params for step in steps])
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(states.nu[name][-1], steps[-1].second, rtol=1e-7, atol=1e-12)
        others = list(steps[-1].factors) + [None] * (3 - len(steps[-1].factors))
        for mine, other in zip(last_factors[name], others, strict=False):
            assert isinstance(mine, optax.MaskedNode) == (other is None)
            if other is not None:
                np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12)
        for x, q in zip(first_factors[name], first[name], strict=True):
            if not isinstance(q, optax.MaskedNode):
                inside = q.T @ x @ q
                decreasing = np.diag(np.sort(np.diag(inside))[::-1])
                np.testing.assert_allclose(inside, decreasing, atol=1e-13)
        for q in jax.tree.leaves(last_bases[name]):
            np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-13)


def test_without_factors_it_is_adam_that_ignores_the_first_gradient():
    params, grads = jax.tree.map(jnp.float32, (draw(0), draw(1, 5)))
    tx = scale_by_tensor_soap(b1=0.9, b2=0.95, eps=0.0, max_precond_dim=0)
    _, (ours, _) = fast_jit(functools.partial(advance, tx))(params, tx.init(params), grads)
    adam = optax.scale_by_adam(b1=0.9, b2=0.95, eps=0.0)
    late = jax.tree.map(lambda g: g[1:], grads)
    _, (theirs, _) = fast_jit(functools.partial(advance, adam))(params, adam.init(params), late)
    for name, w in params.items():
        np.testing.assert_array_equal(ours[name][0], w)
        np.testing.assert_allclose(ours[name][1:], theirs[name], rtol=0, atol=2e-6)


def test_the_first_gradient_can_be_used():
    # In its own singular basis every rotated coordinate of a first step is a sign, or zero.
    params, grads = jax.tree.map(jnp.float32, (draw(0), draw(1)))
    tx = scale_by_tensor_soap(eps=1e-4, skip_first_step=False, precondition_frequency=1)
    updates, state = fast_jit(tx.update)(grads, tx.init(params))
    u, _, vh = np.linalg.svd(grads["matrix"])
    np.testing.assert_allclose(updates["matrix"], u @ vh, atol=5e-3)
    assert jax.tree.leaves(state.age) == [2] * len(SHAPES)


def corrupt(grads, name, value):
    return grads | {name: grads[name].at[(0,) * grads[name].ndim].set(value)}


@functools.cache
def decaying():
    tx = scale_by_tensor_soap(**BASE | {"weight_decay": 0.1})
    return tx, fast_jit(tx.update)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_its_leaf_by_nothing(value):
    params, grads = jax.tree.map(jnp.float32, (draw(0), draw(1)))
    tx, update = decaying()
    _, carry = update(grads, tx.init(params), params)
    _, carry = update(grads, carry, params)
    updates, new_carry = update(corrupt(grads, "tensor", value), carry, params)
    state, new = carry[0], new_carry[0]
    assert not np.any(updates["tensor"]) and np.all(updates["matrix"])
    for field in ("age", "mu", "nu", "factors", "bases"):
        old, kept = getattr(state, field), getattr(new, field)
        if type(old) is tuple:
            old, kept = of_leaves(old), of_leaves(kept)
        jax.tree.map(np.testing.assert_array_equal, old["tensor"], kept["tensor"])
        assert not np.array_equal(*(jax.tree.leaves(x["matrix"])[0] for x in (old, kept))) or (
            field == "bases"
        )
    assert new.notfinite_count["tensor"] == 1 and new.notfinite_count["matrix"] == 0
    updates, (new, *_) = update(grads, new_carry, params)
    assert np.all(updates["tensor"]) and new.notfinite_count["tensor"] == 1


def test_a_leaf_that_lost_its_first_gradient_starts_with_a_later_one():
    params, grads = jax.tree.map(jnp.float32, (draw(0), draw(1)))
    tx, update = decaying()
    carry, states = tx.init(params), []
    moved = []
    for t in range(6):
        grads_seen = grads if t else corrupt(grads, "tensor", np.nan)
        updates, carry = update(grads_seen, carry, params)
        states.append(carry[0])
        moved.append(bool(np.any(updates["tensor"])))
    ages = [int(state.age["tensor"]) for state in states]
    assert ages == [0, 1, 2, 3, 4, 5] and moved == [False] * 2 + [True] * 4
    assert states[-1].age["matrix"] == 6
    for k in range(3):
        before, after = (np.asarray(states[t].bases[k]["tensor"]) for t in (0, 1))
        np.testing.assert_array_equal(before, np.eye(len(before)))
        # As of any first gradient, the eigenvectors of its Gram matrix.
        inside = after.T @ states[1].factors[k]["tensor"] @ after
        np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-5)
        assert (np.diff(np.diag(inside)) < 1e-6).all()


def extreme_gradients(rng, shape):
    """Zero, rank one, dead slices, tiny, huge and badly conditioned ones."""
    g = rng.normal(size=shape)
    low = np.einsum("i,j,k->ijk", *(rng.normal(size=d) for d in shape))
    dead = g * (np.arange(shape[0]) > 0)[:, None, None]
    scaled = g * np.logspace(0, -12, shape[1])[:, None]
    return np.stack([0 * g, low, low, dead, dead, 1e-25 * g, 1e15 * g, scaled, 0 * g, g])


@pytest.mark.parametrize(("dtype", "eps", "b"), [("float32", 0.0, 0.95), ("bfloat16", 1e-8, 1.0)])
def test_never_nan(dtype, eps, b):
    rng = np.random.default_rng(0)
    streams = [extreme_gradients(rng, (3, 4, 2)) for _ in range(4)]
    rng.shuffle(streams[1])
    rng.shuffle(streams[2])
    grads = {"x": jnp.asarray(np.concatenate(streams), dtype)}
    params = {"x": jnp.ones((3, 4, 2), dtype)}
    tx = scale_by_tensor_soap(eps=eps, precondition_frequency=2, factor_decay=b, max_precond_dim=3)
    _, (ours, states) = fast_jit(functools.partial(advance, tx))(params, tx.init(params), grads)
    for leaf in jax.tree.leaves((ours, states)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    assert ours["x"].dtype == dtype and states.mu["x"].dtype == jnp.float32
    assert np.abs(np.asarray(ours["x"][-1] - ours["x"][0], np.float32)).max() > 0.01


def test_only_masked_leaves_decay():
    params = jax.tree.map(jnp.float32, draw(0))
    mask = {name: name == "matrix" for name in SHAPES}
    tx = scale_by_tensor_soap(weight_decay=0.3, mask=mask, max_precond_dim=0)
    update, zeros = fast_jit(tx.update), jax.tree.map(jnp.zeros_like, params)
    first, state = update(zeros, tx.init(params), params)
    second, _ = update(zeros, state, params)
    assert not any(map(np.any, jax.tree.leaves(first)))
    for name, w in params.items():
        np.testing.assert_allclose(second[name], 0.3 * w * mask[name], rtol=1e-6)


def test_injected_numbers_and_vmap():
    params, grads = jax.tree.map(jnp.float32, (draw(0)["matrix"], draw(1, 4)["matrix"]))
    options = BASE | {"weight_decay": 0.3}

    def factory(b1, b2, eps, precondition_frequency, weight_decay):
        numbers = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
        return scale_by_tensor_soap(
            precondition_frequency=precondition_frequency, orthogonalizer="householder", **numbers
        )

    static = {k: v for k, v in options.items() if k != "orthogonalizer"}
    injected = optax.inject_hyperparams(factory)(**static)

    def member(b1):
        state = injected.init(params)
        state.hyperparams["b1"] = b1
        return advance(injected, params, state, grads)[1][0]

    members = fast_jit(jax.vmap(member))(jnp.array([0.9, 0.5]))
    for b1, ours in zip((0.9, 0.5), members, strict=True):
        tx = scale_by_tensor_soap(**options | {"b1": b1})
        _, (alone, _) = fast_jit(functools.partial(advance, tx))(params, tx.init(params), grads)
        np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_leaves(kind):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    rng = np.random.default_rng(0)
    params = {"x": jnp.asarray(rng.normal(size=(4, 8, 2)), "float32")}
    grads = {"x": jnp.asarray(rng.normal(size=(4, 4, 8, 2)), "float32")}
    tx = scale_by_tensor_soap(**BASE, weight_decay=0.1)
    run = functools.partial(advance, tx)
    _, (alone, _) = fast_jit(run)(params, tx.init(params), grads)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding)
        stream = jax.device_put(grads, NamedSharding(mesh, P(None, None, "fsdp")))
        state = jax.jit(tx.init)(placed)
        (last, state), _ = fast_jit(run)(placed, state, stream)
    np.testing.assert_allclose(last["x"], alone["x"][-1], rtol=0, atol=1e-4)
    if kind == AxisType.Explicit:
        assert jax.typeof(last["x"]).sharding.spec == P(None, "fsdp", None)
        assert jax.typeof(state[0].mu["x"]).sharding.spec == P(None, "fsdp", None)
