"""Tables as aligned plain text or Markdown."""

import math
from collections.abc import Sequence
from typing import Any

_SIGNIFICANT_DIGITS = 4
_MAX_DECIMALS = 6


def format_table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, markdown: bool = False
) -> str:
    r"""Formats a table.

    Columns of numbers are aligned to the right; the floats of a column share their number of
    decimals, so the points stand below each other. Other columns are aligned to the left.
    None is an empty cell, shown as `-`.

    Args:
      headers: One name per column.
      rows: One sequence of cells per row: strings, numbers, bools or None.
      markdown: Write a Markdown table instead of plain text.

    Raises:
      ValueError: If a row has another number of cells than there are headers.

    >>> print(format_table(["rule", "ms"], [["lion", 0.63], ["muon", 8.7]]))
    rule    ms
    ----  ----
    lion  0.63
    muon  8.70
    >>> print(format_table(["rule", "P"], [["lion", None]], markdown=True))
    | rule |   P |
    | ---- | --: |
    | lion |   - |
    """
    for number, row in enumerate(rows):
        if len(row) != len(headers):
            raise ValueError(
                f"row {number}: {len(row)} cells for {len(headers)} headers: {list(row)!r}"
            )
    columns = [[row[i] for row in rows] for i in range(len(headers))]
    numeric = [all(_is_number(cell) for cell in column) for column in columns]
    texts = [_format_column(column) for column in columns]
    smallest = 3 if markdown else 1
    widths = [
        max(smallest, len(header), *map(len, column), 0)
        for header, column in zip(headers, texts, strict=True)
    ]

    def line(cells: Sequence[str]) -> str:
        return (" | " if markdown else "  ").join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )

    body = [line(cells) for cells in zip(*texts, strict=True)]
    if not markdown:
        rule = "  ".join("-" * width for width in widths)
        return "\n".join(text.rstrip() for text in [line(headers), rule, *body])
    rule = " | ".join(
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join(f"| {text} |" for text in [line(headers), rule, *body])


def _is_number(cell: Any) -> bool:
    return cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))


def _format_column(column: Sequence[Any]) -> list[str]:
    floats = [abs(c) for c in column if isinstance(c, float) and math.isfinite(c) and c]
    spread = max(floats, default=1.0) / min(floats, default=1.0)
    # Beyond four orders of magnitude a shared number of decimals is either noise or zeros.
    style = ".3g" if spread > 1e4 or max(floats, default=1.0) >= 1e7 else f".{_decimals(floats)}f"
    return [_format_cell(cell, style) for cell in column]


def _decimals(floats: Sequence[float]) -> int:
    if not floats:
        return 1
    shared = _SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(max(floats)))
    needed = max(_needed_decimals(value) for value in floats)
    smallest = 2 - math.floor(math.log10(min(floats)))
    return min(max(shared, smallest, 0), needed, _MAX_DECIMALS)


def _needed_decimals(value: float) -> int:
    text = f"{value:.{_MAX_DECIMALS}f}".rstrip("0")
    return len(text) - text.index(".") - 1


def _format_cell(cell: Any, float_style: str) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return format(cell, float_style) if isinstance(cell, float) else str(cell)
