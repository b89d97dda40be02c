"""Tables of training runs: columns of numbers from a mapping, from records or from a CSV file, checked.

An error names the line of the file (the first line is the header) or the number of the run.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean, listed

Table = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | os.PathLike[str]
"""Columns by name, a record per run, or the path of a CSV file with a header."""


@dataclass(frozen=True)
class Runs:
    """A table whose cells are as they were given; numbers are checked when a column is asked for."""

    cells: Mapping[str, Sequence[Any]]
    places: Sequence[str]
    """Where each run stands, for messages: ``runs.csv, line 3`` or ``run 1``."""
    source: str = "the table of runs"

    def __len__(self) -> int:
        return len(self.places)

    def raw(self, name: str) -> Sequence[Any]:
        """A column as it was given.

        Raises:
            Error: there is no such column.
        """
        if name not in self.cells:
            known = [str(one) for one in self.cells]
            raise Error(
                f"{self.source} has no column {name!r}{did_you_mean(name, known)}; it has {listed(known, 12)}. "
                "Say which column is meant with columns={...} (--column on the command line)"
            )
        return self.cells[name]

    def numbers(self, name: str, above_zero: bool = True) -> Tensor:
        """A column as float64 ``[n]``.

        Raises:
            Error: a cell is empty, no number, not finite, or not above 0 where it must be.
        """
        values = []
        for cell, place in zip(self.raw(name), self.places, strict=True):
            value = _number(cell)
            if value is None:
                said = "is empty" if cell is None or str(cell).strip() == "" else f"is {cell!r}, no number"
                raise Error(f"{place}: {name} {said}")
            if not math.isfinite(value):
                raise Error(f"{place}: {name} is {value}; leave the run out or mend it")
            if above_zero and value <= 0:
                raise Error(f"{place}: {name} is {value:g}, which is not above 0")
            values.append(value)
        return torch.tensor(values, dtype=torch.float64)

    def take(self, keep: Sequence[int]) -> Runs:
        """Some of the runs."""
        cells = {name: [column[i] for i in keep] for name, column in self.cells.items()}
        return Runs(cells, [self.places[i] for i in keep], self.source)


def read(runs: Table | Runs, columns: Mapping[str, str] | None = None) -> Runs:
    """The table of runs, however it is given.

    Args:
        runs: a mapping of columns, records, or the path of a CSV file.
        columns: names that a law uses -> names in the table, where they differ.

    Raises:
        Error: no runs, rows or columns of different lengths, a name twice.

    >>> read({"N": [1e6, 2e6], "loss": [3.0, 2.5]}).numbers("N")
    tensor([1000000., 2000000.], dtype=torch.float64)
    """
    if isinstance(runs, Runs):
        found = runs
    elif isinstance(runs, str | os.PathLike):
        found = _from_file(Path(runs))
    elif isinstance(runs, Mapping):
        found = _from_columns(runs)
    else:
        found = _from_records(list(runs))
    if not len(found):
        raise Error(f"{found.source} has no runs")
    given = dict(columns or {})
    renamed = {name: found.raw(there) for name, there in given.items()}
    rest = {name: column for name, column in found.cells.items() if name not in renamed}
    return Runs(rest | renamed, found.places, found.source)


def refuse_twins(runs: Runs, names: Sequence[str]) -> None:
    """Raise when two runs have the same figures in all of these columns."""
    seen: dict[tuple[float, ...], str] = {}
    rows = zip(*(runs.numbers(name, above_zero=False).tolist() for name in names), strict=True)
    for row, place in zip(rows, runs.places, strict=True):
        if row in seen:
            raise Error(
                f"{place}: the same {listed(names, 9)} as {seen[row]}; a run that stands twice makes intervals too "
                "narrow. Remove it, or allow it with duplicates=True (--duplicates)"
            )
        seen[row] = place


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several numbers
        return None


def _from_columns(runs: Mapping[str, Any]) -> Runs:
    cells = {str(name): _listed(name, column) for name, column in runs.items()}
    lengths = {name: len(column) for name, column in cells.items()}
    if len(set(lengths.values())) > 1:
        raise Error(f"the columns of the table have different lengths: {lengths}")
    count = next(iter(lengths.values()), 0)
    return Runs(cells, [f"run {index}" for index in range(1, count + 1)])


def _listed(name: Any, column: Any) -> list[Any]:
    values = column.tolist() if hasattr(column, "tolist") else column
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise Error(f"column {name} of the table is {values!r}; a column has a value for each run")
    return list(values)


def _from_records(runs: list[Mapping[str, Any]]) -> Runs:
    names = list(dict.fromkeys(str(name) for run in runs for name in run))
    cells = {name: [run.get(name) for run in runs] for name in names}
    return Runs(cells, [f"run {index}" for index in range(1, len(runs) + 1)])


def _from_file(path: Path) -> Runs:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError:
        raise Error(f"{path}: not a CSV file: it is no UTF-8 text") from None
    except csv.Error as error:
        raise Error(f"{path}: not a CSV file: {error}") from None
    if not header:
        raise Error(f"{path}: an empty file; the first line names the columns")
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise Error(f"{path}, line 1: column {twice[0]!r} stands twice")
    for line, row in rows:
        if len(row) != len(header):
            raise Error(f"{path}, line {line}: {len(row)} cells under {len(header)} columns")
    cells = {name: [row[index] for _, row in rows] for index, name in enumerate(header)}
    return Runs(cells, [f"{path}, line {line}" for line, _ in rows], str(path))
