"""How much the rows of a matrix get in each other's way: many vectors in few dimensions.

An embedding has more tokens than dimensions, so their vectors cannot all be orthogonal. The mean squared
cosine between them is at least the bound of Welch, near 1 / m for m dimensions; if the loss of a model comes from
this interference, it falls with its width as 1 / m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.inspect._parts import Source, grid, matrices, named
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._statistics import streamed
from weightsmith.weights import Pattern, Weights, open


@card(
    paper="Liu, Liu, Gore 2025, 'Superposition Yields Robust Neural Scaling' (heads of language models); "
    "Welch 1974, 'Lower Bounds on the Maximum Cross Correlation of Signals'",
    covers=("superposition-yields-robust-neural",),
    unit="row",
    claim="in heads of language models the mean squared cosine of two rows is about 1 / m",
)
def overlaps(
    weights: Source | Tensor, *, center: bool = False, pattern: Pattern | None = None, threads: int | None = None
) -> Report:
    r"""Lengths of the rows of a matrix and the mean squared cosine between them, against 1 / m.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \ne j} \cos^2(w_i, w_j)
              = \frac{\lVert \hat W^\top \hat W \rVert_F^2 - n}{n (n - 1)} \;\ge\; \frac{n - m}{m (n - 1)}

    with :math:`\hat W` the ``n`` rows of ``m`` values, scaled to length 1. So all pairs are counted at the price of a
    matrix ``[m, m]``.

    Args:
        weights: a matrix ``[n, m]``, or a checkpoint; anything that `weightsmith.open` opens.
        pattern: names of tensors of two axes or more, viewed as ``[first, all others]``; by default those of more
            rows than columns.
        center: subtract the mean of the rows first. What all rows of a head share moves all its logits alike, which
            no softmax sees; and it hides how the rows lie to each other. Read twice then.
        threads: workers; default one a core. Read by runs of rows; at most some ten matrices ``[m, m]`` are held for
            each matrix that is read.

    Returns:
        Report: a row a matrix: ``length`` (mean of the rows), its ``spread`` (standard deviation over mean),
        ``zero`` rows (left out of the cosines), ``mean cosine``, ``mean squared cosine``, its ratio to 1 / m
        (``times 1/m``) and the ``bound`` of Welch. None where values are not finite, or fewer than two rows are not
        zero. Plots: the ratio by matrix, and the distribution of lengths.

    Raises:
        ValueError: no float matrix fits.

    >>> found = overlaps(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -3.0]]))
    >>> found["mean squared cosine"], found["bound"], found["mean cosine"]      # two crosses: as good as can be
    (0.3333333333333333, 0.3333333333333333, -0.3333333333333333)
    """
    opened = Weights.of({"matrix": weights}) if isinstance(weights, Tensor) else open(weights)
    names = matrices(opened, "*" if pattern is None else pattern)
    if pattern is None and not isinstance(weights, Tensor):
        crowded = [name for name in names if opened.spec(name).shape[0] > math.prod(opened.spec(name).shape[1:])]
        if not crowded:
            raise Error(f"no matrix has more rows than columns; say which with pattern=: {listed(names)}")
        names = crowded
    if center:
        opened = _centered(opened.select(names), threads)
    groups = [(opened.node(name),) for name in names]
    found = streamed(_sums, groups, "overlaps", threads, unit="row", large=True)
    rows = [_row(name, opened.spec(name).shape, sums) for name, sums in zip(names, found, strict=True)]
    widest = max(zip(rows, found, strict=True), key=lambda pair: pair[0]["values"])
    return Report(
        "Overlaps of rows",
        figures={"matrices": len(rows), **{key: widest[0][key] for key in ("tensor", *_FIGURES)}},
        table=rows,
        plots=[
            grid("mean squared cosine, times 1 / columns", rows, lambda row: row["times 1/m"]),
            _lengths(widest[0]["tensor"], widest[1]),
        ],
        notes=["1 / columns is what independent random rows would have. The figures are those of the largest matrix."],
    )


_FIGURES = ("rows", "columns", "length", "spread", "mean cosine", "mean squared cosine", "times 1/m", "bound")

_Sums = tuple[Tensor, Tensor, Tensor, Tensor]


def _sums(matrix: Tensor) -> _Sums:
    """Of a run of rows: Gram and sum of the scaled rows, sums of lengths and of their squares, counts by length."""
    flat = matrix.reshape(len(matrix), -1)
    lengths = flat.norm(dim=1)
    some = lengths > 0
    scaled = torch.where(some[:, None], flat / torch.where(some, lengths, 1.0)[:, None], 0.0)
    wide = lengths.double()
    counts = torch.stack([wide.new_tensor(float(len(flat))), some.sum().double(), wide.sum(), wide.square().sum()])
    # Powers of two of the lengths, in steps of 1/8 from 2 ** -40: enough for every sensible weight.
    steps = (8 * (torch.where(some, wide, 1.0).log2() + 40)).nan_to_num(0.0).clamp(0, 639).long()
    histogram = torch.bincount(steps, weights=some.double(), minlength=640)
    return (scaled.T @ scaled).double(), scaled.double().sum(dim=0), counts, histogram


def _row(name: str, shape: Sequence[int], sums: _Sums) -> dict[str, Any]:
    gram, total, counts, _ = sums
    columns = math.prod(shape[1:])
    row: dict[str, Any] = {**named(name), "rows": shape[0], "columns": columns, "values": shape[0] * columns}
    everything, some, lengths, squares = counts.tolist()
    if not (math.isfinite(squares) and bool(gram.isfinite().all())):
        return row | dict.fromkeys(("length", "spread", "zero", *_FIGURES[4:]))
    mean = lengths / everything
    deviation = math.sqrt(max(squares / everything - mean * mean, 0.0))
    row |= {"length": mean, "spread": deviation / mean if mean else None, "zero": round(everything - some)}
    pairs = some * (some - 1)
    if not pairs:
        return row | dict.fromkeys(_FIGURES[4:])
    squared = max((float(gram.square().sum()) - some) / pairs, 0.0)
    return row | {
        "mean cosine": (float(total.square().sum()) - some) / pairs,
        "mean squared cosine": squared,
        "times 1/m": squared * columns,
        "bound": max((some - columns) / (columns * (some - 1)), 0.0),
    }


def _centered(weights: Weights, threads: int | None) -> Weights:
    """The same matrices without the mean of their rows; lazy."""
    names = list(weights)
    totals = streamed(_total, [(weights.node(name),) for name in names], "means of rows", threads, unit="row")
    pairs = zip(names, totals, strict=True)
    means = Weights.of({name: (total / weights.spec(name).shape[0]).float() for name, total in pairs})
    return weights.map(_less, unit="row", whole=[means])


def _total(matrix: Tensor) -> Tensor:
    return matrix.double().sum(dim=0)


def _less(matrix: Tensor, mean: Tensor) -> Tensor:
    return matrix - mean


def _lengths(name: str, sums: _Sums) -> Plot:
    histogram = sums[3].tolist()
    used = [index for index, count in enumerate(histogram) if count]
    span = range(used[0], used[-1] + 1) if used else range(0)
    line = Line(name, [2 ** ((index + 0.5) / 8 - 40) for index in span], [histogram[index] for index in span])
    return Plot("Lengths of rows", "length", "rows, by eighths of an octave", [line], log="x")
