"""What fine-tuning changed, without what matters least of it, and how the rest is added up.

The parts from which the methods on task vectors are put together. A task vector is what a model has
learned, ``models - base``, as a row ``[n]``; ``start`` is the place of its first element in the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith import native
from weightsmith.errors import Error
from weightsmith.merge._parts import shares, wide
from weightsmith.solve import NOTHING, Cut, cuts_at, shrink
from weightsmith.weights import Pass, in_memory, workspace

Numbers = float | Sequence[float]
"""One number a model, or one for all."""


Dialect = Literal["mergekit", "paper", "peft", "count"]
"""Whose way of trimming, voting and averaging; see `merge.ties`."""

Combine = Literal["mean", "sum", "max"]
"""What is made of the task vectors that agree."""


@dataclass(frozen=True)
class Trim:
    """What is left of each task vector."""

    cut: Callable[..., Tensor]
    """``(deltas [k, n], start) -> [k, n]``, in place: 0 where an element is dropped."""
    scale: Sequence[float] | None = None
    """Per model, what makes up for the dropped ones."""
    tie: float = 1.0
    """The sign of an element on which as much is for plus as for minus."""


Trimming = Generator[Pass, Any, Trim]


def known(dialect: str, *dialects: str) -> None:
    """An error for a dialect that a method does not have."""
    if dialect not in dialects:
        raise Error(f"dialect must be {', '.join(map(repr, dialects[:-1]))} or {dialects[-1]!r}, got {dialect!r}")


def fractions(option: str, value: Numbers, count: int) -> list[float]:
    """An option between 0 and 1, for each of ``count`` models."""
    given = [float(value)] * count if isinstance(value, int | float) else [float(one) for one in value]
    if len(given) != count:
        raise Error(f"{option} needs one number for each of the {count} models, got {len(given)}")
    if not all(0 <= one <= 1 for one in given):
        raise Error(f"{option} must lie between 0 and 1, got {value}")
    return given


def task_vectors(models: Tensor, base: Tensor) -> Tensor:
    """``[k, *shape]`` and ``[*shape]`` to ``[k, n]``, in float32 or wider; valid until the thread's next call."""
    models, base = wide(models, base)
    deltas = torch.sub(models, base, out=workspace(models.shape, models.dtype, models.device))
    return deltas.reshape(len(models), base.numel())


def trim_of(models: Tensor, base: Tensor, solved: Trim | None, trimming: Trimming) -> Trim:
    """How to trim: as it was found from all chunks of the tensor, or else from the tensor, which is whole then."""
    return in_memory(trimming, models, base) if solved is None else solved


def trimmed(models: Tensor, base: Tensor, trim: Trim, start: int) -> Tensor:
    """The trimmed task vectors ``[k, n]``."""
    deltas = trim.cut(task_vectors(models, base), start=start)
    for row, scale in zip(deltas, trim.scale or (), strict=bool(trim.scale)):
        row.mul_(scale)
    return deltas


# Which are kept


def keep_top(density: Numbers = 0.2, rescale: bool = False, dialect: Dialect = "mergekit") -> Trimming:
    """Of n elements of every task vector the ``max(1, floor(density n))`` largest."""

    def counts(models: int, total: int) -> list[int]:
        least = 0 if dialect == "peft" else min(total, 1)
        return [max(int(one * total), least) if one else 0 for one in fractions("density", density, models)]

    cuts = yield from cuts_at(_sizes, counts, positive=True)
    trim = yield from scaled(Trim(partial(_highest, cuts=cuts)), rescale)
    if dialect != "paper":
        return trim
    balance = yield Pass(partial(_balance, trim=trim))
    return replace(trim, tie=-1.0 if balance < 0 else 1.0)


def keep_band(density: Numbers = 0.5, gamma: Numbers = 0.01, rescale: bool = False) -> Trimming:
    """Of n elements ``floor(density n)``, after the ``floor(gamma n)`` largest (fewer where too few would be left)."""

    def counts(rows: int, total: int) -> list[int]:
        models = rows // 2
        wanted = [int(one * total) for one in fractions("density", density, models)]
        outliers = [int(one * total) for one in fractions("gamma", gamma, models)]
        outliers = [min(above, total - inside) for above, inside in zip(outliers, wanted, strict=True)]
        return [*(above + inside for above, inside in zip(outliers, wanted, strict=True)), *outliers]

    cuts = yield from cuts_at(_sizes_twice, counts, positive=True)
    half = len(cuts) // 2
    return (yield from scaled(Trim(partial(_highest, cuts=cuts[:half], but=cuts[half:])), rescale))


def scaled(trim: Trim, rescale: bool) -> Trimming:
    """With ``rescale``, every task vector gets the sum of magnitudes back that it had before it was trimmed."""
    if not rescale:
        return trim
    before, after = yield Pass(partial(_masses, trim=trim))
    scale = [float(whole / rest) if rest else 1.0 for whole, rest in zip(before, after, strict=True)]
    return replace(trim, scale=scale)


def _sizes(models: Tensor, base: Tensor) -> Tensor:
    return task_vectors(models, base).abs_()


def _sizes_twice(models: Tensor, base: Tensor) -> Tensor:
    return _sizes(models, base).repeat(2, 1)


