"""Positive definite matrices, such as Gram matrices that rest on too little data: made regular, and factored.

A Gram matrix of fewer rows than columns is singular, and one of a few thousand rows knows the products of inputs only
roughly. Two small changes mend both: what stands off its diagonal is drawn towards zero, and the diagonal is lifted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.errors import Error

PANEL = 128
"""Columns of a factor that are found together."""

MOST = 1e-2
"""As a share of the mean of a diagonal: more is not rounding."""


def exact(matrix: Tensor) -> Tensor:
    """A copy in float64, or in float32 where a device has nothing wider."""
    return matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64, copy=True)


def steadied(gram: Tensor, *, damp: float = 0.0, shrink: float = 0.0) -> Tensor:
    r"""A Gram matrix that can be inverted.

    .. math:: H = (1 - s)\, G + s \operatorname{diag}(G) + d\, \bar g\, I

    with :math:`\bar g` the mean of what is above zero on the diagonal. Inputs that were always zero get
    :math:`\bar g` there, so that nothing of them reaches the others.

    Args:
        gram: ``[n, n]``, symmetric and positive semidefinite.
        damp: ``d``, 0 or more.
        shrink: ``s``, from 0 (as it is) to 1 (its diagonal alone).

    Returns:
        ``[n, n]``, a new tensor in float64 (float32 on devices that have no float64).

    Raises:
        Error: options out of their range, a matrix that is not square, or one with NaN, infinity or a diagonal below 0.

    >>> steadied(torch.tensor([[4.0, 2.0], [2.0, 4.0]]), shrink=0.5, damp=0.25)
    tensor([[5., 1.],
            [1., 5.]], dtype=torch.float64)
    """
    if not damp >= 0 or not 0 <= shrink <= 1:
        raise Error(f"damp must be 0 or more and shrink between 0 and 1, got {damp} and {shrink}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise Error(f"a Gram matrix is square, got {list(gram.shape)}")
    made = exact(gram)
    diagonal = made.diagonal().clone()
    if not _finite(made) or (diagonal < 0).any():
        raise Error("the Gram matrix has NaN, infinity or a diagonal below zero; were there NaN among the inputs?")
    alive = diagonal > 0
    mean = diagonal.sum() / alive.sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    made.mul_(1 - shrink)
    made.diagonal().copy_(torch.where(alive, diagonal + damp * mean, mean))
    return made


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a matrix, or of matrices ``[..., n, n]``.

    Where one is singular within rounding (also of what it was computed from), what is missing is added to its
    diagonal: the smallest power of ten times the rounding error of its mean, at most `MOST`; the same share for all.

    Raises:
        Error: it has negative eigenvalues, or NaN.

    >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
    tensor([[2., 0.],
            [1., 2.]])
    """
    factor, wrong = _factor(matrix)
    if not bool(wrong.any()):
        return factor
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None]
    lifted, added = matrix.clone(), 0.0
    step = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    while step < MOST:
        lifted.diagonal(dim1=-2, dim2=-1).add_((step - added) * mean)
        factor, wrong = _factor(lifted)
        if not bool(wrong.any()):
            return factor
        step, added = 10 * step, step
    raise Error("a matrix that should be positive semidefinite has negative eigenvalues or NaN; give it more damp=")


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor, and whether there is none.

    Torch clears what lies above the diagonal against the order of memory, which takes longer than the factor itself
    (1,536 columns: 66 ms; by panels 31 ms).
    """
    if matrix.dim() > 2 or not matrix.is_cpu or len(matrix) <= 4 * PANEL:
        return torch.linalg.cholesky_ex(matrix)
    size = len(matrix)
    factor = torch.zeros(size, size, dtype=matrix.dtype)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        done = factor[start:, :start]
        panel = torch.addmm(matrix[start:, start:stop], done, done[: stop - start].mT, alpha=-1)
        corner, wrong = torch.linalg.cholesky_ex(panel[: stop - start])
        if bool(wrong):
            return factor, wrong
        factor[start:stop, start:stop] = corner
        if stop < size:
            factor[stop:, start:stop] = torch.linalg.solve_triangular(corner, panel[stop - start :].mT, upper=False).mT
    return factor, torch.zeros((), dtype=torch.int32)


def inverse_factor(matrix: Tensor) -> Tensor:
    r"""The upper triangular ``U`` with ``matrix^-1 = U'U``.

    Row ``j`` of ``U`` says how the weights after column ``j`` make up best for an error made in that column, when
    those before it stand still.

    Args:
        matrix: ``[n, n]``, positive definite.

    Returns:
        ``[n, n]``, of its dtype. Beside the matrix two more are held.

    >>> matrix = torch.tensor([[4.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    >>> upper = inverse_factor(matrix)
    >>> torch.allclose(upper.T @ upper, matrix.inverse()), float(upper[1, 0])
    (True, 0.0)
    """
    # With J the reversal of order, J A J = L L' gives A = R R' with R = J L J upper triangular, so A^-1 = R^-T R^-1.
    upper = cholesky(matrix.flip(0, 1)).flip(0, 1)
    size = len(matrix)
    inverse = torch.zeros(size, size, dtype=matrix.dtype, device=matrix.device)
    for start in range(0, size, PANEL):  # nearly all of the work is products, and none of it is with zeros
        stop = min(start + PANEL, size)
        unit = torch.eye(stop - start, dtype=matrix.dtype, device=matrix.device)
        corner = torch.linalg.solve_triangular(upper[start:stop, start:stop], unit, upper=True)
        inverse[start:stop, start:stop] = corner
        if start:
            torch.mm(inverse[:start, :start], upper[:start, start:stop] @ -corner, out=inverse[:start, start:stop])
    return inverse


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a copy."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())
