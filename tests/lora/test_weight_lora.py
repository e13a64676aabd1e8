"""WeightLoRA and WeightLoRA+: the properties of section 8 of their specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import lora
from jaxopt_lab.lora.weight_lora import largest
from tests.lora.stacks import COUNT, R, draw, loss, made, output, params, stirred


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(tx, spec):
    def step(adapters, state, t):
        grads = jax.grad(loss)(adapters, spec, t)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, grads

    return jax.jit(step, static_argnums=2)


def train(tx, adapters, spec, steps, state=None, first=0):
    """Adapters and gradients after each step, and the last state."""
    state, seen = tx.init(adapters) if state is None else state, []
    for t in range(first, first + steps):
        # The data of four steps: each is a compilation.
        adapters, state, grads = compiled(tx, spec)(adapters, state, t % 4)
        seen.append((adapters, grads))
    return seen, state


def weights(adapters):
    parts = [np.atleast_1d(adapters[name]["kernel"]["weight"]) for name in ("one", "stack")]
    return np.concatenate(parts)


def without_weights(tree):
    return {
        name: {"kernel": {side: node["kernel"][side] for side in "ab"}}
        for name, node in tree.items()
    }


def test_all_kept_and_still_is_lora_with_adamw():
    adapters, spec = made()
    tx = lora.weight_lora(1e-2, keep=COUNT + 1, weight_learning_rate=0.0, eps=0.0)
    seen, _ = train(tx, adapters, spec, 4)
    assert (weights(seen[-1][0]) == 1).all()
    # Property 7: without epsilon and decay this is Optax's Adam.
    plain, other = without_weights(adapters), optax.adam(1e-2, eps=0.0)
    state = other.init(plain)
    for _, grads in seen:
        updates, state = other.update(without_weights(grads), state, plain)
        plain = optax.apply_updates(plain, updates)
    # Where a gradient is zero, 0 / 0 is 0 here and NaN there: `a` in the first step.
    for name in ("one", "stack"):
        np.testing.assert_allclose(
            plain[name]["kernel"]["b"], seen[-1][0][name]["kernel"]["b"], rtol=1e-9
        )


def test_the_decay_acts_on_the_moved_value():
    adapters, spec = made()
    grads = jax.tree.map(jnp.ones_like, adapters)
    plain, decayed = (
        lora.weight_lora(0.1, keep=3, weight_decay=wd).update(
            grads, lora.weight_lora(0.1, keep=3).init(adapters), adapters
        )[0]
        for wd in (0.0, 0.5)
    )
    for side in "ab":
        p, u = (tree["stack"]["kernel"][side] for tree in (adapters, plain))
        got = decayed["stack"]["kernel"][side]
        np.testing.assert_allclose(got, u - 0.1 * 0.5 * (p + u), rtol=1e-12)


@pytest.mark.parametrize("threshold", ["value", "abs"])
def test_projections_keep_the_largest(threshold):
    adapters, spec = made()
    rate = 0.5
    tx = lora.weight_lora(1e-2, keep=3, weight_learning_rate=rate, every=2, threshold=threshold)
    seen, _ = train(tx, adapters, spec, 6)
    # The first step says nothing of the weights, because every b is zero.
    assert (weights(seen[0][1]) == 0).all() and (weights(seen[0][0]) == 1).all()
    before = weights(seen[0][0])
    for t, (after, grads) in enumerate(seen[1:], start=2):
        moved = before - rate * weights(grads)
        if t % 2 == 0:
            size = np.abs(moved) if threshold == "abs" else moved
            moved[np.argsort(-size, kind="stable")[3:]] = 0
            assert np.count_nonzero(weights(after)) == 3
        np.testing.assert_allclose(weights(after), moved, rtol=1e-12, atol=1e-15)
        before = weights(after)


def test_a_silent_gradient_does_not_choose():
    adapters, spec = made()
    seen, _ = train(lora.weight_lora(1e-2, keep=2), adapters, spec, 2)
    assert (weights(seen[0][0]) == 1).all()
    assert np.count_nonzero(weights(seen[1][0])) == 2


def test_ties_go_to_the_first():
    assert largest(jnp.array([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


def test_an_adapter_of_weight_zero_is_off():
    adapters, spec = made()
    adapters = stirred(adapters, spec)
    node = adapters["stack"]["kernel"]
    node["weight"] = node["weight"].at[2].set(0.0)
    grads = jax.grad(loss)(adapters, spec, 0)["stack"]["kernel"]
    assert not grads["a"][2].any() and not grads["b"][2].any() and grads["weight"][2] != 0
    x = draw(3, COUNT + 1, 10)
    tx = lora.weight_lora(1e-2, keep=3)
    smaller = lora.prune(adapters, spec, tx, tx.init(adapters))
    np.testing.assert_allclose(
        output(adapters, spec, x), output(smaller.adapters, smaller.spec, x), rtol=1e-12
    )
    (_, entry) = smaller.spec.adapters
    assert entry.kept == (0, 1, 3, 4, 5)


def test_thresholding_finds_the_best_weights():
    # Fixed orthonormal products: the projected gradient step of rate 1 / L is exact.
    wanted = jnp.array([0.3, 2.0, 0.1, 1.5, 0.7, 0.2, 0.9])
    adapters, _ = made()
    start = {"one": adapters["one"], "stack": adapters["stack"]}
    tx = lora.weight_lora(0.0, keep=3, weight_learning_rate=1.0)
    grads = jax.tree.map(jnp.zeros_like, start)
    grads["one"]["kernel"]["weight"] = 1.0 - wanted[0]
    grads["stack"]["kernel"]["weight"] = 1.0 - wanted[1:]
    updates, _ = tx.update(grads, tx.init(start), start)
    got = weights(optax.apply_updates(start, updates))
    np.testing.assert_allclose(got, [0, 2.0, 0, 1.5, 0, 0, 0.9], atol=1e-12)


def test_pruning_after_the_freeze_changes_nothing():
    adapters, spec = made()
    tx = lora.weight_lora(1e-2, keep=3, weight_learning_rate=0.3, every=4, freeze_after=6)
    seen, state = train(tx, adapters, spec, 6)
    at_freeze = seen[-1][0]
    # The last step before the freeze projects, due or not.
    assert np.count_nonzero(weights(at_freeze)) == 3
    whole, _ = train(tx, at_freeze, spec, 4, state, first=6)
    np.testing.assert_array_equal(weights(whole[-1][0]), weights(at_freeze))
    smaller = lora.prune(at_freeze, spec, tx, state)
    assert len(lora.selection(smaller.adapters, smaller.spec)) == 3
    small, last = train(tx, smaller.adapters, smaller.spec, 4, smaller.state, first=6)
    for entry in smaller.spec.adapters:
        name = entry.path[0]
        for side in "ab":
            one, two = (tree[-1][0][name]["kernel"][side] for tree in (whole, small))
            one = one[np.asarray(entry.kept)] if name == "stack" else one
            np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-13)
    # Moments and counts came along, and those of the others are gone.
    counts = [int(x) for x in jax.tree.leaves(last) if x.dtype == jnp.int32]
    assert set(counts) == {10}
    size = sum(x.size for x in jax.tree.leaves(last) if x.ndim > 1)
    kept = sum(x.size for x in jax.tree.leaves(without_weights(smaller.adapters)))
    assert size == 2 * kept


@pytest.mark.parametrize("growth", ["smart", "dummy", "restart"])
@pytest.mark.parametrize("rescale", [False, True])
def test_growth(growth, rescale):
    adapters, spec = made()
    adapters = stirred(adapters, spec)
    tx, x = lora.weight_lora_plus(1e-2), draw(3, COUNT + 1, 10)
    grown, larger, _ = lora.grow(
        adapters, spec, tx, tx.init(adapters), jax.random.key(1), growth=growth, rescale=rescale
    )
    (one, stack) = larger.adapters
    assert one.rank == stack.rank == 2 * R
    assert stack.scale == spec.adapters[1].scale / (2 if rescale else 1)
    same = np.allclose(output(adapters, spec, x), output(grown, larger, x), atol=1e-12, rtol=1e-12)
    assert same == (growth != "restart")
    a, b = (grown["stack"]["kernel"][side] for side in "ab")
    assert a.shape == (COUNT, 10, 2 * R) and b.shape == (COUNT, 2 * R, 8)
    if growth == "smart":
        q, new = a[..., :R], a[..., R:]
        np.testing.assert_allclose(jnp.swapaxes(q, 1, 2) @ new, 0, atol=1e-12)
        np.testing.assert_allclose(
            jnp.swapaxes(q, 1, 2) @ q, np.broadcast_to(np.eye(R), (6, R, R)), atol=1e-12
        )
    if growth != "restart":
        grads = jax.grad(loss)(grown, larger, 0)["stack"]["kernel"]
        assert not grads["a"][..., R:].any() and (grads["b"][:, R:] != 0).all()


def test_weight_lora_plus_keeps_its_size():
    adapters, spec = made()
    tx = lora.weight_lora_plus(1e-2, every=3, halvings=2, weight_learning_rate=0.3)
    state, t, sizes = tx.init(adapters), 0, [spec.parameter_count]
    for kept, rank in ((3, 2 * R), (1, 4 * R)):
        seen, state = train(tx, adapters, spec, 3, state, first=t)
        t += 3
        for side in "ab":  # the selecting step moves the weights alone
            np.testing.assert_array_equal(*(s[0]["stack"]["kernel"][side] for s in seen[-2:]))
        adapters, spec, state = lora.select_and_grow(
            seen[-1][0], spec, tx, state, jax.random.key(t)
        )
        assert sum(len(e.kept) for e in spec.adapters) == kept
        assert all(e.rank == rank for e in spec.adapters)
        sizes.append(spec.parameter_count)
        (adam,) = [
            node
            for node in jax.tree.leaves(
                state.inner_states["pairs"], is_leaf=lambda n: isinstance(n, optax.ScaleByAdamState)
            )
            if isinstance(node, optax.ScaleByAdamState)
        ]
        assert adam.count == 0 and not any(x.any() for x in jax.tree.leaves(adam))
    assert sizes[1] < sizes[0] and sizes[2] < sizes[1]
    frozen = [w for _, w in lora.selection(adapters, spec)]
    seen, _ = train(tx, adapters, spec, 4, state, first=t)
    assert [w for _, w in lora.selection(seen[-1][0], spec)] == frozen
    assert (seen[-1][0]["stack" if "stack" in adapters else "one"]["kernel"]["b"] != 0).any()


def test_growth_under_plain_adam_starts_its_moments_anew():
    adapters, spec = made(weights=False)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    seen, state = train(tx, adapters, spec, 2)
    grown = lora.grow(seen[-1][0], spec, tx, state, jax.random.key(0))
    adam = grown.state[1][0]
    assert adam.count == 0 and not any(x.any() for x in jax.tree.leaves(adam))


def test_growth_stops_at_the_smaller_side():
    adapters, spec = made(rank=5)
    tx = lora.weight_lora_plus(1e-2)
    grown = lora.grow(adapters, spec, tx, tx.init(adapters), jax.random.key(0))
    assert [e.rank for e in grown.spec.adapters] == [5, 5]


def test_one_adapter_always_stays():
    adapters, spec = made()
    for node in adapters.values():
        node["kernel"]["weight"] = -jnp.ones_like(node["kernel"]["weight"])
    adapters["stack"]["kernel"]["weight"] = adapters["stack"]["kernel"]["weight"].at[4].set(-0.5)
    tx = lora.weight_lora_plus(1e-2)
    smaller = lora.select_and_grow(adapters, spec, tx, tx.init(adapters), jax.random.key(0))
    (entry,) = smaller.spec.adapters
    assert entry.kept == (4,)
    zero = jax.tree.map(jnp.zeros_like, adapters)
    with pytest.raises(ValueError, match="at least one must stay"):
        lora.prune(zero, spec, tx, tx.init(zero))


def test_folding_and_merging_reproduce_the_output():
    adapters, spec = made()
    adapters = stirred(adapters, spec)
    adapters["stack"]["kernel"]["weight"] = jnp.linspace(-1.0, 2.0, COUNT)
    x, (plain, plain_spec) = draw(3, COUNT + 1, 10), lora.fold(adapters, spec)
    assert "weight" not in plain["stack"]["kernel"] and not plain_spec.config.weights
    wanted = output(adapters, spec, x)
    np.testing.assert_allclose(output(plain, plain_spec, x), wanted, rtol=1e-12)
    merged = lora.merge(params(), adapters, spec)
    kernels = jnp.concatenate([merged["stack"]["kernel"], merged["one"]["kernel"][None]])
    np.testing.assert_allclose(jnp.einsum("bin,inm->bm", x, kernels), wanted, rtol=1e-12)


def test_bad_calls_are_named():
    adapters, spec = made()
    with pytest.raises(ValueError, match="keep: got 0"):
        lora.weight_lora(1e-3, keep=0)
    with pytest.raises(ValueError, match="freeze_after: got 0"):
        lora.weight_lora(1e-3, keep=1, freeze_after=0)
    with pytest.raises(ValueError, match="keep: got 'all'"):
        lora.weight_lora(1e-3, keep="all")
    with pytest.raises(ValueError, match="weight_lora needs the factors"):
        tx = lora.weight_lora(1e-3, keep=1)
        tx.update(adapters, tx.init(adapters))
    plain, _ = made(weights=False)
    with pytest.raises(ValueError, match=r"LoraConfig\(weights=True\)"):
        lora.weight_lora(1e-3, keep=1).init(plain)
    tx = lora.weight_lora(1e-3, keep=1)
    with pytest.raises(ValueError, match="state: it is not one of tx for these adapters"):
        lora.prune(adapters, spec, tx, tx.init({"adapters": adapters}))
    with pytest.raises(ValueError, match="growth is 'wild'"):
        lora.grow(adapters, spec, tx, tx.init(adapters), jax.random.key(0), growth="wild")