def _highest(deltas: Tensor, *, cuts: Sequence[Cut], but: Sequence[Cut] = (), start: int) -> Tensor:
    for row, cut in zip(deltas, cuts, strict=True):
        shrink(row, cut, start)
    for row, cut in zip(deltas, but, strict=bool(but)):
        if cut != NOTHING:
            largest = shrink(row.clone(), cut, start)
            row.masked_fill_(largest != 0, 0)  # not a difference: what is infinite goes as well
    return deltas


def _masses(models: Tensor, base: Tensor, *, trim: Trim, start: int) -> Tensor:
    """The sums of magnitudes of the task vectors, whole and trimmed: ``[2, k]``."""
    deltas = task_vectors(models, base)
    before = [_mass(row) for row in deltas]
    after = [_mass(row) for row in trim.cut(deltas, start=start)]
    return torch.stack([torch.stack(before), torch.stack(after)])


_BLOCK = 512
"""Magnitudes that are added up in their own precision before they join the float64 sum."""


def _mass(row: Tensor) -> Tensor:
    """The sum of magnitudes in float64."""
    size = torch.abs(row, out=workspace(row.shape, row.dtype, row.device, "size"))
    whole = len(size) - len(size) % _BLOCK
    return size[:whole].view(-1, _BLOCK).sum(dim=1).double().sum() + size[whole:].double().sum()


def _balance(models: Tensor, base: Tensor, *, trim: Trim, start: int) -> Tensor:
    """Elements for plus less elements for minus."""
    return _sum(trimmed(models, base, trim, start)).sign_().sum(dtype=torch.float64)


# How they are added up. What is handed to these functions is used up.


def linear(deltas: Tensor, weight: Numbers, normalize: bool) -> Tensor:
    """``sum_i a_i d_i``, over ``sum_i a_i`` with ``normalize``: ``[k, n]`` to ``[n]``."""
    return _sum(_weighted(deltas, shares(weight, len(deltas), normalize)))


def elected(
    deltas: Tensor,
    weight: Numbers,
    normalize: bool,
    dialect: Dialect = "mergekit",
    combine: Combine | None = None,
    tie: float = 1.0,
) -> Tensor:
    """What the task vectors say together that have the sign of the majority; ``[k, n]`` to ``[n]``.

    The sign of :math:`\\sum_i a_i d_i` (mergekit), of :math:`\\sum_i d_i` (paper, peft) or of the number of
    signs (count), ``tie`` where that is zero. Their sum, over the weights (mergekit, count) or the number (paper, peft)
    of those that have it (1 where that is zero), or the largest of them.

    Arithmetic in place of masks, which cost five to ten times as much: with the sign ``s``, what agrees is
    ``relu(d s) s``, and whether it does ``sign(relu(d s))``.
    """
    how = combine or ("mean" if normalize else "sum")
    if how not in ("mean", "sum", "max"):
        raise Error(f"combine must be 'mean', 'sum' or 'max', got {combine!r}")
    weights = shares(weight, len(deltas), False)
    by_number = dialect in ("paper", "peft")
    if how != "max":
        vote = "plain" if by_number else "weighted" if dialect == "mergekit" else "count"
        made = native.elected(deltas, weights, vote, how == "mean", tie)
        if made is not None:
            return made
    if by_number:
        sign = _sum(deltas)
    else:
        _weighted(deltas, weights)
        sign = _sum(deltas) if dialect == "mergekit" else _sum(deltas.sign())
    sign = sign.sign_().add_(0.5 * tie).sign_()
    agreeing = [row.mul_(sign).relu_() for row in deltas]
    number = workspace(sign.shape, sign.dtype, sign.device, "number").zero_()
    if how == "mean":
        has = workspace(sign.shape, sign.dtype, sign.device, "has")
        for row, one in zip(agreeing, weights, strict=True):
            number.add_(torch.sign(row, out=has), alpha=1.0 if by_number else one)
    if by_number:
        _weighted(deltas, weights)
    if how == "max":
        return deltas.amax(dim=0).mul_(sign)
    total = _sum(deltas).mul_(sign)
    if how != "mean":
        return total
    if by_number or min(weights) >= 0:  # the total is zero where nobody agrees, and so is its quotient
        return total.div_(number.clamp_min_(torch.finfo(number.dtype).tiny))
    return total.div_(number.masked_fill_(number == 0, 1))


def moved(models: Tensor, base: Tensor, change: Tensor, amount: float) -> Tensor:
    """``base + amount * change``, in the dtype of the models."""
    if not math.isfinite(amount):
        raise Error(f"amount must be a finite number, got {amount}")
    start, _ = wide(base, models)
    change = change.reshape(base.shape)
    if amount != 1:
        change.mul_(amount)
    return change.add_(start).to(models.dtype)


def _weighted(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Every row times its weight, in place."""
    for row, weight in zip(rows, weights, strict=True):
        if weight != 1:
            row.mul_(weight)
    return rows


def _sum(rows: Tensor) -> Tensor:
    """``[k, n]`` to ``[n]``, row after row: the rounding of an element does not depend on its neighbours."""
    total = rows[0] + rows[1] if len(rows) > 1 else rows[0].clone()
    for row in rows[2:]:
        total += row
    return total
