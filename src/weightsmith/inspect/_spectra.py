"""How many directions a matrix really uses: singular values and two kinds of rank.

The effective rank is the exponential of the entropy of the normalised singular values (Roy and
Vetterli 2007, 'The effective rank: a measure of effective dimensionality'). The stable rank is
the squared Frobenius norm over the squared spectral norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.weights import Spec, working

KEPT = 5
"""Singular values that a `Spectrum` lists."""

_BLOCK = 2**22  # elements turned into float64 at once


@dataclass(frozen=True)
class Spectrum:
    """Of one matrix; tensors of more axes are viewed as ``[first, all others]``."""

    values: tuple[float, ...]
    """The largest singular values, descending."""
    effective_rank: float
    stable_rank: float
    full_rank: int
    """Number of singular values."""


def has_spectrum(spec: Spec) -> bool:
    """Whether this is a float matrix, or can be seen as one."""
    return len(spec.shape) >= 2 and spec.dtype.is_floating_point and spec.numel > 0


def spectrum(tensor: Tensor, keep: int = KEPT) -> Spectrum | None:
    """Singular values and ranks of ``tensor`` ``[out, *in]``; None where a value is not finite.

    >>> found = spectrum(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
    >>> found.values, round(found.stable_rank, 4)
    ((4.0, 3.0, 0.0), 1.5625)
    """
    values = singular_values(tensor)
    if values is None:
        return None
    return Spectrum(
        values=tuple(values[:keep].tolist()),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        full_rank=len(values),
    )


def singular_values(tensor: Tensor) -> Tensor | None:
    """All singular values of ``tensor`` ``[out, *in]``, descending, float64; None where a value is not finite."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    return roots_of(gram_of(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T))


def roots_of(gram: Tensor) -> Tensor | None:
    """Singular values of the matrix whose Gram matrix this is, descending; None where a value is not finite."""
    # Squares in float64 resolve singular values to about 1e-8 of the largest: finer than float32
    # weights carry, and many times faster than a decomposition of the matrix itself.
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
    largest = float(squares[0])
    return float(squares.sum()) / largest if largest else 0.0


def gram_of(matrix: Tensor) -> Tensor:
    """``matrix @ matrix.T`` in float64, for a matrix that is wider than tall."""
    rows = matrix.shape[0]
    total = torch.zeros(rows, rows, dtype=torch.float64, device=matrix.device)
    for block in matrix.split(max(_BLOCK // max(rows, 1), 1), dim=1):
        wide = working(block).double()
        total += wide @ wide.T
    return total
