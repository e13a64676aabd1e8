"""Small parameter trees of the kinds people have: dicts, Linen, NNX and Equinox modules."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


def plain():
    """Two matrices of one shape, one transposed, a vector, a scalar and an embedding."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    return {
        "embedding": jax.random.normal(next(keys), (12, 6)),
        "layers": [
            {"kernel": jax.random.normal(next(keys), (6, 8)), "bias": jnp.zeros(8)},
            {"kernel": jax.random.normal(next(keys), (8, 6)), "bias": jnp.zeros(6)},
        ],
        "scale": jnp.ones(()),
    }


class _LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(12, 6)(tokens)
        return nn.Dense(6)(nn.relu(nn.Dense(8)(x)))


def linen():
    """Parameters of a Linen module."""
    return _LinenModel().init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]


class _NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(12, 6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)


def nnx_state():
    """The parameter state of an NNX module."""
    return nnx.state(_NnxModel(nnx.Rngs(0)), nnx.Param)


class _EquinoxModel(eqx.Module):
    embedding: jax.Array
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    activation: str = eqx.field(static=True, default="relu")


def equinox():
    """The array leaves of an Equinox module; its other leaves are None."""
    a, b, c = jax.random.split(jax.random.key(0), 3)
    model = _EquinoxModel(
        jax.random.normal(a, (12, 6)), eqx.nn.Linear(6, 8, key=b), eqx.nn.Linear(8, 6, key=c)
    )
    return eqx.filter(model, eqx.is_array)


TREES = {"plain": plain, "linen": linen, "nnx": nnx_state, "equinox": equinox}
