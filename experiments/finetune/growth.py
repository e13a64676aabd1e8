"""Selection and growth of WeightLoRA+ in arrays that keep their shape, for lanes.

`jaxopt_lab.lora.select_and_grow` changes shapes, each run in its own way. Here an adapter that
leaves becomes zero, its weight too, and stays so: nothing of it has a gradient any more. Ranks have
the room that they grow into, filled with zeros, which have none either. `checks.py` compares both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey
from jaxtyping import Array
from methods import ADAPTERS, EVERY, HALVINGS, RANK

from jaxopt_lab.core.keys import leaf_key
from jaxopt_lab.lora.adapters import get
from jaxopt_lab.lora.pairs import find_pairs
from jaxopt_lab.lora.weight_lora import largest
from jaxopt_lab.step import TrainState


def grown(
    tx: optax.GradientTransformation, state: TrainState, taken: Array, key: Array
) -> TrainState:
    """The state after what follows `taken` steps, most often nothing.

    Args:
      tx: The optimizer.
      state: After that step.
      taken: Steps taken; not batched, so that other steps pay nothing.
      key: Of the draws.
    """
    rounds = [functools.partial(_round, tx, key, number) for number in range(HALVINGS)]
    due = (taken % EVERY == 0) & (taken <= EVERY * HALVINGS)
    return jax.lax.switch(jnp.where(due, taken // EVERY, 0), [lambda x: x, *rounds], state)


def _round(
    tx: optax.GradientTransformation, key: Array, number: int, state: TrainState
) -> TrainState:
    adapters: Any = jax.tree.map(lambda x: x, state.params)
    ((path, _, _),) = find_pairs(adapters)
    node = get(adapters, path)
    a, b, weight = node["a"], node["b"], node["weight"]
    r = RANK * 2**number
    # Those that left have weight zero.
    stays = largest(weight, ADAPTERS // 2 ** (number + 1))
    stays &= (weight > 0) | (jnp.arange(ADAPTERS) == jnp.argmax(weight))
    q, upper = jnp.linalg.qr(a[..., :r])
    noise = _noise(key, path, (a.shape[1], r))
    inside = jnp.einsum("knr,kmr,kms->kns", q, q, noise, precision="highest")
    rotated = jnp.einsum("krs,ksm->krm", upper, b[:, :r], precision="highest")
    a = a.at[..., :r].set(q).at[..., r : 2 * r].set(noise - inside)
    b, on = b.at[:, :r].set(rotated), stays[:, None, None]
    node |= {"a": jnp.where(on, a, 0), "b": jnp.where(on, b, 0)}
    node["weight"] = jnp.where(stays, weight, 0)
    return state._replace(params=adapters, opt_state=_anew(state.opt_state, tx.init(adapters)))


def _noise(key: Array, path: tuple[str, ...], shape: tuple[int, int]) -> Array:
    """The draws that `lora.grow` makes."""
    own = leaf_key(key, tuple(map(DictKey, path)))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(ADAPTERS))
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)


def _anew(state: Any, fresh: Any) -> Any:
    """The state with new moments of the factors, count included."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def pick(old: Any, new: Any) -> Any:
        return new if is_adam(old) and find_pairs(new.mu) else old

    return jax.tree.map(pick, state, fresh, is_leaf=is_adam)
