"""What the methods share: the options of probes, replaced draws, and the state."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxopt_lab.core.keys import leaf_keys, threefry_key
from jaxopt_lab.optim.routing import MatrixAxesSpec, float_leaves
from jaxopt_lab.zeroth_order.directions import Sampler
from jaxopt_lab.zeroth_order.engines import Engine, sequential
from jaxopt_lab.zeroth_order.losses import check_eps
from jaxopt_lab.zeroth_order.samplers import gaussian


@dataclass(frozen=True, eq=False)
class Probes:
    """What is evaluated in a step, and how."""

    sampler: Sampler | None = None
    """How directions are drawn; None: as the source of the method has it."""

    num_directions: int = 1
    """Directions a step. Methods average over them."""

    two_sided: bool = True
    """Central differences, two losses a direction; False: forward differences, which share the
    loss in the middle."""

    engine: Engine = sequential()
    """`sequential()`, `chunked(size)` or `vmapped()`."""

    matrix_axes: MatrixAxesSpec = None
    """Which axes form the matrices of a leaf, as for `jaxopt_lab.lion_muon`; None: by shape. Each
    matrix of a stack draws with a key of its own."""

    trainable: Any = None
    """Which leaves move: a tree of bools or a prefix of one; None: all. The estimate is 0 on the
    others."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_integer("num_directions", self.num_directions)
        kinds: dict[str, Any] = {"sampler": Sampler | None, "two_sided": bool, "engine": Engine}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                wanted = getattr(kind, "__name__", kind)
                raise ValueError(f"Probes.{name}: got {value!r}, wanted {wanted}")

    def losses(self) -> int:
        """Losses that a step of an estimate evaluates.

        Raises:
          ValueError: The engine's chunks do not divide the directions.
        """
        self.engine.check(self.num_directions)
        return 2 * self.num_directions if self.two_sided else 1 + self.num_directions

    def sampler_or(self, default: Sampler) -> Sampler:
        """The sampler, or the method's own."""
        return default if self.sampler is None else self.sampler

    def only_one_direction(self, method: str) -> "Probes":
        """These probes, for a method that takes one two-sided direction.

        Raises:
          ValueError: There are more, or one side.
        """
        if self.num_directions != 1 or not self.two_sided:
            raise ValueError(f"{method} takes one two-sided direction a step, got {self}")
        return self


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raise `ValueError` for what is no Python integer of at least `least`."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name}: got an array, wanted a Python integer, because it decides shapes; under "
            f'optax.inject_hyperparams say static_args=("{name}",)'
        )
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")


class Draws(NamedTuple):
    """What replaces sampling: trees like the parameters, leaves (probes, *shape)."""

    evaluation: Any  # directions in which losses are evaluated
    update: Any = None  # directions of the update; None: the evaluated ones
    policy: Any = None  # directions of LDSD's policy update; None: the evaluated ones
    basis: Any = None  # subspaces (rows, rank) of the matrices, for `subspace_muon`


class ProbeState(NamedTuple):
    """State of whatever probes: with the parameters, all that a step depends on."""

    count: Array  # shape=(), dtype=int32: steps taken
    key: Array  # shape=(2,), dtype=uint32: data of a typed key
    losses: Array  # (losses of a step,) of the last step, in the order of evaluation
    notfinite_count: Array  # shape=(), dtype=int32: losses that were not finite, so far


def initial_state(params: optax.Params, key: Array, eps: Any, losses: int) -> ProbeState:
    """The state before the first step.

    Args:
      params: Arrays or `jax.ShapeDtypeStruct`s.
      key: A threefry key.
      eps: Size of the perturbations, to be checked.
      losses: Losses a step.

    Raises:
      ValueError: The key is of another generator, or two leaves would share it; `eps` is too small
        for a leaf.
    """
    params, key = float_leaves(params), threefry_key(key)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaf_keys(key, paths)  # raises where two leaves would draw the same
    check_eps(eps, params)
    zero = jnp.zeros((), jnp.int32)
    # A copy: donating the state must not delete the caller's key.
    data = jnp.array(jax.random.key_data(key), copy=True)
    return ProbeState(zero, data, jnp.zeros(losses), zero)


def default_sampler(probes: Probes) -> Sampler:
    """The sampler of the methods that draw Gaussians."""
    return probes.sampler_or(gaussian())
