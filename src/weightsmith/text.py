"""Figures and tables as text for people; nothing here prints.

Names come from files that nobody has checked, so what could steer a terminal is shown escaped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def clean(text: str) -> str:
    r"""``text`` with everything that is not printable written as an escape.

    >>> print(clean("a\x1b[31m.weight"))
    a\x1b[31m.weight
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(nbytes: int) -> str:
    """A number of bytes for people.

    >>> size(999), size(124_000_000), size(1_500)
    ('999 B', '124.0 MB', '1.5 kB')
    """
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def number(value: float | None) -> str:
    """Four digits of a figure; a dash for none.

    >>> number(0.0123456), number(None), number(-2.0)
    ('0.01235', '-', '-2')
    """
    return "-" if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share in percent; never 0 or 100 unless it is.

    >>> percent(0.5), percent(1e-9), percent(0.0), percent(0.99999)
    ('50.0%', '<0.1%', '0%', '>99.9%')
    """
    if share is None:
        return "-"
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.001 else ">99.9%" if share > 0.999 else f"{share:.1%}"


def plural(count: int, word: str) -> str:
    """
    >>> plural(1, "tensor"), plural(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def laid_out(
    headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, room: int | None = None
) -> list[str]:
    """A table as lines.

    Args:
        headings: one a column.
        rows: cells as text; the first is a name.
        left: how many columns, from the first, are aligned to the left.
        room: columns that there are. Where a line would not fit, the name stands on a line of its
            own above the other cells; nothing is ever cut off.

    >>> for line in laid_out(["name", "size"], [["w", "12 B"], ["layer.bias", "4 B"]]):
    ...     print(line)
    name        size
    w           12 B
    layer.bias   4 B
    """
    table = [[clean(cell) for cell in row] for row in [headings, *rows]]
    widths = [max(_cells(row[i]) for row in table) for i in range(len(headings))]
    if room is None or sum(widths) + 2 * (len(widths) - 1) <= room or len(widths) < 2:
        return [_line(row, widths, left) for row in table]
    below = [[row[0], "  " + _line(row[1:], widths[1:], left - 1)] for row in table]
    return [line for pair in below for line in pair]


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    padded = []
    for i, (cell, wide) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (wide - _cells(cell))
        padded.append(cell + space if i < left else space + cell)
    return "  ".join(padded).rstrip()


def _cells(text: str) -> int:
    """Columns that a terminal needs for ``text``."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
