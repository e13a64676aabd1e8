"""An Equinox module, as its users train one."""

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.elsewhere.runs import METHODS, train


def main() -> None:
    """What an unfiltered module is told, then steps of a filtered one."""
    model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
    for factory in METHODS.values():
        try:
            factory(1e-3).init(model)
        except TypeError as error:
            assert "is_inexact_array" in str(error), error
        else:
            raise SystemExit("an unfiltered module was accepted")
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (32, 4))

    def loss(params):
        y = jax.vmap(eqx.combine(params, static))(x)
        return jnp.square(y - jnp.sin(x[:, :3])).mean()

    train("equinox", params, loss)


if __name__ == "__main__":
    main()
