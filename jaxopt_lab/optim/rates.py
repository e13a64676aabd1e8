"""Learning rates and weight decay: numbers or schedules."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import keystr

from jaxopt_lab.core.checks import check_rates, check_tree
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.options import MASK, Routing
from jaxopt_lab.optim.routing import broadcast_prefix


def scaled_rate(rate: optax.ScalarOrSchedule, ratio: Scalar) -> optax.ScalarOrSchedule:
    """`ratio * rate` for a number or a schedule."""
    if isinstance(ratio, int | float) and ratio == 1:
        return rate
    if callable(rate):
        return lambda count: ratio * rate(count)
    return ratio * rate


def decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any, routing: Routing
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, with a mask from the arguments or from the routing.

    Raises:
      ValueError: The decay is negative or no number, or as for `matched_mask`.
    """
    check_rates(weight_decay=weight_decay)
    matched = matched_mask(mask, routing)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()  # which needs no parameters
    return optax.add_decayed_weights(weight_decay, matched)


def matched_mask(mask: Any, routing: Routing) -> Callable[[optax.Params], Any] | None:
    """The mask of the arguments or of the routing, as a function of the parameters.

    It may be a prefix, or a tree with entries beneath what an outer mask hides.

    Raises:
      ValueError: There are two masks, or `mask` is one bool; at `init`, it has no bool for a leaf.
    """
    check_tree("mask", mask, *MASK)
    if mask is not None and routing.decay_mask is not None:
        raise ValueError("give either mask or Routing.decay_mask, not both")
    mask = routing.decay_mask if mask is None else mask
    if mask is None:
        return None

    def matched(params: optax.Params) -> Any:
        entries = broadcast_prefix("mask", mask, params)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        for (path, _), entry in zip(leaves, entries, strict=True):
            if not isinstance(entry, bool) and getattr(entry, "dtype", None) != "bool":
                raise ValueError(f"mask of leaf {keystr(path)}: got {entry!r}, wanted a bool")
        return treedef.unflatten(entries)

    return matched
