"""The plain figures of a tensor's values, gathered in one streamed reading.

Means and deviations are merged by the update of Chan, Golub and LeVeque (1979), which does not
cancel: a tensor of values near 1000 gets the standard deviation it has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith import progress
from weightsmith.weights import Inputs, Lazy, Pass, Reduction, single, solve_all

Unit = Literal["element", "row", "tensor"]


@dataclass(frozen=True)
class Statistics:
    """Figures of one tensor. All but the counts are of the finite values; None where there are none.

    Complex values count by their magnitude.
    """

    norm: float
    """Square root of the sum of squares."""
    mean: float | None
    std: float | None
    """Square root of the mean squared deviation (divided by the count, not by one less)."""
    min: float | None
    max: float | None
    zeros: float
    """Share of the values that are zero, between 0 and 1."""
    nan: int
    inf: int

    @property
    def nonfinite(self) -> int:
        return self.nan + self.inf


@dataclass(frozen=True)
class Moments:
    """Figures that can be added up from part to part."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""
    low: float = math.inf
    high: float = -math.inf
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        share = other.count / count if count else 0.0
        return Moments(
            count,
            self.mean + apart * share,
            self.squares + other.squares + apart * apart * self.count * share,
            min(self.low, other.low),
            max(self.high, other.high),
            self.zeros + other.zeros,
            self.nan + other.nan,
            self.inf + other.inf,
        )

    def statistics(self) -> Statistics:
        some = self.count > 0
        values = self.count + self.nan + self.inf
        return Statistics(
            norm=math.sqrt(self.squares + self.count * self.mean * self.mean),
            mean=self.mean if some else None,
            std=math.sqrt(self.squares / self.count) if some else None,
            min=self.low if some else None,
            max=self.high if some else None,
            zeros=self.zeros / values if values else 0.0,
            nan=self.nan,
            inf=self.inf,
        )


def moments_of(values: Tensor) -> Moments:
    """The moments of one chunk, in float64."""
    values = (values.to(torch.complex128).abs() if values.is_complex() else values.double()).reshape(-1)
    if not values.numel():
        return Moments()
    nan = inf = 0
    total = float(values.sum())
    if not math.isfinite(total):
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        values = values[values.isfinite()]
        if not values.numel():
            return Moments(nan=nan, inf=inf)
        total = float(values.sum())
    mean = total / values.numel()
    low, high = values.aminmax()
    apart = values - mean
    zeros = values.numel() - int(values.count_nonzero())
    return Moments(values.numel(), mean, float(apart.dot(apart)), float(low), float(high), zeros, nan, inf)


@functools.cache
def is_countable(dtype: torch.dtype) -> bool:
    """Whether values of this dtype can be turned into numbers (packed ones cannot)."""
    if dtype.is_complex:
        return True
    try:
        torch.empty(1, dtype=dtype).double()
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


AT_ONCE = 8
"""Units whose sums are held until they are added up, where sums are large."""


def _found(total: Any) -> Any:
    return total


def _in_runs(function: Callable[..., Any], solve: Callable[[Any], Any]) -> Generator[Pass, Any, Any]:
    """As `single`, but sums are added up every `AT_ONCE` units: those of all units together may not fit."""
    total: tuple[Any, ...] | None = None
    start, count = 0, 1

    def units(of: int) -> Sequence[int]:
        nonlocal count
        count = of
        return range(start, min(start + AT_ONCE, of))

    while start < count:
        found = yield Pass(function, units=units)
        total = found if total is None else tuple(a + b for a, b in zip(total, found, strict=True))
        start += AT_ONCE
    return solve(total)


def streamed(
    function: Callable[..., Any],
    groups: Sequence[Sequence[Lazy]],
    label: str,
    threads: int | None = None,
    unit: Unit = "element",
    solve: Callable[[Any], Any] = _found,
    large: bool = False,
) -> list[Any]:
    """``solve(function(*chunks))``, added up over each group of nodes of one shape; None for empty tensors.

    The groups share the threads. No tensor is ever held whole, unless ``unit`` is ``"tensor"``: then a thread
    holds one group.

    Args:
        large: the function gives tuples of large tensors, of which no more than `AT_ONCE` are held for a group.
    """
    if not groups:
        return []
    total = sum(node.spec.nbytes for group in groups for node in group)
    with progress.task(label, total, "bytes") as advance:

        def solver(group: Sequence[Lazy]) -> Any:
            sizes = [node.spec.dtype.itemsize for node in group]  # chunks may come wider than they are stored

            def counted(*chunks: Tensor) -> Any:
                result = function(*chunks)
                advance(sum(chunk.numel() * size for chunk, size in zip(chunks, sizes, strict=True)))
                return result

            return (_in_runs if large else single)(counted, solve)

        reductions = [Reduction([Inputs(group, unit)], functools.partial(solver, group)) for group in groups]
        solve_all(reductions, threads)
    return [reduction.value() for reduction in reductions]


def statistics_of(nodes: Sequence[Lazy], threads: int | None = None) -> list[Statistics | None]:
    """The figures of each node; None for dtypes whose values are no numbers by themselves."""
    countable = {id(node): node for node in nodes if is_countable(node.spec.dtype)}
    found = streamed(moments_of, [(node,) for node in countable.values()], "reading", threads)
    by_node = {key: (moments or Moments()).statistics() for key, moments in zip(countable, found, strict=True)}
    return [by_node.get(id(node)) for node in nodes]
