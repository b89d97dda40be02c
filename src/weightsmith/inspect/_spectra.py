"""How many directions a matrix really uses: singular values and two kinds of rank, for one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weightsmith.solve import effective_rank, singular_values, stable_rank
from weightsmith.weights import Spec

KEPT = 5
"""Singular values that a `Spectrum` lists."""


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
