"""Whole numbers seen through a power, whose exponent is searched for each matrix.

Weights crowd around zero. Under a power below one evenly spaced codes stand for points that crowd there too, and
products of powers are powers of products, so that codes can still be multiplied as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import (
    Coded,
    checked_matrix,
    coded,
    fitted,
    gram_runs,
    output_error,
    run_errors,
    runs_of,
)
from weightsmith.quantize.grids import EXPONENTS, Grid, Power


@card(
    paper="Yvinec, Dapogny, Bailly 2023, 'NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search'",
    covers=("nupes",),
    unit="tensor",
    claim="rounded to nearest at 3 bits with one scale a row, a language model loses less than with evenly spaced "
    "points",
    departs="codes are the nearest points, not rounded powers, and are not learned by gradient; the exponent is that "
    "of least error in the outputs where inputs are told, else in the weights",
)
def nupes(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    grid: Grid = Power(),  # noqa: B008
    clip: int = 0,
) -> Coded:
    r"""The nearest point for every weight, on the power grid that errs least.

    .. math:: \min_a \operatorname{tr}\big((W - Q_a(W))\, H\, (W - Q_a(W))^\top\big)

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, any form; without it errors are those of the weights.
        grid: a `Power`; one with an exponent is taken as it is, else `EXPONENTS` are tried for the whole matrix, or for
            every group where ``each="group"`` (by the error of the group's own outputs).
        clip: how many narrower ranges are tried for each group and exponent; 0 for the one that holds all values.

    Returns:
        codes and parameters. Memory: some six copies of the weight.

    Raises:
        Error: another grid, shapes that do not fit, or values that are not finite.

    >>> nupes(torch.tensor([[9.0, -4.0, 1.0, 0.0]]), grid=ws.quantize.grids.Power(bits=3)).shared["exponent"]
    tensor(0.5000)
    """
    if not isinstance(grid, Power):
        raise Error(f"nupes rounds to power grids alone (grid='power'), got {grid}")
    rows = checked_matrix("nupes", weight, gram)
    exponents = EXPONENTS if grid.exponent is None else (grid.exponent,)
    if grid.each == "group":
        return coded(rows, grid, _by_group(rows, gram, grid, exponents, clip), {})
    best, least = None, torch.inf
    for exponent in exponents:
        shared = {"exponent": rows.new_tensor(exponent, dtype=torch.float32)}
        found = coded(rows, grid, fitted(rows, grid, gram, clip=clip, shared=shared), shared)
        away = found.values()
        error = (away - rows).square().sum() if gram is None else output_error(rows, away, gram.to(rows.dtype))
        if best is None or float(error) < least:
            best, least = found, float(error)
    assert best is not None
    return best


def _by_group(
    rows: Tensor, gram: Tensor | None, grid: Power, exponents: tuple[float, ...], clip: int
) -> dict[str, Tensor]:
    """The parameters of least error of every group."""
    best: dict[str, Tensor] = {}
    least = rows.new_zeros(0)
    for exponent in exponents:
        fixed = replace(grid, exponent=exponent)
        params = fitted(rows, fixed, gram, clip=clip)
        away, start, errors = coded(rows, fixed, params).values() - rows, 0, []
        for runs in runs_of(away, grid.group):
            stop = start + runs.shape[1] * runs.shape[2]
            errors.append(run_errors(runs, None if gram is None else gram_runs(gram, start, stop, runs.shape[2])))
            start = stop
        error = torch.cat(errors, 1)
        better = torch.ones_like(error, dtype=torch.bool) if not best else error < least
        least = torch.where(better, error, least) if best else error
        best = {name: torch.where(better, value, best.get(name, value)) for name, value in params.items()}
    return best
