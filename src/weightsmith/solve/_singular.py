"""Singular values of a matrix, how many directions they speak of, and the largest one alone.

Squares in float64 resolve singular values to about 1e-8 of the largest: finer than float32 weights carry, and many
times faster than a decomposition of the matrix itself. The effective rank is the exponential of the entropy of the
normalised singular values (Roy and Vetterli 2007, 'The effective rank: a measure of effective dimensionality'); the
stable rank is the squared Frobenius norm over the squared spectral norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weightsmith.solve._lanczos import Krylov, krylov
from weightsmith.solve._seeds import generator_for
from weightsmith.weights import working

_BLOCK = 2**22  # elements turned into float64 at once


def singular_values(tensor: Tensor) -> Tensor | None:
    """All singular values of ``tensor`` ``[out, *in]``, descending, float64; None where a value is not finite."""
    matrix = tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    return roots_of(gram_of(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T))


def roots_of(gram: Tensor) -> Tensor | None:
    """Singular values of the matrix whose Gram matrix this is, descending; None where a value is not finite."""
    if not gram.isfinite().all():
        return None
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def effective_rank(values: Tensor) -> float:
    """The exponential of the entropy of singular values ``[r]``; 0 if all are zero."""
    total = float(values.sum())
    shares = values[values > 0] / (total or 1.0)
    return math.exp(-float((shares * shares.log()).sum())) if total else 0.0


def stable_rank(values: Tensor) -> float:
    """The sum of the squares of singular values ``[r]`` (descending) over the largest square; 0 if all are zero."""
    squares = values.square()
    largest = float(squares[0]) if len(squares) else 0.0
    return float(squares.sum()) / largest if largest else 0.0


def gram_of(matrix: Tensor) -> Tensor:
    """``matrix @ matrix.T`` in float64, for a matrix that is wider than tall."""
    rows = matrix.shape[0]
    total = torch.zeros(rows, rows, dtype=torch.float64, device=matrix.device)
    for block in matrix.split(max(_BLOCK // max(rows, 1), 1), dim=1):
        wide = working(block).double()
        total += wide @ wide.T
    return total


def largest_singular(
    matrix: Tensor, start: Tensor | None = None, *, steps: int = 100, tolerance: float = 1e-5, seed: int = 0
) -> tuple[float, Tensor]:
    r"""The largest singular value and its right vector, by products with the matrix alone.

    .. math:: \sigma_1 = \max_{\lVert v \rVert = 1} \lVert W v \rVert

    in the space of :math:`v, Av, A^2 v, \dots` with :math:`A = W^\top W`: where power iteration keeps the last of these
    vectors, Lanczos' method takes the best of their span, and needs about the square root of as many steps.

    Args:
        matrix: ``[out, in]``, float.
        start: ``[in]``, a guess of the vector; one of an earlier, similar matrix saves most of the steps. A hundredth
            of a random vector is added, so that a start at a right angle to the vector does not hide it.
        steps: products with A at most. As many vectors ``[in]`` are held.
        tolerance: how far :math:`A v` may be from :math:`\sigma^2 v`, against :math:`\sigma^2`.
        seed: of the random vector.

    Returns:
        The value, and ``[in]`` of length one in float32 or wider (zeros for a matrix of zeros), on the side of the
        start. NaN, and a vector of NaN, where a value of the matrix is not finite.

    >>> value, vector = largest_singular(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    >>> round(value, 4), vector.abs().round(decimals=4)
    (4.0, tensor([0., 1.]))
    """
    matrix = working(matrix)
    inputs = matrix.shape[1]
    ends = torch.stack(matrix.aminmax()) if matrix.numel() else matrix.new_zeros(2)
    scale = float(ends.abs().max())
    if not math.isfinite(scale):
        return math.nan, matrix.new_full((inputs,), math.nan)
    if scale == 0:
        return 0.0, matrix.new_zeros(inputs)
    if not _SMALL < scale < 1 / _SMALL:  # squares would leave the dtype
        value, vector = largest_singular(matrix / scale, start, steps=steps, tolerance=tolerance, seed=seed)
        return value * scale, vector
    first = _unit(torch.randn(inputs, generator=generator_for(seed, "singular")).to(matrix))
    if start is not None and start.isfinite().all() and start.any():
        first = _unit(start.to(matrix)) + first / 100

    def done(found: Krylov) -> bool:
        values, _, off = found.ritz()
        return float(off[-1]) <= tolerance * float(values[-1])

    found = krylov(lambda columns: matrix.T @ (matrix @ columns), first[:, None], steps, done)
    _, vectors, _ = found.ritz()
    vector = _unit(found.basis.T @ vectors[:, -1].to(found.basis))
    vector = vector if float(vector @ first) >= 0 else -vector
    return float(torch.linalg.vector_norm((matrix @ vector).double())), vector


_SMALL = 1e-12


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)
