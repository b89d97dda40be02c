"""What fine-tuning changed, without what matters least of it, and how the rest is added up.

The parts from which the methods on task vectors are put together. A task vector is what a model has
learned, ``models - base``, as a row ``[n]``; ``start`` is the place of its first element in the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.merge._parts import shares, wide
from weightsmith.solve import Cut, cuts_at, kept
from weightsmith.weights import Pass, in_memory

Numbers = float | Sequence[float]
"""One number a model, or one for all."""


@dataclass(frozen=True)
class Trim:
    """What is left of each task vector."""

    factors: Callable[..., Tensor]
    """``(deltas [k, n], start) -> [k, n]``: 0 where an element is dropped."""
    scale: Sequence[float] | None = None
    """Per model, what makes up for the dropped ones."""


Trimming = Generator[Pass, Any, Trim]


def fractions(option: str, value: Numbers, count: int) -> list[float]:
    """An option between 0 and 1, for each of ``count`` models."""
    given = [float(value)] * count if isinstance(value, int | float) else [float(one) for one in value]
    if len(given) != count:
        raise Error(f"{option} needs one number for each of the {count} models, got {len(given)}")
    if not all(0 <= one <= 1 for one in given):
        raise Error(f"{option} must lie between 0 and 1, got {value}")
    return given


def task_vectors(models: Tensor, base: Tensor) -> Tensor:
    """``[k, *shape]`` and ``[*shape]`` to ``[k, n]``, in float32 or wider."""
    models, base = wide(models, base)
    return (models - base).reshape(len(models), base.numel())


def trimmed(models: Tensor, base: Tensor, solved: Trim | None, trimming: Trimming, start: int) -> Tensor:
    """The trimmed task vectors; where it is not solved yet how to trim, from the whole tensor."""
    trim = in_memory(trimming, models, base) if solved is None else solved
    deltas = task_vectors(models, base)
    deltas *= trim.factors(deltas, start=start)
    return deltas if trim.scale is None else deltas.mul_(deltas.new_tensor(trim.scale)[:, None])


# Which are kept


def keep_top(density: Numbers = 0.2, rescale: bool = False) -> Trimming:
    """Of n elements of every task vector the ``max(1, floor(density n))`` largest."""

    def counts(models: int, total: int) -> list[int]:
        least = min(total, 1)
        return [max(int(one * total), least) if one else 0 for one in fractions("density", density, models)]

    cuts = yield from cuts_at(_sizes, counts)
    return (yield from scaled(Trim(partial(_band, highest=cuts)), rescale))


def keep_band(density: Numbers = 0.5, gamma: Numbers = 0.01, rescale: bool = False) -> Trimming:
    """Of n elements ``floor(density n)``, after the ``floor(gamma n)`` largest (fewer where too few would be left)."""

    def counts(rows: int, total: int) -> list[int]:
        models = rows // 2
        wanted = [int(one * total) for one in fractions("density", density, models)]
        outliers = [int(one * total) for one in fractions("gamma", gamma, models)]
        outliers = [min(above, total - inside) for above, inside in zip(outliers, wanted, strict=True)]
        return [*(above + inside for above, inside in zip(outliers, wanted, strict=True)), *outliers]

    cuts = yield from cuts_at(_sizes_twice, counts)
    half = len(cuts) // 2
    return (yield from scaled(Trim(partial(_band, highest=cuts[:half], but=cuts[half:])), rescale))


def scaled(trim: Trim, rescale: bool) -> Trimming:
    """With ``rescale``, every task vector gets the sum of magnitudes back that it had before it was trimmed."""
    if not rescale:
        return trim
    before, after = yield Pass(partial(_masses, trim=trim))
    return Trim(trim.factors, [whole / rest if rest else 1.0 for whole, rest in zip(before, after, strict=True)])


def _sizes(models: Tensor, base: Tensor) -> Tensor:
    return task_vectors(models, base).abs_()


def _sizes_twice(models: Tensor, base: Tensor) -> Tensor:
    return _sizes(models, base).repeat(2, 1)


def _band(deltas: Tensor, *, highest: Sequence[Cut], but: Sequence[Cut] = (), start: int) -> Tensor:
    size = deltas.abs()
    mask = torch.stack([kept(row, cut, start) for row, cut in zip(size, highest, strict=True)])
    if but:
        mask &= ~torch.stack([kept(row, cut, start) for row, cut in zip(size, but, strict=True)])
    return mask


def _masses(models: Tensor, base: Tensor, *, trim: Trim, start: int) -> Tensor:
    """The sums of magnitudes of the task vectors, whole and trimmed: ``[2, k]``."""
    deltas = task_vectors(models, base)
    both = torch.stack([deltas, deltas * trim.factors(deltas, start=start)])
    return both.abs().sum(dim=-1, dtype=torch.float64)


# How they are added up


def linear(deltas: Tensor, weight: Numbers, normalize: bool) -> Tensor:
    """``sum_i a_i d_i``, over ``sum_i a_i`` with ``normalize``: ``[k, n]`` to ``[n]``."""
    return _sum(deltas * deltas.new_tensor(shares(weight, len(deltas), normalize))[:, None])


def elected(deltas: Tensor, weight: Numbers, normalize: bool) -> Tensor:
    """``sum_i a_i d_i`` over those that have the sign of all ``sum_i a_i d_i`` (of zero: plus); ``[k, n]`` to ``[n]``.

    With ``normalize`` over the sum of the weights :math:`a_i` of those (1 where it is zero).
    """
    weights = deltas.new_tensor(shares(weight, len(deltas), False))[:, None]
    deltas = deltas * weights
    sign = torch.where(_sum(deltas) >= 0, 1, -1)
    agree = deltas.sign() == sign
    total = _sum(deltas * agree)
    if not normalize:
        return total
    divisor = _sum(weights * agree)
    return total / torch.where(divisor == 0, 1, divisor)


def moved(models: Tensor, base: Tensor, change: Tensor, amount: float) -> Tensor:
    """``base + amount * change``, in the dtype of the models."""
    if not math.isfinite(amount):
        raise Error(f"amount must be a finite number, got {amount}")
    start, _ = wide(base, models)
    return (start + amount * change.reshape(base.shape)).to(models.dtype)


def _sum(rows: Tensor) -> Tensor:
    """``[k, n]`` to ``[n]``, row after row: the rounding of an element does not depend on its neighbours."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
