"""What functions of this room share: a model that is left as it was, its parameters by name, and ranks in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.inspect._parts import mean_of
from weightsmith.stats.room import restored
from weightsmith.weights import Pattern, matches


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, buffers, ``requires_grad`` and the random state are what they were."""
    needing = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in needing if p.device.type == "cuda"})
    with restored(model), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for parameter, needed in needing:
                parameter.requires_grad_(needed)


def parameters_of(model: nn.Module, pattern: Pattern) -> dict[str, nn.Parameter]:
    """The float parameters whose names fit, tied ones once.

    Raises:
        Error: there is none.
    """
    floating = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    chosen = {name: value for name, value in floating.items() if matches(pattern, name)}
    if not chosen:
        raise Error(
            f"no float parameter fits {pattern!r}{did_you_mean(str(pattern), floating)}; there are {listed(floating)}"
        )
    return chosen


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
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]


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
