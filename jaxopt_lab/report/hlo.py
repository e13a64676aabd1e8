"""Counting the collectives of a compiled program, from its text alone."""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# name = shape kind(operands...): the shape holds no '=', '%' or quotes, which keeps the search
# out of operands and of the op_name strings in the metadata.
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT\s+)?%?[\w.\-]+ = ([^=%"]*?) (' + "|".join(KINDS) + r")(-start)?\(",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[suc]\d+|f\d+\w*)\[([\d,<=]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# Not what ends the metadata of a kernel, which may take several lines.
_END = re.compile(r"\}(, execution_thread=.*)?$")
_FUSION = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
# In the fusion that begins what a TPU sends beside other work.
_BEGINS = "AsyncCollectiveStart"
_COMMENT = re.compile(r"/\*.*?\*/")
_SINGLETON_GROUPS = re.compile(r"replica_groups=(?:\{(?:\{\d+\},?)+\}|\[\d+,1\]<=)")


class CollectiveTotal(NamedTuple):
    """How often one kind of collective occurs, and the bytes of its results on one device."""

    count: int
    bytes: int


class Instruction(NamedTuple):
    """One collective as it stands in the text."""

    kind: str
    bytes: int  # of its result on one device
    group: int  # devices that take part together; 1 where the text does not say
    channel: int | None  # those of one channel may be parts of one


def collectives(compiled_text: str) -> dict[str, CollectiveTotal]:
    """Counts the collectives of a compiled program.

    What is asynchronous counts once, at its start. Every other occurrence in the text counts once:
    the trip count of a loop around it is not known here, and both branches of a conditional are
    counted. Groups of a single device move nothing and are left out.

    Args:
      compiled_text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      For every kind that occurs, the number of instructions and the bytes of their results on one
      device (an all-gather's result is the gathered array).

    >>> text = "%g = f32[8,4]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}"
    >>> collectives(text)
    {'all-gather': CollectiveTotal(count=1, bytes=128)}
    """
    totals: dict[str, CollectiveTotal] = {}
    for each in _written(compiled_text):
        before = totals.get(each.kind, CollectiveTotal(0, 0))
        totals[each.kind] = CollectiveTotal(before.count + 1, before.bytes + each.bytes)
    return dict(sorted(totals.items()))


def _written(text: str) -> Iterator[Instruction]:
    bodies = dict(computations(text)) or {"": text.splitlines()}
    begun = begun_in_fusions(bodies)
    fused: set[str] = set()
    for lines in bodies.values():
        for line in lines:
            if callee := fusion_callee(line):
                fused.add(callee)
                yield from in_fusion(callee, line, bodies.get(callee, ()), begun)
    for name, lines in bodies.items():
        if name not in fused:
            yield from instructions("\n".join(lines))


def computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The parts of a program with their lines; the name of the first one to run has "ENTRY "."""
    name, lines = None, []
    for line in text.splitlines():
        if name is None and (head := _COMPUTATION.match(line)):
            name, lines = ("ENTRY " if line.startswith("ENTRY ") else "") + head[1], []
        elif _END.match(line) and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def fusion_callee(line: str) -> str | None:
    """The part that a line runs as one operation."""
    found = " fusion(" in line and _FUSION.search(line)
    return found[1] if found else None


def begun_in_fusions(bodies: Mapping[str, Iterable[str]]) -> set[Instruction]:
    """Collectives that a TPU runs beside other work, from the parts of a program."""
    return {
        each
        for lines in bodies.values()
        if any(_BEGINS in line for line in lines)
        for line in lines
        for each in instructions(line)
    }


def in_fusion(
    name: str, line: str, body: Iterable[str], begun: Container[Instruction]
) -> list[Instruction]:
    """Collectives of a fusion. Start, steps and end of one repeat it, and the start counts.

    Args:
      name: Of the part that the fusion runs.
      line: That runs it.
      body: Lines of the part.
      begun: As `begun_in_fusions` finds them.
    """
    found = [each for text in body for each in instructions(text)]
    if not any(_BEGINS in text for text in body):
        found = [each for each in found if each not in begun]
    if "all-reduce-scatter" not in name:
        return found
    # An all-reduce of which each device keeps a slice.
    size = shape_bytes(line.split(" = ", 1)[1].split(" fusion(", 1)[0])
    return [x._replace(kind="reduce-scatter", bytes=size) for x in found if x.kind == "all-reduce"]


def instructions(compiled_text: str) -> Iterator[Instruction]:
    """The collectives of a text one by one, wherever they stand."""
    text = _COMMENT.sub("", compiled_text)
    for match in _INSTRUCTION.finditer(text):
        shape, kind, start = match.groups()
        end_of_line = text.find("\n", match.end())
        attributes = text[match.end() : end_of_line if end_of_line >= 0 else None]
        if _SINGLETON_GROUPS.search(attributes):
            continue
        # A start has a tuple of (operands, results, context...); that of an all-reduce may have the
        # type of its result instead.
        if start and (kind != "all-reduce" or shape.startswith("((")):
            shape = _tuple_elements(shape)[1]
        channel = re.search(r"channel_id=(\d+)", attributes)
        number = None if channel is None else int(channel[1])
        yield Instruction(kind, shape_bytes(shape), _group_size(attributes), number)


def _group_size(attributes: str) -> int:
    """Devices of a group, from any of the notations of replica groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 1


def _tuple_elements(shape: str) -> list[str]:
    """Splits `(a, (b, c), d)` at its outer commas."""
    elements, depth, start = [], 0, 1
    inner = shape.strip()
    for position, character in enumerate(inner):
        depth += character in "([{"
        depth -= character in ")]}"
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            elements.append(inner[start:position])
            start = position + 1
    return elements


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in the text of a shape."""
    return sum(
        math.ceil(math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d) * _bits(dtype) / 8)
        for dtype, dims in _ARRAY.findall(shape)
    )


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8  # pred takes a byte
