"""What commands print: tables that fit the terminal, whole names when piped, JSON."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from weightsmith.text import clean, laid_out, number, percent, plural, size

__all__ = ["clean", "echo_json", "echo_table", "laid_out", "number", "percent", "plural", "size", "width"]


def echo_json(data: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def width() -> int | None:
    """Columns of the terminal; None where the output is not one and nothing need fit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def echo_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; see `laid_out`."""
    lines = laid_out(headings, rows, left, width())
    # A name that does not fit stands on a line of its own, so the head may have two lines.
    head = 2 if len(lines) > len(rows) + 1 else 1
    for index, line in enumerate(lines):
        click.echo(click.style(line, bold=True) if index < head else line)
