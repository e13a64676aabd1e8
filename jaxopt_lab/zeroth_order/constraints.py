r"""Convex sets as values: what Frank-Wolfe and projected descent need to know of one.

A set of vectors sees a point of several leaves as one vector; a set of matrices wants one leaf of
two axes. A set of your own is a `ConstraintSet` of one or two functions.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxopt_lab.core import lmo, projections
from jaxopt_lab.core.numerics import wide_dtype, widened

# Of the start, that eps has to span at least: one decimal digit.
_FEWEST_SPACINGS = 10


@dataclass(frozen=True, eq=False)
class ConstraintSet:
    """A convex set.

    Attributes:
      name: For messages.
      lmo: `(g, x) -> s`, a minimiser of <s, g> over the set, `x` a point of it; Frank-Wolfe needs
        it.
      project: `x -> s`, the nearest point of the set; projected descent needs it, and the check of
        starts.
      size: Length of the set, with which the distance of a start from it is compared.
      matrix: Whether points are matrices.
    """

    name: str
    lmo: Callable[[Array, Array], Array] | None = None
    project: Callable[[Array], Array] | None = None
    size: float = 1.0
    matrix: bool = False

    def centered_at(self, center: Any) -> "ConstraintSet":
        """The set moved by `center`, an array in the shape of the points.

        >>> import jax.numpy as jnp
        >>> l2_ball(1.0).centered_at(jnp.array([2.0, 0.0])).project(jnp.zeros(2)).tolist()
        [1.0, 0.0]
        """
        c = widened(jnp.asarray(center))
        oracle, project = self.lmo, self.project
        return replace(
            self,
            name=f"{self.name}, moved",
            lmo=oracle and (lambda g, x: c + oracle(g, x - c)),
            project=project and (lambda x: c + project(x - c)),
        )


def simplex(radius: float = 1.0) -> ConstraintSet:
    """Entries at least zero that sum to `radius`."""
    return _of("simplex", radius, lmo.simplex, projections.simplex)


def l1_ball(radius: float = 1.0) -> ConstraintSet:
    """Sizes of the entries sum to at most `radius`."""
    return _of("l1_ball", radius, lmo.l1_ball, projections.l1_ball)


def l2_ball(radius: float = 1.0) -> ConstraintSet:
    """Euclidean length at most `radius`."""
    return _of("l2_ball", radius, lmo.l2_ball, projections.l2_ball)


def lp_ball(p: float, radius: float = 1.0) -> ConstraintSet:
    """The p-norm is at most `radius`, p between 1 and infinity.

    Raises:
      ValueError: `p` is not above 1 and finite, or the radius is not positive.
    """
    if not 1 < p < float("inf"):
        raise ValueError(f"p is {p}; wanted 1 < p < inf: the ends are l1_ball() and linf_ball()")
    oracle, project = (functools.partial(f, p=p) for f in (lmo.lp_ball, projections.lp_ball))
    return _of(f"lp_ball({p:g})", radius, oracle, project)


def linf_ball(radius: float = 1.0) -> ConstraintSet:
    """Sizes of all entries are at most `radius`."""
    _check_radius(radius)
    return replace(box(-radius, radius), name=f"linf_ball of radius {radius:g}")


def box(low: Any, high: Any) -> ConstraintSet:
    """Entries between `low` and `high`: numbers, or one for each entry.

    Raises:
      ValueError: `low` is above `high` somewhere, or one of them is not finite.
    """
    low, high = (widened(jnp.ravel(jnp.asarray(end))) for end in (low, high))
    width = float(jnp.max(high - low))
    if not jnp.all(low <= high) or not jnp.isfinite(width):
        raise ValueError("box: wanted finite ends with low <= high in every entry")
    return ConstraintSet(
        "box",
        lambda g, x: lmo.box(g.ravel(), x.ravel(), low, high).reshape(g.shape),
        lambda x: projections.box(x.ravel(), low, high).reshape(x.shape),
        size=width,
    )


def nuclear_ball(radius: float = 1.0) -> ConstraintSet:
    """Matrices whose singular values sum to at most `radius`."""
    return _of("nuclear_ball", radius, lmo.nuclear_ball, projections.nuclear_ball, matrix=True)


def spectral_ball(radius: float = 1.0) -> ConstraintSet:
    """Matrices whose largest singular value is at most `radius`."""
    return _of("spectral_ball", radius, lmo.spectral_ball, projections.spectral_ball, matrix=True)


def check_constraint(constraint: Any, needs: str) -> ConstraintSet:
    """Check what a factory got.

    Args:
      constraint: What should be a `ConstraintSet`.
      needs: "lmo" or "project".

    Raises:
      ValueError: It is something else, or lacks the function.
    """
    if not isinstance(constraint, ConstraintSet):
        raise ValueError(
            f"constraint is {constraint!r}; wanted a ConstraintSet, as simplex() or l2_ball(2.0)"
        )
    if getattr(constraint, needs) is None:
        what, fix = {
            "lmo": (
                "linear minimisation oracle, which Frank-Wolfe needs",
                "lmo=lambda g, x: ..., or use gradient descent, which projects",
            ),
            "project": (
                "projection, which gradient descent needs",
                "project=lambda x: ..., or use Frank-Wolfe, which needs lmo alone",
            ),
        }[needs]
        raise ValueError(f"constraint {constraint.name!r} has no {what}; give it {fix}")
    return constraint


def checked_start(x0: Any, eps: float, constraint: ConstraintSet | None) -> Any:
    """A copy of the start in float32 or wider.

    Args:
      x0: Point, of one or several leaves.
      eps: How far from it values are asked for.
      constraint: In which it has to lie; not checked where values are traced.

    Raises:
      ValueError: A leaf is not of real floats, is not finite or is outside of the set; or the
        entries are so large that `eps` is lost beside them.
    """
    if not jax.tree.leaves(x0):
        raise ValueError("x0: the tree has no leaves")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x0):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            where = "x0" + jax.tree_util.keystr(path)
            raise ValueError(f"{where}: dtype is {jnp.result_type(leaf)}; wanted real floats")
    x = jax.tree.map(lambda leaf: jnp.array(leaf, wide_dtype(leaf)), x0)
    flat, _ = ravel_pytree(x)
    shape = point_shape(x)
    if constraint is not None and constraint.matrix and len(shape) != 2:
        raise ValueError(
            f"x0: {constraint.name} is a set of matrices, x0 is not one array of two axes"
        )
    if isinstance(flat, Tracer):
        return x
    if not flat.size:
        raise ValueError("x0: there are no entries")
    if not jnp.isfinite(flat).all():
        raise ValueError("x0: not all entries are finite")
    largest = float(jnp.max(jnp.abs(flat)))
    spacing = float(np.spacing(np.asarray(largest, flat.dtype)))
    if eps < _FEWEST_SPACINGS * spacing:
        raise ValueError(
            f"eps is {eps:g}: beside entries of size {largest:g}, {flat.dtype} keeps "
            f"{max(0.0, np.log10(eps / spacing)):.1f} digits of it; wanted at least "
            f"{_FEWEST_SPACINGS * spacing:.1e}, or 64-bit mode"
        )
    if constraint is not None and constraint.project is not None:
        away = float(jnp.linalg.norm(constraint.project(flat.reshape(shape)).ravel() - flat))
        # Points that were projected, or summed in another order, lie inside up to rounding.
        if not away <= constraint.size * float(jnp.finfo(flat.dtype).eps) ** 0.5:
            raise ValueError(
                f"x0: outside of {constraint.name}, {away:.3g} from its nearest point; "
                "start at constraint.project(x0)"
            )
    return x


def point_shape(x: Any) -> tuple[int, ...]:
    """The shape in which sets and moves see a point: its own if it is one leaf, flat otherwise."""
    leaves = jax.tree.leaves(x)
    return leaves[0].shape if len(leaves) == 1 else (ravel_pytree(x)[0].size,)


def _of(
    name: str, radius: float, oracle: Callable, project: Callable, matrix: bool = False
) -> ConstraintSet:
    """A ball or simplex from two functions of `core`."""
    _check_radius(radius)
    flat = (lambda x: x) if matrix else jnp.ravel
    return ConstraintSet(
        f"{name} of radius {radius:g}",
        lambda g, x: oracle(flat(g), radius=radius).reshape(g.shape),
        lambda x: project(flat(x), radius=radius).reshape(x.shape),
        size=radius,
        matrix=matrix,
    )


def _check_radius(radius: float) -> None:
    if not isinstance(radius, int | float | np.number) or not 0 < radius < float("inf"):
        raise ValueError(f"radius is {radius!r}; wanted a positive number")
