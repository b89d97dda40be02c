"""What fewer bits would cost each matrix, before anything is quantized."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._parts import Source, by_kind, grid, matrices, mean_of, named
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._statistics import streamed
from weightsmith.prune import prunable
from weightsmith.quantize import rtn
from weightsmith.weights import Pattern, Weights, open


@card(
    paper="Jin et al. 2024, 'A Comprehensive Evaluation of Quantization Strategies for Large Language Models' "
    "(round to nearest by bits); the error itself is the plain relative Frobenius norm",
    unit="row",
    claim="one bit less about doubles the error",
)
def quantization_error(
    weights: Source,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    group: int | None = None,
    pattern: Pattern | None = None,
    threads: int | None = None,
) -> Report:
    r"""The relative error of every matrix after rounding to nearest, for several numbers of bits in one reading.

    .. math:: e_b = \frac{\lVert W - s\,q \rVert_F}{\lVert W \rVert_F}

    with scales :math:`s` and codes :math:`q` of `weightsmith.quantize.rtn`, the scales in the dtype of the weight.

    Args:
        weights: a checkpoint; anything that `weightsmith.open` opens.
        bits: numbers of bits, from 2 to 8.
        group: inputs that share a scale; None for whole rows. Where groups do not fill the rows of a matrix, the
            report says so, and the matrix has no error.
        pattern: names of tensors; by default matrices and convolutions without embeddings and the head.
        threads: workers; default one a core. Read by runs of rows.

    Returns:
        Report: a row a matrix with one column per number of bits; the figures are of all measured matrices
        together. Plots: error over bits by kind, and by layer and kind at the middle number of bits.

    Raises:
        ValueError: bits out of range, or no matrix that fits.

    >>> found = quantization_error({"l.weight": torch.tensor([[7.5, -7.5, 1.0, 0.0]])}, bits=[4])
    >>> round(found["4 bits"], 4)                                   # 7.5 becomes 7, -7.5 becomes -8
    0.0664
    """
    widths = sorted(set(bits))
    if not widths or (group is not None and group < 1):
        raise Error(f"quantization_error needs numbers of bits and groups of 1 or more, got {list(bits)} and {group}")
    for width in widths:
        rtn(torch.ones(1, 1), bits=width)  # refuses what it cannot do before anything is read
    opened = open(weights)
    names = matrices(opened, prunable(opened) if pattern is None else pattern)
    fitting = [name for name in names if group is None or _inputs(opened, name) % group == 0]
    sums: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(opened.spec(name).dtype for name in fitting):
        own = [name for name in fitting if opened.spec(name).dtype == dtype]
        function = functools.partial(_errors, bits=widths, group=group, scale_dtype=dtype)
        sums |= zip(own, streamed(function, [(opened.node(n),) for n in own], "rounding", threads, "row"), strict=True)
    rows = [_row(opened, name, widths, sums.get(name)) for name in names]
    finite = [one for one in sums.values() if bool(one.isfinite().all())]
    together = _relative(torch.stack(finite).sum(0)) if finite else [None] * len(widths)
    keys = [_key(width) for width in widths]
    middle = keys[(len(keys) - 1) // 2]
    notes = ["A small error of a matrix is no promise: how much its network loses depends on the inputs it meets."]
    if len(fitting) < len(names):
        notes.append(
            f"{len(names) - len(fitting)} of {len(names)} matrices have rows that groups of {group} do not fill."
        )
    if len(finite) < len(fitting):
        notes.append(f"{len(fitting) - len(finite)} matrices hold values that are not finite, which no grid holds.")
    return Report(
        "Error of rounding to fewer bits",
        figures={
            "matrices": len(names),
            "measured": len(finite),
            "group": group,
            **dict(zip(keys, together, strict=True)),
        },
        table=rows,
        plots=[_lines(rows, widths), grid(f"relative error at {middle}", rows, lambda row: row[middle])],
        notes=notes,
    )


def _errors(weight: Tensor, *, bits: Sequence[int], group: int | None, scale_dtype: torch.dtype) -> Tensor:
    """Sums of squared errors, one a number of bits, and of squares: ``[len(bits) + 1]``, float64."""
    if not weight.isfinite().all():
        return torch.full((len(bits) + 1,), math.nan, dtype=torch.float64, device=weight.device)
    flat = weight.reshape(len(weight), -1)
    sums = []
    for width in bits:
        near = rtn(flat, bits=width, group=group, scale_dtype=scale_dtype).values()
        sums.append((flat - near).double().square().sum())
    return torch.stack([*sums, flat.double().square().sum()])


def _relative(sums: Tensor) -> list[float | None]:
    *errors, energy = sums.tolist()
    if not math.isfinite(energy):
        return [None] * len(errors)
    return [math.sqrt(error / energy) if energy else 0.0 for error in errors]


def _row(weights: Weights, name: str, bits: Sequence[int], sums: Tensor | None) -> dict[str, Any]:
    spec, inputs = weights.spec(name), _inputs(weights, name)
    errors = [None] * len(bits) if sums is None else _relative(sums)
    row: dict[str, Any] = {**named(name), "rows": spec.shape[0], "inputs": inputs, "values": spec.numel}
    return row | {_key(width): error for width, error in zip(bits, errors, strict=True)}


def _lines(rows: Sequence[Mapping[str, Any]], bits: Sequence[int]) -> Plot:
    lines = []
    for kind, members in by_kind(rows).items():
        means = [mean_of([row[_key(width)] for row in members]) for width in bits]
        lines.append(Line(kind, list(bits), [math.nan if mean is None else mean for mean in means]))
    return Plot("Error by bits and kind", "bits", "relative error, mean over layers", lines, log="y")


def _key(bits: int) -> str:
    return f"{bits} bits"


def _inputs(weights: Weights, name: str) -> int:
    return math.prod(weights.spec(name).shape[1:])
