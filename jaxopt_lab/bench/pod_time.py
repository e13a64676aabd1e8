"""The least time that a step can take on a TPU, from the rates in its data sheet."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxopt_lab.core.whole_matrices import AT_ONCE


@dataclass(frozen=True)
class Chip:
    """Published rates of one chip.

    Source: Cloud TPU documentation, "System architecture" of TPU v5e, v5p and v6e.
    """

    flops: float
    """Of bfloat16 products, a second."""
    hbm_rate: float
    """Bytes a second."""
    link_rate: float
    """Bytes a second that all links of a chip send together, half of the bidirectional rate."""


CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 600e9),
    "v6e": Chip(918e12, 1638e9, 400e9),
}


class Time(NamedTuple):
    """Seconds of a step, if each resource is used at its full rate."""

    compute: float
    memory: float
    link: float

    @property
    def at_least(self) -> float:
        """If all of it happens at the same time."""
        return max(self)


def step_time(
    found: Mapping[str, Any],
    target: str,
    mean: Callable[[Callable[[Mapping[str, Any]], float]], float],
) -> Time:
    """Time of a compiled step.

    Products count by `product_flops`. Memory counts arguments and results once and what
    collectives deliver twice, written and read, so it is a lower bound: activations are left out.
    The bytes that a chip sends leave it over all of its links; those of an all-to-all travel a
    quarter of each side of the torus on average, in two stages half of the way in each.

    Args:
      found: As `pod_programs.compile_case` returns it.
      target: A topology.
      mean: Averages a number of a step over the steps of a period.
    """
    kind, _, shape = target.partition(":")
    chip = CHIPS[kind]
    sides = [int(side) for side in shape.split("x")]
    hops = max(1.0, sum(sides) / (8 if math.prod(sides) > AT_ONCE else 4))

    def sent(step: Mapping[str, Any]) -> float:
        each = step["collectives"]
        return math.fsum(x["sent"] * (hops if k == "all-to-all" else 1) for k, x in each.items())

    def delivered(step: Mapping[str, Any]) -> float:
        return math.fsum(x["bytes"] for x in step["collectives"].values())

    moved = found["argument_bytes"] + found["output_bytes"] + 2 * mean(delivered)
    return Time(
        compute=mean(lambda step: step["flops"]) / chip.flops,
        memory=moved / chip.hbm_rate,
        link=mean(sent) / chip.link_rate,
    )
