"""Subspace ZO-Muon: the directions of a matrix lie in a few of its rows' dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array

from jaxopt_lab.core import counter_noise
from jaxopt_lab.core import newton_schulz as iteration
from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.core.keys import purpose_key
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.options import NewtonSchulz, Routing
from jaxopt_lab.optim.rates import decayed_weights
from jaxopt_lab.optim.routing import float_leaves
from jaxopt_lab.zeroth_order.directions import Leaf
from jaxopt_lab.zeroth_order.matrix_sign import FLOAT32, matrix_layouts
from jaxopt_lab.zeroth_order.mezo import of_trainable
from jaxopt_lab.zeroth_order.probes import (
    Probes,
    ProbeState,
    check_integer,
    default_sampler,
    initial_state,
)
from jaxopt_lab.zeroth_order.probing import Step, summed, transformation
from jaxopt_lab.zeroth_order.samplers import haar


@dataclass(frozen=True, eq=False)
class Subspace:
    """The subspaces of `subspace_muon`."""

    rank: int = 2
    """Dimensions, at most the rows of a matrix."""

    interval: int = 100
    """Steps from one redraw to the next."""

    inner: Literal["muon", "svd", "sgd"] = "muon"
    """What is made of the estimate inside: Newton-Schulz, the exact polar factor, or nothing."""

    newton_schulz: NewtonSchulz = FLOAT32
    """The iteration of "muon"."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_integer("Subspace.rank", self.rank)
        check_integer("Subspace.interval", self.interval)
        if self.inner not in ("muon", "svd", "sgd"):
            raise ValueError(f"Subspace.inner is {self.inner!r}; choose 'muon', 'svd' or 'sgd'")


@explains_keywords()
def subspace_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    vector_learning_rate: optax.ScalarOrSchedule = 1e-7,
    key: Array,
    subspace: Subspace = Subspace(),
    probes: Probes = Probes(num_directions=4, two_sided=False),
) -> optax.GradientTransformationExtraArgs:
    r"""Muon in random subspaces: $x \leftarrow x - \gamma (P\, \mathrm{NS}(G) + \lambda x)$.

    Each matrix has a uniform $P \in \mathbb R^{m \times r}$ with orthonormal columns, the same for
    `interval` steps. Directions are $P u_j$ with $u_j$ Gaussian, and
    $G = \frac1q \sum_j D_j u_j \in \mathbb R^{r \times n}$. Other leaves move by SGD along
    $\frac1q \sum_j D_j z_j$. $P$ is drawn again from its key when it is needed, not stored.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      eps: $\epsilon$ of the differences.
      weight_decay: $\lambda$, of the matrices.
      vector_learning_rate: Rate of the leaves that are no matrices.
      key: As for `estimate`.
      subspace: Rank, interval, what happens inside.
      probes: Sampler of the other leaves (None: Gaussian), number of directions, sides, engine.

    Raises:
      ValueError: As for `estimate`.

    Source: ZO-Muon of arXiv 2602.17155.

    Differs from the released code in: one $P$ a step, drawn before the samples (released: redrawn
    inside the loop over samples, of which only the last is lifted); nothing is added to the norm by
    which the iteration divides (released: 1e-7).
    """
    check_rates(learning_rate=learning_rate, vector_learning_rate=vector_learning_rate)

    def labels(params: optax.Params) -> Any:
        layouts = matrix_layouts(float_leaves(params), probes.matrix_axes)
        leaves, treedef = jax.tree.flatten(params)
        return treedef.unflatten(
            ["matrix" if i in layouts else "vector" for i in range(len(leaves))]
        )

    rules: dict[Any, optax.GradientTransformation] = {
        "matrix": optax.chain(
            of_trainable(decayed_weights(weight_decay, None, Routing()), probes),
            optax.scale_by_learning_rate(learning_rate),
        ),
        "vector": optax.scale_by_learning_rate(vector_learning_rate),
    }
    direction = scale_by_subspace_muon(eps=eps, key=key, subspace=subspace, probes=probes)
    return optax.chain(direction, optax.partition(rules, labels))


