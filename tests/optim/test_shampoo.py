"""Shampoo against its reference, for what no stored trajectory covers, and its special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim import Graft, InverseRoot
from jaxopt_lab.optim.kronecker.blocks import Blocks
from jaxopt_lab.parity.shampoo import distributed_shampoo
from tests.optim.runs import fast_jit, run, scan
from tests.reference import shampoo as reference

RATE, STEPS, LIMIT = 0.05, 7, 6
# (2, 3, 7) merges to (6, 7), (4, 5, 7) does not, "stack" is two matrices by its layout, (5, 1) is a
# vector.
SHAPES = {"vec": (5, 1), "tensor": (2, 3, 7), "order3": (4, 5, 7), "stack": (2, 3, 10)}
LAYOUTS = {k: MuonDimensionNumbers(1, 2) if k == "stack" else None for k in SHAPES}
NUMBERS = {"b1": 0.9, "b2": 0.95, "eps": 1e-4}

# What the optimizer is made with: numbers, `Graft`, `InverseRoot`; and the reference, beyond them.
CASES = {
    "Adam": (
        {"precondition_frequency": 2},
        Graft(b2=0.9),
        {},
        {"graft": "adam", "graft_b2": 0.9, "frequency": 2},
    ),
    "RMSprop": (
        {"precondition_frequency": 3},
        Graft("rmsprop", b2=0.8),
        {},
        {"graft": "rmsprop", "graft_b2": 0.8, "frequency": 3},
    ),
    "sums and AdaGrad": (
        {"b2": 1.0},
        Graft("adagrad", eps=1e-3),
        {},
        {"graft": "adagrad", "graft_eps": 1e-3},
    ),
    "norm of the average, other exponent": (
        {"b1": 0.0},
        Graft("sgd"),
        {"exponent": 0.4},
        {"graft": "sgd", "exponent": 0.4},
    ),
    "relative ridge": ({}, Graft(None), {"relative_eps": True}, {"relative": True}),
}

# What only the released code does, and the reference calls by the names of the released code.
RELEASED = {
    "late start, look-ahead": {"b3": 0.5, "weight_decay": 0.1, "start_preconditioning_step": 3}
    | {"precondition_frequency": 2, "graft": Graft("adam", b2=0.9)},
    "momentum": {"momentum": 0.6, "dampening": 0.3, "bias_correction": False}
    | {"precondition_frequency": 3, "graft": Graft("rmsprop", b2=0.8)},
    "sums, nesterov, l2": {"momentum": 0.5, "nesterov": True, "b2": 1.0, "weight_decay": 0.2}
    | {"weight_decay_type": "l2", "graft": Graft("adagrad", eps=1e-3)},
}
RENAMED = {"precondition_frequency": "frequency", "start_preconditioning_step": "start"}
RENAMED |= {"weight_decay": "decay", "weight_decay_type": "decay_type"}


def normal(seed, shapes, *lead):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=(*lead, *s))) for k, s in shapes.items()}


def scaled(*, rate=RATE, root=None, **options):
    options = NUMBERS | {"precondition_frequency": 1} | options
    root = InverseRoot(**{"method": "eigh", "max_precond_dim": LIMIT} | (root or {}))
    direction = jol.scale_by_shampoo(inverse_root=root, **options)
    return optax.chain(direction, optax.scale_by_learning_rate(rate))


def weights(tx, params, grads):
    """Parameters after the last step and the state, both as NumPy."""
    _, params, state = run(tx, params, grads)
    return jax.device_get(params), jax.device_get(state)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    numbers, graft, root, theirs = CASES[case]
    with jax.enable_x64(True):
        params, grads = normal(0, SHAPES), normal(1, SHAPES, STEPS)
        tx = scaled(matrix_axes=LAYOUTS, graft=graft, root=root, **numbers)
        got, _ = weights(tx, params, grads)
    numbers = {k: v for k, v in numbers.items() if k not in RENAMED}
    options = NUMBERS | numbers | theirs | {"rate": RATE, "limit": LIMIT}
    params, grads = jax.device_get((params, grads))
    for name, w in params.items():
        pairs = [(w, grads[name])]
        if name == "stack":
            pairs = [(w[i], grads[name][:, i]) for i in range(len(w))]
        merge = name != "stack"
        expected = [reference.trajectory(*pair, merge=merge, **options)[-1] for pair in pairs]
        expected = np.stack(expected).reshape(w.shape)
        np.testing.assert_allclose(got[name], expected, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", RELEASED)
def test_the_released_rule_equals_the_reference(case):
    ours, shapes = RELEASED[case], {"small": (2, 3), "tall": (7, 3), "tensor": (2, 3, 7)}
    with jax.enable_x64(True):
        params, grads = normal(0, shapes), normal(1, shapes, STEPS)
        root = InverseRoot(method="eigh", max_precond_dim=LIMIT)
        tx = distributed_shampoo(RATE, inverse_root=root, **NUMBERS | ours)
        got, _ = weights(tx, params, grads)
    options = {RENAMED.get(k, k): v for k, v in (NUMBERS | ours).items()}
    graft = options.pop("graft")
    options |= {"graft": graft.kind, "graft_b2": graft.b2, "graft_eps": graft.eps, "rate": RATE}
    params, grads = jax.device_get((params, grads))
    for name, w in params.items():
        path = reference.trajectory(w, grads[name], limit=LIMIT, merge=True, **options)
        np.testing.assert_allclose(got[name], path[-1], atol=1e-9, err_msg=name)


def test_the_released_roots_do_not_start_before_their_first_refresh():
    with pytest.raises(ValueError, match="start_preconditioning_step is 3; it must be at least"):
        distributed_shampoo(1e-3, precondition_frequency=10, start_preconditioning_step=3)


def test_newton_steers_as_the_eigendecomposition_does():
    with jax.enable_x64(True):
        params, grads = normal(0, {"w": (5, 4)}), normal(1, {"w": (5, 4)}, STEPS)
        got, _ = weights(scaled(root={"method": "newton"}, precondition_frequency=2), params, grads)
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-4, "rate": RATE, "frequency": 2}
    options |= {"graft": "adam", "graft_b2": 0.95, "limit": LIMIT, "merge": False}
    expected = reference.trajectory(*map(np.asarray, (params["w"], grads["w"])), **options)
    np.testing.assert_allclose(got["w"], expected[-1], atol=1e-9)


def test_blocks_are_cut_and_joined():
    for shape, limit in (
        ((6, 40), 16),
        ((5,), 3),
        ((3, 4, 5), 2),
        ((2, 3, 7), 6),
        ((1, 1), 4),
        ((), 2),
    ):
        blocks = Blocks.of(shape, limit)
        x = np.random.default_rng(0).normal(size=(2, *blocks.dims))
        pieces = blocks.split(jnp.asarray(x))
        assert pieces.shape == (2 * blocks.number, *blocks.edges)
        np.testing.assert_array_equal(blocks.join(pieces), np.asarray(x, np.float32))
    assert Blocks.of((2, 1, 3, 7), 6).dims == (6, 7)
    assert Blocks.of((8, 12), 1024).dims == (8, 12)
    assert Blocks.of((8, 12), 1024, merge_matrices=True).dims == (96,)
    assert Blocks.of((4, 0), 8).number == 0


def test_one_mode_of_sums_is_full_matrix_adagrad():
    with jax.enable_x64(True):
        params, grads = normal(0, {"w": (6,)}), normal(1, {"w": (6,)}, STEPS)
        tx = scaled(b1=0.0, b2=1.0, graft=Graft(None))
        got, _ = weights(tx, params, grads)
    w, total = np.asarray(params["w"]), np.zeros((6, 6))
    for g in np.asarray(grads["w"]):
        total += np.outer(g, g)
        w = w - RATE * reference.inverse_root(total, 0.5, 1e-4) @ g
    np.testing.assert_allclose(got["w"], w, atol=1e-10)


def test_blocks_of_one_entry_are_diagonal_adagrad():
    with jax.enable_x64(True):
        params, grads = normal(0, {"w": (3, 4)}), normal(1, {"w": (3, 4)}, STEPS)
        tx = scaled(b1=0.0, b2=1.0, graft=Graft(None), root={"max_precond_dim": 1})
        got, _ = weights(tx, params, grads)
    w, total = np.asarray(params["w"]), np.zeros((3, 4))
    for g in np.asarray(grads["w"]):
        total += g**2
        w = w - RATE * g / np.sqrt(total + 1e-4)
    np.testing.assert_allclose(got["w"], w, atol=1e-10)


def test_before_the_first_roots_it_is_the_graft():
    params, grads = normal(0, {"w": (5, 4)}), normal(1, {"w": (5, 4)}, 3)
    a, _ = weights(scaled(precondition_frequency=4, b2=0.99), params, grads)
    b, _ = weights(optax.adam(RATE, 0.9, 0.99, 1e-8), params, grads)
    np.testing.assert_allclose(a["w"], b["w"], atol=1e-6)


def test_blocks_take_the_norm_of_the_graft():
    params, grads = normal(0, {"w": (8, 6)}), normal(1, {"w": (8, 6)}, STEPS)
    tx = jol.scale_by_shampoo(
        b2=0.9, precondition_frequency=1, inverse_root=InverseRoot(max_precond_dim=4)
    )
    ours, _, _ = run(tx, params, grads)
    adam, _, _ = scan(optax.scale_by_adam(0.9, 0.9), params, grads)
    blocks = Blocks.of((8, 6), 4)
    norms = [jnp.linalg.norm(blocks.split(u["w"]), axis=(1, 2)) for u in (ours, adam)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert np.abs(np.asarray(ours["w"] - adam["w"])).max() > 0.1


def test_constant_gradient_gives_the_polar_factor():
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(n, 2)))[0] for n in (5, 4))
    with jax.enable_x64(True):
        grads = {"w": jnp.broadcast_to(jnp.asarray((u * [3.0, 0.5]) @ v.T), (STEPS, 5, 4))}
        tx = scaled(rate=-1.0, b1=0.0, b2=1.0, graft=Graft(None), eps=1e-10)
        updates, _, _ = run(tx, {"w": jnp.zeros((5, 4))}, grads)
        polar = (u @ v.T) / np.sqrt(np.arange(1, STEPS + 1))[:, None, None]
        np.testing.assert_allclose(updates["w"], polar, atol=1e-4)


def test_commutes_with_orthogonal_changes_of_basis():
    rng = np.random.default_rng(4)
    p, q = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (5, 4))
    with jax.enable_x64(True):
        trees = [normal(0, {"w": (5, 4)}), normal(1, {"w": (5, 4)}, STEPS)]
        trees = [{"plain": x["w"], "rotated": p @ x["w"] @ q} for x in trees]
        got, _ = weights(scaled(graft=Graft("sgd")), *trees)
    np.testing.assert_allclose(got["rotated"], p @ got["plain"] @ q, atol=1e-9)


EPS = 1e-2


@functools.cache
def online_steps():
    """Directions and final state of Shampoo with sums and exponent 1/4, compiled once."""
    tx = scaled(rate=1.0, b1=0.0, b2=1.0, graft=Graft(None), eps=EPS)
    return fast_jit(functools.partial(scan, tx, {"w": jnp.zeros((3, 4))}))


def online_run(seed, rank):
    """Online linear losses <G_t, W>: gradients, path and factors."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(30, 3, rank)), rng.normal(size=(30, rank, 4))
    grads = 10 ** rng.uniform(-1, 1, size=(30, 1, 1)) * (left @ right)
    rate = 4.0 / np.sqrt(2 * rank)
    with jax.enable_x64(True):
        updates, _, state = online_steps()({"w": jnp.asarray(grads)})
    # The losses are linear, so the gradients and with them the directions know no rate.
    path = np.concatenate([np.zeros((1, 3, 4)), rate * np.cumsum(np.asarray(updates["w"]), 0)])
    modes = [np.asarray(state[0].factors[k]["w"])[0] for k in range(2)]
    return grads, path[:-1], [x + EPS * np.eye(len(x)) for x in modes], rate


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 3])
def test_lemma_and_regret_bound(seed, rank):
    grads, path, (left, right), rate = online_run(seed, rank)
    # eps I + sum vec(G) vec(G)^T / r is at most the root of the Kronecker product.
    flat = grads.reshape(len(grads), -1)
    roots = [reference.inverse_root(x, -0.5, 0.0) for x in (left, right)]
    gap = np.kron(*roots) - EPS * np.eye(12) - flat.T @ flat / rank
    assert np.linalg.eigvalsh(gap)[0] > -1e-8 * np.abs(gap).max()
    # Regret to the best point of a ball, for the largest distance that the path had from it.
    total = grads.sum(0)
    best = -total / np.linalg.norm(total)
    regret = np.sum(grads * (path - best))
    distance = np.linalg.norm(path - best, axis=(1, 2)).max()
    traces = np.prod([np.trace(reference.inverse_root(x, -0.25, 0.0)) for x in (left, right)])
    # sqrt(2 r) D times the traces at the best rate, D / sqrt(2 r).
    assert regret <= (distance**2 / (2 * rate) + rank * rate) * traces
