"""What functions of this room share: cosines, ranks, and checks of options."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weightsmith.errors import Error
from weightsmith.inspect._parts import mean_of, ranked


def cosine(first: Tensor, second: Tensor) -> float:
    """Of two tensors as vectors, in float64; NaN where one of them is zero."""
    a, b = first.double().flatten(), second.double().flatten()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else float("nan")


def ranks(values: Tensor) -> Tensor:
    """Places in ascending order ``[n]``, equal values sharing the mean of theirs.

    >>> ranks(torch.tensor([5.0, 1.0, 5.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    return ranked(values) - 1


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of ranks; NaN where one does not vary or holds a NaN."""
    if first.isnan().any() or second.isnan().any():
        return float("nan")
    a, b = (one - one.mean() for one in (ranks(first), ranks(second)))
    return cosine(a, b)


def at_least(least: int, **options: int) -> None:
    """An error for options that are too small."""
    for name, value in options.items():
        if value < least:
            raise Error(f"{name} is at least {least}, got {value}")


def middle(values: Sequence[float]) -> float:
    """The mean of finite values; NaN where there are none."""
    found = mean_of(values)
    return float("nan") if found is None else found
