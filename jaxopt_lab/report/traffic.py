"""What a device sends in one run of a program, from its text: loops and branches counted."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from jaxopt_lab.report.hlo import (
    Instruction,
    begun_in_fusions,
    computations,
    fusion_callee,
    in_fusion,
    instructions,
)

_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r" conditional\(.*(?:branch_computations=\{([^}]*)\}"
    r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_CALLS = re.compile(r" (?:call|async-start)\(.*(?:calls|to_apply)=%?([\w.\-]+)")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"%?([\w.\-]+) = ([su])32\[\](?:\{[^}]*\})? constant\((\d+)\)")
_ADDED = re.compile(r" u32\[\](?:\{[^}]*\})? add\(%?get-tuple-element[\w.]*, %?([\w.\-]+)\)")


class Traffic(NamedTuple):
    """Collectives of one kind in one run of a program, on one device."""

    count: float
    bytes: float
    """Of the results."""
    sent: float
    """Bytes that leave a device where every device of a group is next to every other."""


Totals = dict[str, Traffic]


def traffic(
    compiled_text: str, *, branch: Callable[[Iterable[float]], float] = max, rounds: int = 1
) -> dict[str, Traffic]:
    """Counts the collectives that one run of a compiled program executes.

    Unlike `collectives`, which counts what is written: the body of a loop counts as often as it
    runs, and of a conditional one branch. A device of n sends (n - 1) / n of the result of an
    all-gather or all-to-all, twice that of an all-reduce, and n - 1 results of a reduce-scatter.

    Args:
      compiled_text: `jax.jit(f).lower(...).compile().as_text()`.
      branch: Which branch of a conditional, by its bytes sent: `max` or `min`.
      rounds: Of a loop that ends on a condition and not on a count. Of several in a row the one
        that sends most runs and those inside of it do not, as a refresh of bases after a start.

    Returns:
      For every kind that occurs, how often, with the bytes of its results and the bytes sent.
    """
    bodies = dict(computations(compiled_text))
    begun = begun_in_fusions(bodies)
    known: dict[tuple[str, bool], Totals] = {}

    def of(name: str, inside: bool = False) -> Totals:
        if (name, inside) not in known:
            known[name, inside] = _total(parts(bodies.get(name, ()), inside))
        return known[name, inside]

    def parts(lines: Iterable[str], inside: bool) -> Iterator[Totals]:
        waiting: list[Totals] = []
        for line in lines:
            if loop := " while(" in line and _WHILE.search(line):
                counted = _counted_rounds(line, *(bodies.get(name, ()) for name in loop.groups()))
                if counted is not None:
                    yield _times(counted, of(loop[2], inside))
                elif not inside:
                    waiting.append(of(loop[2], inside=True))
            elif found := " conditional(" in line and _BRANCHES.search(line):
                names = re.findall(r"[\w.\-]+", ",".join(filter(None, found.groups())))
                yield _chosen([of(name, inside) for name in names], branch)
            elif name := fusion_callee(line):
                yield from map(_one, in_fusion(name, line, bodies.get(name, ()), begun))
            elif callee := _CALLS.search(line):
                yield of(callee[1], inside)
            else:
                yield from map(_one, instructions(line))
        yield _times(rounds, _chosen(waiting, max))

    entry = next((name for name in bodies if name.startswith("ENTRY ")), None)
    return {} if entry is None else dict(sorted(of(entry).items()))


def _one(each: Instruction) -> Totals:
    n = each.group
    share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    sent = each.bytes * share.get(each.kind, (n - 1) / n)
    return {each.kind: Traffic(1, each.bytes, sent)}


def _counted_rounds(line: str, condition: Iterable[str], body: Iterable[str]) -> int | None:
    """Rounds of a loop: as the compiler notes it, or what its counter is compared with."""
    if noted := _ROUNDS.search(line):
        return int(noted[1])
    bounds = [(int(n), sign) for text in condition for _, sign, n in _CONSTANT.findall(text)]
    if not bounds:
        return None
    bound, sign = max(bounds)
    if sign == "s":
        return bound
    # Over the shards of an operand, which a TPU exchanges while it multiplies, two in a round.
    constants = {name: int(n) for text in body for name, _, n in _CONSTANT.findall(text)}
    added = [constants.get(name, 1) for text in body for name in _ADDED.findall(text)]
    return bound // max(added, default=1)


def _total(parts: Iterable[Totals]) -> Totals:
    out: Totals = {}
    for part in parts:
        for kind, found in part.items():
            before = out.get(kind, Traffic(0, 0, 0))
            out[kind] = Traffic(*map(sum, zip(before, found, strict=True)))
    return out


def _times(n: int, totals: Totals) -> Totals:
    return {kind: Traffic(*(n * x for x in found)) for kind, found in totals.items() if n}


def _chosen(branches: list[Totals], branch: Callable[[Iterable[float]], float]) -> Totals:
    sent = [sum(found.sent for found in totals.values()) for totals in branches]
    return branches[sent.index(branch(sent))] if branches else {}
