"""What the scripts have in common: the methods, and a few steps of each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxopt_lab as jol

METHODS = {"lion_muon": jol.lion_muon, "soap": jol.soap, "shampoo": jol.shampoo}
STEPS = 6


def train(
    project: str, params: Any, loss: Callable[[Any], jax.Array], matrix_axes: Any = None
) -> None:
    """Run every method for a few steps on one batch; print the losses.

    Raises:
      SystemExit: The loss did not fall, or a leaf is not finite or did not move.
    """
    for name, factory in METHODS.items():
        tx = factory(1e-2, matrix_axes=matrix_axes)

        @jax.jit
        def step(params, state, tx=tx):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        new, state, losses = params, tx.init(params), []
        for _ in range(STEPS):
            new, state, value = step(new, state)
            losses.append(float(value))
        grads = jax.jit(jax.grad(loss))(params)
        still = [
            jax.tree_util.keystr(path)
            for (path, old), now, g in zip(
                jax.tree_util.tree_leaves_with_path(params),
                jax.tree.leaves(new),
                jax.tree.leaves(grads),
                strict=True,
            )
            if (g != 0).any() and not (jnp.isfinite(now).all() and (now != old).any())
        ]
        rules = {r.rule for r in jol.describe(tx, params).rows}
        print(f"{project:12s}{name:12s}loss {losses[0]:.4f} -> {losses[-1]:.4f}  {sorted(rules)}")
        if still or not losses[-1] < losses[0] or name not in rules:
            raise SystemExit(f"{project}, {name}: losses {losses}, no good steps of {still}")
