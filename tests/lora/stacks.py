"""A model of parallel linear maps, its adapters, and a loss of both."""

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import lora

COUNT, N, M, R = 6, 10, 8, 2
AXES = {
    "stack": {"kernel": MuonDimensionNumbers(1, 2)},
    "one": {"kernel": MuonDimensionNumbers(0, 1)},
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape))


def params():
    """A stack of six kernels and a single one."""
    return {"stack": {"kernel": draw(COUNT, N, M)}, "one": {"kernel": draw(N, M)}}


def made(seed=0, **config):
    """Adapters whose `b` is not zero, and their spec."""
    config = {"rank": R, "alpha": 4.0, "weights": True, "dtype": "float64", **config}
    spec = lora.resolve(lora.LoraConfig(**config), params(), AXES)
    adapters = lora.init(jax.random.key(seed), spec, params())
    return adapters, spec


def stirred(adapters, spec):
    """With `b` drawn."""
    for entry in spec.adapters:
        node = adapters[entry.path[0]]["kernel"]
        node["b"] = 0.3 * draw(*node["b"].shape, seed=3)
    return adapters


def output(adapters, spec, x):
    """x (rows, 7, n) through all maps, summed."""
    merged = lora.effective(params(), adapters, spec)
    kernels = jnp.concatenate([merged["stack"]["kernel"], merged["one"]["kernel"][None]])
    return jnp.einsum("bin,inm->bm", x, kernels)


def loss(adapters, spec, t):
    x, y = draw(12, COUNT + 1, N, seed=t), draw(12, M, seed=t)
    return 0.5 * jnp.mean(jnp.sum(jnp.square(output(adapters, spec, x) - y), 1))
