"""`optimistix.OptaxMinimiser`, which hashes what a transformation closes over."""

import jax.numpy as jnp
import optimistix

from tests.elsewhere.runs import METHODS


def main() -> None:
    """A quadratic of a matrix and a vector."""
    for name, factory in METHODS.items():
        solver = optimistix.OptaxMinimiser(factory(1e-1), rtol=1e-3, atol=1e-3)

        def loss(y, args):
            del args
            return jnp.sum((y["w"] - 1) ** 2) + jnp.sum(y["b"] ** 2)

        start = {"w": jnp.zeros((3, 4)), "b": jnp.ones(3)}
        found = optimistix.minimise(loss, solver, start, max_steps=400, throw=False)
        value = float(loss(found.value, None))
        print(f"{'optimistix':12s}{name:12s}loss {float(loss(start, None)):.4f} -> {value:.4f}")
        if not value < 0.5:
            raise SystemExit(f"optimistix, {name}: {value}")


if __name__ == "__main__":
    main()
