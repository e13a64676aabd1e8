"""A small tree of every kind of leaf, losses on it, and runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.core import counter_noise

KEY = jax.random.key(7)

# Stacked matrices, three to an attention projection, an embedding, vectors and a scalar.
SHAPES = {
    "attention": (2, 6, 3, 4),
    "bias": (5,),
    "embedding": (7, 3),
    "kernel": (2, 4, 6),
    "scale": (),
}
AXES = {
    "attention": MuonDimensionNumbers(1, 3),
    "bias": None,
    "embedding": None,
    "kernel": MuonDimensionNumbers(1, 2),
    "scale": None,
}


def tree(seed=0, dtype=None):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    drawn = {n: jax.random.normal(k, s) for (n, s), k in zip(SHAPES.items(), keys, strict=True)}
    return jax.tree.map(lambda x: x.astype(dtype or x.dtype), drawn)


# A stacked matrix and a vector, where nothing depends on the kind of leaf: every leaf, sample and
# candidate is compiled on its own, and LDSD over all of `SHAPES` for many seconds.
FEW_AXES = {name: AXES[name] for name in ("bias", "kernel")}


def few(seed=0, dtype=None):
    """Two leaves of `tree`."""
    whole = tree(seed, dtype)
    return {name: whole[name] for name in FEW_AXES}


def entries(tree):
    """The whole tree as one vector."""
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def linear(slope):
    """The loss <slope, params>."""
    return lambda params: sum(jnp.vdot(slope[n], params[n]) for n in slope)


def quadratic(params):
    return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def rough(params):
    """Neither linear nor quadratic."""
    return sum(jnp.sum(jnp.sin(x + i)) for i, x in enumerate(jax.tree.leaves(params)))


def mlp(dtype="float32", width=6):
    """Parameters, and the loss as a function of them and of what stands beside them."""
    rng = np.random.default_rng(1)
    shapes = {"up": (width, 2 * width), "down": (2 * width, width), "bias": (2 * width,)}
    params = {name: jnp.asarray(rng.normal(0, 0.5, s), dtype) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(0, 1, (4, width)), dtype)

    def loss(params, sides=None):
        def product(name, x):
            w = params[name]
            return x @ w if sides is None else sides[name].product(x, w)

        return jnp.mean(product("down", jnp.tanh(product("up", x) + params["bias"])) ** 2)

    return params, loss


def _step(tx, loss, **extra):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss, **extra)
        return optax.apply_updates(params, updates), state, updates

    return step


_compiled_once = functools.cache(_step)


def run(tx, params, loss, steps=3, state=None, **extra):
    """Parameters, state and the last updates after some steps, from `state` if given."""
    step = _step(tx, loss, **extra) if extra else _compiled_once(tx, loss)
    state, updates = tx.init(params) if state is None else state, None
    for _ in range(steps):
        params, state, updates = step(params, state)
    return params, state, updates


def probe_state(state):
    def is_probes(node):
        return isinstance(node, zo.ProbeState)

    (found,) = (x for x in jax.tree.leaves(state, is_leaf=is_probes) if is_probes(x))
    return found


def cheap_normals(monkeypatch):
    """Signs in place of normals, which take seconds to compile."""

    def drawn(keys, shape, dtype="float32", **part):
        return counter_noise.signs(keys, shape, **part).astype(dtype)

    monkeypatch.setattr(counter_noise, "normals", drawn)