@explains_keywords()
def scale_by_subspace_muon(
    *,
    eps: Scalar = 1e-3,
    key: Array,
    subspace: Subspace = Subspace(),
    probes: Probes = Probes(num_directions=4, two_sided=False),
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of `subspace_muon`: $P\, \mathrm{NS}(G)$ of matrices, estimates elsewhere.

    Args:
      eps: As for `subspace_muon`.
      key: As for `estimate`.
      subspace: As for `subspace_muon`.
      probes: As for `subspace_muon`.
    """
    size = probes.losses()

    def init(params: optax.Params) -> Any:
        return initial_state(params, key, eps, size)

    def update(step: Step, state: ProbeState, extra_args: Any) -> Any:
        del extra_args
        bases = _bases(step, state, subspace)

        def lifted(probe: Array, key: Array) -> Any:
            return _Lifted(step, bases, probe, key)

        weights = step.differences(eps, lifted) / probes.num_directions

        def inside(weight: Array, probe: Array) -> list[Array]:
            drawn = _Lifted(step, bases, probe, step.key)
            found = map(drawn.inside, range(len(step.leaves)))
            return [weight.astype(u.dtype) * u for u in found]

        low = summed(inside, weights, jnp.arange(weights.size))
        out = [
            g if basis is None else leaf.placed(leaf.arranged(basis @ _polar(g, subspace)))
            for leaf, basis, g in zip(step.leaves, bases, low, strict=True)
        ]
        return step.tree(out), step.next_state()

    return transformation(
        probes, default_sampler(probes), eps, init, update, whole_trees="subspace_muon"
    )


class _Lifted:
    """The direction of a probe: P u of a matrix."""

    def __init__(self, step: Step, bases: Sequence[Array | None], probe: Array, key: Array):
        self._step, self._bases, self._probe = step, bases, probe
        self._draws = None if step.draws is None else step.flat(step.draws.evaluation)
        self._key = jax.random.fold_in(key, probe)
        drawn = self._draws is None
        self._dense = step.direction(probe, key=key) if drawn else None

    def inside(self, number: int) -> Array:
        """Inside of the subspaces: u (*batch, r, n) of a matrix, another leaf as it is."""
        leaf, basis = self._step.leaves[number], self._bases[number]
        if self._draws is not None:
            return self._draws[number][self._probe].astype(leaf.dtype)
        if basis is None:
            assert self._dense is not None
            return self._dense.of(number)
        shape = (basis.shape[-1], leaf.slice_shape[1])
        return counter_noise.normals(leaf.whole(self._key).keys, shape, leaf.dtype)

    def of(self, number: int) -> Array:
        """The direction of a leaf."""
        u, basis = self.inside(number), self._bases[number]
        leaf = self._step.leaves[number]
        return u if basis is None else leaf.placed(leaf.arranged(basis @ u))


def _bases(step: Step, state: ProbeState, subspace: Subspace) -> list[Array | None]:
    """P (*batch, m, r) of each matrix, drawn at the last redraw or given; None of other leaves."""
    redrawn = state.count - state.count % subspace.interval
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = purpose_key(jax.random.fold_in(key, redrawn), "subspace")
    given = None if step.draws is None else step.flat(step.draws.basis)

    def basis(number: int, leaf: Leaf) -> Array | None:
        if leaf.axes is None or not leaf.moves:
            return None
        if given is not None:
            return given[number].astype(leaf.dtype)
        rows = leaf.slice_shape[0]
        if subspace.rank > rows:
            raise ValueError(
                f"Subspace.rank is {subspace.rank} and leaf {keystr(leaf.path)} has matrices of "
                f"{rows} rows"
            )
        keys = leaf.whole(key).keys
        return haar(counter_noise.normals(keys, (rows, subspace.rank), leaf.dtype))

    return [basis(i, leaf) for i, leaf in enumerate(step.leaves)]


def _polar(g: Array, subspace: Subspace) -> Array:
    if subspace.inner == "muon":
        options = subspace.newton_schulz
        return iteration.newton_schulz(
            g,
            steps=options.steps,
            coefficients=options.coefficients,
            compute_dtype=options.dtype,
            eps=options.eps,
        ).astype(g.dtype)
    if subspace.inner == "svd":
        u, _, vt = jnp.linalg.svd(g, full_matrices=False)
        return u @ vt
    return g
