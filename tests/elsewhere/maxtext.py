"""MaxText's dimension-number tree (`muon_utils.py`), layers scanned along the second axis."""

import jax
import jax.numpy as jnp

from tests.elsewhere.runs import train
from tests.optim.model_trees import MAXTEXT, layout, nested


def main() -> None:
    """Steps on a quadratic of its parameters; the tree is given as MaxText makes it."""
    keys = iter(jax.random.split(jax.random.key(0), len(MAXTEXT)))
    params = nested(MAXTEXT, lambda leaf: jax.random.normal(next(keys), leaf.shape), "|")

    def loss(params):
        return sum(jnp.square(x).mean() for x in jax.tree.leaves(params))

    train("maxtext", params, loss, nested(MAXTEXT, layout, "|"))


if __name__ == "__main__":
    main()
