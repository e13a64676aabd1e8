"""The inverse roots of Shampoo's factors, one batched computation for all blocks of one size."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.inverse_roots import inverse_root
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.ordering import refreshed_share
from jaxopt_lab.core.stacks import Arrays, Member, ReplicatedWork, Slot, map_stacks
from jaxopt_lab.optim.options import InverseRoot


def refreshed_roots(
    members: Sequence[Member],
    arrays: Arrays,
    filled: Sequence[Array],
    options: InverseRoot,
    eps: Scalar,
    replicated_work: ReplicatedWork = "repeat",
    share: tuple[Array, int] | None = None,
) -> Arrays:
    """Inverse roots of the factors. Where one comes out non-finite the last one stays.

    Args:
      members: The leaves; their kind is how they are cut.
      arrays: Their factors and last roots.
      filled: (batch,) divisors of the factors, one array a leaf.
      options: How.
      eps: The ridge.
      replicated_work: As in `MeshWork`.
      share: (j, f): of every stack, refresh the j-th of f parts alone.

    Returns:
      The roots.
    """
    sides, given = [], {"factor": [], "filled": [], "root": []}
    for i, member in enumerate(members):
        blocks = member.kind
        exponent = options.of_order(blocks.order) if blocks.order else None
        for k, edge in enumerate(blocks.edges):
            leading, _, *spec = member.slots[f"factor.{k}"].spec
            square = Slot((edge, edge), (edge, edge), PartitionSpec(leading, *spec))
            slots = {
                "factor": square,
                "filled": Slot((), (), PartitionSpec(leading)),
                "root": square,
            }
            sides.append((i, k, Member(slots, member.mesh, kind=exponent)))
            for what in ("factor", "root"):
                given[what].append(arrays[f"{what}.{k}"][i].reshape((-1, edge, edge)))
            each = jnp.broadcast_to(filled[i][:, None], (filled[i].size, blocks.number))
            given["filled"].append(each.reshape(-1))
    done = map_stacks(
        partial(_stack_roots, options), [side for *_, side in sides], given,
        ("factor", "filled", "root"), ("root",),
        replicated_work=replicated_work, operand=(eps, share), decomposes=True,
    )  # fmt: skip
    roots = {name: list(values) for name, values in arrays.items() if name.startswith("root")}
    for (i, k, _), new in zip(sides, done["root"], strict=True):
        roots[f"root.{k}"][i] = new.reshape(roots[f"root.{k}"][i].shape)
    return roots


def _stack_roots(
    options: InverseRoot,
    exponent: float,
    given: tuple[Scalar, tuple[Array, int] | None],
    factor: Array,
    filled: Array,
    root: Array,
) -> Array:
    """Inverse roots of a stack (n, d, d), or of a share of it."""
    eps, share = given

    def refreshed(factor: Array, filled: Array, root: Array) -> tuple[Array, Array, Array]:
        new = inverse_root(
            factor / filled[:, None, None],
            exponent,
            eps=jnp.full_like(filled, eps).astype(factor.dtype),
            relative=options.relative_eps,
            method=options.method,
            precision=options.precision,
        )
        usable = jnp.isfinite(new).all(axis=(-2, -1), keepdims=True)
        return factor, filled, jnp.where(usable, new, root)

    arrays = factor, filled, root
    return (refreshed(*arrays) if share is None else refreshed_share(refreshed, arrays, *share))[2]
