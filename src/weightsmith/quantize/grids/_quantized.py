"""Any tensor at the points of a grid: activations and gradients as hardware of few bits sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.grids._grid import Grid
from weightsmith.weights import dtype_name


def quantized(x: Tensor, grid: str | Grid, *, axis: int = -1, **settings: Any) -> Tensor:
    """The nearest points of a grid, with parameters fitted to what is there.

    Args:
        x: any floating-point tensor; computed in float32 or wider.
        grid: a grid, or its word with ``settings``.
        axis: along which inputs share parameters: that over which a product sums. A last group may be shorter; what
            a "whole tensor" is, is ``x``.

    Returns:
        Of the shape and dtype of ``x``; no gradient passes.

    Raises:
        Error: values that are not finite, or no floats; a grid that one rounding alone fits.

    >>> quantized(torch.tensor([6.0, 1.2, -0.3]), "mxfp4")
    tensor([ 6.0000,  1.0000, -0.5000])
    """
    from weightsmith.quantize.grids import named

    points = named(grid, **settings)
    if not x.is_floating_point():
        raise Error(f"a tensor of floats is rounded to a grid, got {dtype_name(x.dtype)}")
    with torch.no_grad():
        moved = (x.unsqueeze(0) if x.dim() == 0 else x).detach().movedim(axis, -1)
        wide = moved if moved.dtype == torch.float64 else moved.float()
        shared = points.shared(wide)
        length = wide.shape[-1]
        size = points.group or max(length, 1)
        whole = length - length % size
        pieces = []
        for run in (wide[..., :whole].unflatten(-1, (whole // size, size)), wide[..., whole:].unsqueeze(-2)):
            if run.numel():
                params = {**shared, **points.fit(run, shared)}
                pieces.append(points.decode(points.encode(run, params), params).flatten(-2))
        made = torch.cat(pieces, -1) if pieces else wide
        return made.movedim(-1, axis).reshape(x.shape).to(x.dtype)
