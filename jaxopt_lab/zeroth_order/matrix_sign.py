"""The matrix sign of matrices and the sign of everything else, as a link of a chain."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core import newton_schulz as iteration
from jaxopt_lab.core.numerics import Scalar, widened
from jaxopt_lab.optim.matrix_leaves import MatrixLeaves
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import MeshWork, NewtonSchulz
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix
from jaxopt_lab.zeroth_order.directions import leaves_of

# A sign that depends on the last bits of a difference of losses is worth float32 iterates.
FLOAT32 = NewtonSchulz(dtype="float32")


def scale_by_matrix_sign(
    *,
    matrix_scale: Scalar = 1.0,
    matrix_axes: MatrixAxesSpec = None,
    newton_schulz: NewtonSchulz = FLOAT32,
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Newton-Schulz of each matrix, $\mathrm{NS}(U S V^\top) \approx U V^\top$; signs elsewhere.

    Embeddings and heads are matrices as well. A matrix with an entry that is not finite, and such
    an entry elsewhere, gets an update of 0.

    Args:
      matrix_scale: Factor on the result for matrices.
      matrix_axes: Layouts of the matrices; None: as described at `Probes`.
      newton_schulz: The iteration.
      mesh: Layout of the parameters, and who does the work on whole matrices.

    Example:
      >>> tx = scale_by_matrix_sign()
      >>> x = {"w": 3 * jnp.eye(2), "b": jnp.array([-2.0, 0.0])}
      >>> updates, _ = tx.update(x, tx.init(x))
      >>> updates["b"].tolist()
      [-1.0, 0.0]
    """
    polar = functools.partial(
        iteration.newton_schulz,
        steps=newton_schulz.steps,
        coefficients=newton_schulz.coefficients,
        compute_dtype=newton_schulz.dtype,
        eps=newton_schulz.eps,
    )
    return matrix_signs(polar, matrix_scale, matrix_axes, mesh)


def matrix_signs(
    polar: Callable[[Array], Array],
    matrix_scale: Scalar,
    matrix_axes: MatrixAxesSpec,
    mesh: MeshWork,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_matrix_sign` with any function of stacks (batch, m, n)."""

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        out = list(map(jnp.sign, leaves))
        layouts = matrix_layouts(updates, matrix_axes)
        given = mesh.param_shardings
        shardings = given and dict(enumerate(broadcast_prefix("param_shardings", given, updates)))
        matrices = {i: leaves[i] for i in layouts}
        known = MatrixLeaves.of(matrices, layouts, shardings and {i: shardings[i] for i in layouts})
        options = {"replicated_work": mesh.replicated_work, "transposable": True}
        (found,) = known.map_whole(
            lambda x: (polar(x),), ([widened(x) for x in matrices.values()],), **options
        )
        for i, u in zip(matrices, found, strict=True):
            out[i] = matrix_scale * widened(u)
        return treedef.unflatten(out), state

    return guarded(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update))


def matrix_layouts(
    params: optax.Params, matrix_axes: MatrixAxesSpec
) -> dict[int, MuonDimensionNumbers]:
    """The layouts of the leaves that hold matrices, by their numbers in the tree."""
    axes = [leaf.axes for leaf in leaves_of(params, matrix_axes)]
    return {
        i: MuonDimensionNumbers(a.reduction, a.output) for i, a in enumerate(axes) if a is not None
    }
