"""Many least squares problems over one matrix, each with unknowns of its own: one row of a pruned layer each.

Every row of a weight matrix is fitted by itself to what it gave before, with those of its weights that a mask keeps.
All rows share one positive definite matrix, and differ in which of its rows and columns they see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.solve._definite import cholesky

BYTES = 2**27
"""Of the small matrices that are factored together."""


def masked_least_squares(weight: Tensor, matrix: Tensor, mask: Tensor) -> Tensor:
    r"""The nearest weights with a given mask, exactly.

    .. math:: \min_X \operatorname{tr}\left((X - W) H (X - W)^\top\right) \text{ with } X_{\lnot S} = 0:
        \qquad x_S = (w H)_S \, H_{SS}^{-1}

    Args:
        weight: ``W [rows, n]``.
        matrix: ``H [n, n]``, positive definite; its dtype is computed in.
        mask: ``[rows, n]``, true where a row has an unknown.

    Returns:
        ``[rows, n]`` in the dtype of ``matrix``, zero where the mask is false. Time grows with rows times the cube of
        the unknowns of a row; twice `BYTES` are held for small matrices and their factors, or what one row takes.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> masked_least_squares(torch.tensor([[1.0, 1.0]]), matrix, torch.tensor([[True, False]]))
    tensor([[1.5000, 0.0000]])
    """
    wanted = weight.to(matrix.dtype) @ matrix
    found = torch.zeros_like(wanted)
    usual = matrix.diagonal().mean()  # of what is padded, so that it does not count where a matrix is lifted
    counts = mask.sum(dim=1)
    order = counts.argsort(stable=True)  # rows of like counts together, so that little is padded
    sizes = counts[order].tolist()
    stop = len(sizes)
    while stop and (most := sizes[stop - 1]):
        start = max(stop - max(BYTES // (most * most * matrix.element_size()), 1), 0)
        rows = order[start:stop]
        # The unknowns of each row first; what is padded is known to be zero.
        places = mask[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real = mask[rows].gather(1, places)
        small = matrix[places[:, :, None], places[:, None, :]]
        small *= real[:, :, None] & real[:, None, :]
        small.diagonal(dim1=1, dim2=2).add_((~real) * usual)
        right = wanted[rows].gather(1, places) * real
        solved = torch.cholesky_solve(right[:, :, None], cholesky(small))[:, :, 0]
        found[rows] = found[rows].scatter(1, places, solved * real)
        stop = start
    return found


def masked_conjugate_gradients(
    weight: Tensor, matrix: Tensor, mask: Tensor, *, steps: int = 100, tolerance: float = 1e-4
) -> Tensor:
    r"""What `masked_least_squares` finds, nearly: a step is one product with the matrix, for all rows at once.

    Conjugate gradients on the unknowns of each row, with the diagonal as preconditioner, from the weights that the
    mask keeps. A row rests when the slope that is left has fallen to a share of what it was, or when it would go on
    in a direction that the matrix, within rounding, says nothing of.

    Args:
        weight: ``W [rows, n]``.
        matrix: ``H [n, n]``, positive definite; its dtype is computed in.
        mask: ``[rows, n]``.
        steps: at most.
        tolerance: the share.

    Returns:
        ``[rows, n]`` in the dtype of ``matrix``, zero where the mask is false. Five times the weight is held.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> masked_conjugate_gradients(torch.tensor([[1.0, 1.0]]), matrix, torch.tensor([[True, False]]))
    tensor([[1.5000, 0.0000]])
    """
    weight, diagonal = weight.to(matrix.dtype), matrix.diagonal()
    gone = ~mask
    found = weight.masked_fill(gone, 0)
    left = ((weight - found) @ matrix).masked_fill_(gone, 0)  # minus half the slope
    scale = torch.where(mask, diagonal.reciprocal(), 0)
    lead = left * scale
    energy = torch.linalg.vecdot(left, lead)
    enough, least = energy * tolerance**2, torch.finfo(matrix.dtype).tiny
    across, length = torch.empty_like(left), energy  # the square of each direction, with the diagonal
    blind = torch.finfo(matrix.dtype).eps * max(len(matrix), 1) ** 0.5
    working = energy > enough
    for _ in range(steps):
        if not bool(working.any()):
            break
        torch.mm(lead, matrix, out=across).masked_fill_(gone, 0)
        bend = torch.linalg.vecdot(lead, across)
        working &= bend > blind * length
        step = (energy / bend).where(working, 0)[:, None]
        found.addcmul_(lead, step)
        left.addcmul_(across, step, value=-1)
        slope = torch.mul(left, scale, out=across)
        now = torch.linalg.vecdot(left, slope)
        turn = now / energy.clamp(min=least)
        lead.mul_(turn[:, None]).add_(slope)
        energy, length = now, now + turn.square() * length
        working &= energy > enough
    return found
