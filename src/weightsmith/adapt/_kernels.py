"""What an adapter does to a run of rows of a weight. Pure functions on tensors, in the dtype of the weight.

``lead`` is the factor whose rows belong to those of the weight, ``rest`` the other one, so that the
change is ``scale * lead @ rest`` whichever way round the weight is stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def added_product(weight: Tensor, lead: Tensor, rest: Tensor, *, scale: float) -> Tensor:
    """``weight [rows, ...] + scale * lead [rows, rank] @ rest [rank, ...]``; a convolution's axes are one."""
    flat = torch.addmm(weight.flatten(1), lead.to(weight).flatten(1), rest.to(weight).flatten(1), alpha=scale)
    return flat.reshape(weight.shape)


def row_magnitudes(
    weight: Tensor, lead: Tensor, rest: Tensor, magnitude: Tensor, *, scale: float, amount: float, start: int = 0
) -> Tensor:
    """DoRA on ``[out, ...]``: every row of the sum gets its own length, ``amount`` of the way from ``weight``."""
    merged = added_product(weight, lead, rest, scale=scale)
    first = start // max(math.prod(weight.shape[1:]), 1)
    wanted = magnitude.to(weight).flatten()[first : first + len(weight)]
    factor = _ratio(wanted, merged.flatten(1).norm(dim=1))
    return weight.lerp(merged * factor.reshape(-1, *[1] * (weight.ndim - 1)), amount)


def column_squares(weight: Tensor, lead: Tensor, rest: Tensor, magnitude: Tensor, *, scale: float) -> Tensor:
    """Sums of squares of the columns of the sum: what `column_magnitudes` must know of all rows."""
    return added_product(weight, lead, rest, scale=scale).square().sum(dim=0)


def column_magnitudes(
    weight: Tensor,
    lead: Tensor,
    rest: Tensor,
    magnitude: Tensor,
    *,
    scale: float,
    amount: float,
    solved: Tensor,
) -> Tensor:
    """DoRA on ``[in, out]``, where the rows of the layer are columns; ``solved`` are their lengths ``[out]``."""
    merged = added_product(weight, lead, rest, scale=scale)
    return weight.lerp(merged * _ratio(magnitude.to(weight).flatten(), solved.to(weight)), amount)


def _ratio(wanted: Tensor, found: Tensor) -> Tensor:
    """``wanted / found``; a row of zeros has no direction and stays what it is."""
    return torch.where(found > 0, wanted / found, torch.zeros_like(found))


def added_products(
    weight: Tensor, a: Tensor, b: Tensor, *, experts: int, scale: float, transposed: bool, start: int = 0
) -> Tensor:
    """A product for each matrix of a stack ``[experts, ...]``, of which ``weight`` is a run.

    Args:
        weight: ``[run, out, in]``, or ``[run, in, out]`` where ``transposed``.
        a: ``[experts * rank, in]``, expert by expert.
        b: ``[out, rank * experts]``, the experts side by side in each rank.
    """
    first = start // max(math.prod(weight.shape[1:]), 1)
    mine = slice(first, first + len(weight))
    right = a.to(weight).reshape(experts, -1, a.shape[-1])[mine]
    left = b.to(weight).reshape(len(b), -1, experts)[..., mine].permute(2, 0, 1)
    if transposed:
        left, right = right.mT, left.mT
    return torch.baddbmm(weight, left, right, alpha=scale)


def added_vector(bias: Tensor, vector: Tensor, *, scale: float) -> Tensor:
    """``bias + scale * vector``."""
    return bias.add(vector.to(bias), alpha=scale)


def blended(weight: Tensor, new: Tensor, *, amount: float) -> Tensor:
    """``amount`` of the way from ``weight`` to ``new``."""
    return weight.lerp(new.to(weight), amount)


def some_rows(weight: Tensor, rows: Tensor, *, indices: list[int], amount: float, start: int = 0) -> Tensor:
    """The rows ``indices`` of a whole of which ``weight`` is a run, ``amount`` of the way to ``rows``."""
    first = start // max(math.prod(weight.shape[1:]), 1)
    mine = [(index - first, row) for row, index in enumerate(indices) if first <= index < first + len(weight)]
    result = weight.clone()
    for place, row in mine:
        result[place] = weight[place].lerp(rows[row].to(weight), amount)
    return result
