"""One budget shared among many items, each with a few levels to choose from: the multiple-choice knapsack.

Which layer gets which sparsity, bit width or rank is one problem: every level of a layer does some harm and has some
size, and the sizes together must fit. Solved exactly by dynamic programming on a grid of sizes, or along the lower
convex hulls, where each step buys the largest saving in harm for its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightsmith.errors import Error

CELLS = 100_000
"""Of the grid of sizes, at most, where they have no common divisor or the budget is many times as large."""

_ROUNDING = 1e-9  # of a budget: sums of sizes that are equal but for rounding are equal


class Choice(NamedTuple):
    """One level for each item."""

    levels: list[int]
    """Indices into each item's own levels."""
    cost: float
    size: float
    bound: float
    """No choice within the budget costs less than this; the closer to ``cost``, the less is left to be gained."""


def knapsack(
    costs: Sequence[Any], sizes: Sequence[Any], budget: float, *, at_least: bool = False, cells: int = CELLS
) -> Choice:
    r"""The choice that costs least within a budget, by dynamic programming.

    .. math:: f_i(b) = \min_l \; f_{i-1}(b - s_{il}) + c_{il}, \qquad
        \min \Bigl\{ \sum_i c_{i l_i} : \sum_i s_{i l_i} \le B \Bigr\} = f_n(B)

    Exact where all sizes, counted from the smallest of each item, are multiples of one number that goes into the budget
    at most ``cells`` times. Else the grid has ``cells`` steps and sizes are rounded up to it (with ``at_least`` down),
    so that the budget is met all the same and at most a share ``items / cells`` of it is wasted; where `lagrangian`
    then finds a cheaper choice, that is taken.

    Args:
        costs: of each item, ``[levels]``, measured harm; infinite for what is not allowed. Levels may differ in number.
        sizes: of each item, ``[levels]``.
        budget: of all sizes together: at most so much.
        at_least: the sizes together are to be at least the budget instead (what is removed, not what is left).
        cells: of the grid, at most.

    Returns:
        Choice: of equal ones that with the first levels of the last items. Time in the order of all levels together
        times cells; memory items times cells, one byte each (four with more than 256 levels).

    Raises:
        Error: items and levels that do not fit, costs that are NaN, or a budget that cannot be had.

    >>> knapsack([[0.0, 5.0, 9.0], [0.0, 1.0, 8.0]], [[4, 2, 1], [4, 2, 1]], 5).levels
    [1, 1]
    """
    items = _items(costs, sizes, budget, at_least, "knapsack")
    room = min(items.room, math.fsum(float(size.max()) for size in items.sizes))  # more than all could use is no use
    unit = _unit(items.sizes, room, cells)
    width = math.floor(room / unit * (1 + _ROUNDING) + _ROUNDING) + 1
    # At least so much removed is at most so much left: sizes always count what is in the way, and are rounded up.
    steps = [torch.ceil(size / unit * (1 - _ROUNDING) - 1e-6).clamp(max=width).long() for size in items.sizes]
    best = torch.zeros(width, dtype=torch.float64)
    kind = torch.uint8 if max(map(len, items.costs), default=0) <= 2**8 else torch.int32
    taken = torch.zeros(len(items.costs), width, dtype=kind)
    for item, (cost, step) in enumerate(zip(items.costs, steps, strict=True)):
        found = torch.full_like(best, math.inf)
        for level, (harm, moved) in enumerate(zip(cost.tolist(), step.tolist(), strict=True)):
            if moved < width and harm < math.inf:
                offer = best[: width - moved] + harm
                better = offer < found[moved:]
                found[moved:][better] = offer[better]
                taken[item, moved:][better] = level
        best = found
    levels: list[int] = []
    place = width - 1
    for item in reversed(range(len(steps))):
        levels.append(int(taken[item, place]))
        place -= int(steps[item][levels[-1]])
    # On a grid that is too coarse for many items, what rounding wastes may be worth more than the exact order.
    others, left, _ = _along_hulls(items)
    filled = _choice(items, _filled(items, others, left))
    found = _choice(items, levels[::-1])
    return found if found.cost <= filled.cost else filled


def lagrangian(
    costs: Sequence[Any], sizes: Sequence[Any], budget: float, *, at_least: bool = False, fill: bool = True
) -> Choice:
    r"""A cheap choice within a budget, along the lower convex hulls of each item's levels.

    .. math:: l_i(\lambda) = \arg\min_l \; c_{il} + \lambda s_{il}

    As the multiplier falls, items step along their hulls in the order of what a step saves in cost for what it adds in
    size. The first step that does not fit ends the run with one multiplier for all; what room is left is then filled
    with whatever saves most for its size and still fits. Where the run ends exactly on the budget the choice is the
    best there is.

    Args:
        costs: of each item, ``[levels]``, measured harm; infinite for what is not allowed. Levels may differ in number.
        sizes: of each item, ``[levels]``.
        budget: of all sizes together: at most so much.
        at_least: the sizes together are to be at least the budget instead.
        fill: False ends with the run, for who takes a part of the step that does not fit.

    Returns:
        Choice: time in the order of n log n of all n levels together, and of n for each filling.

    Raises:
        Error: items and levels that do not fit, costs that are NaN, or a budget that cannot be had.

    >>> lagrangian([[0.0, 5.0, 9.0], [0.0, 1.0, 8.0]], [[4, 2, 1], [4, 2, 1]], 5).levels
    [1, 1]
    """
    items = _items(costs, sizes, budget, at_least, "lagrangian")
    levels, left, _ = _along_hulls(items)
    return _choice(items, _filled(items, levels, left) if fill else levels)


class _Items(NamedTuple):
    costs: list[Tensor]
    sizes: list[Tensor]
    """Counted from the least of each item; with ``at_least`` what is lacking from the most."""
    given: list[Tensor]
    room: float
    """The budget, counted likewise."""


def _items(costs: Sequence[Any], sizes: Sequence[Any], budget: float, at_least: bool, who: str) -> _Items:
    """Float64, checked, with the budget as "at most"."""
    harm = [torch.as_tensor(cost, dtype=torch.float64).detach().cpu() for cost in costs]
    given = [torch.as_tensor(size, dtype=torch.float64).detach().cpu() for size in sizes]
    if len(harm) != len(given):
        raise Error(f"{who} needs sizes of as many items as costs, got {len(given)} and {len(harm)}")
    for item, (cost, size) in enumerate(zip(harm, given, strict=True)):
        if cost.dim() != 1 or cost.shape != size.shape:
            raise Error(f"{who}: item {item} has costs {list(cost.shape)} and sizes {list(size.shape)}; both [levels]")
        if cost.isnan().any() or (cost == -math.inf).any() or not size.isfinite().all():
            raise Error(f"{who}: item {item} has a cost that is no number or a size that is not finite")
        if not (cost < math.inf).any():
            raise Error(f"{who}: item {item} has no level of finite cost")
    if not math.isfinite(budget):
        raise Error(f"{who}: a budget is a finite number, got {budget}")
    sign = -1.0 if at_least else 1.0
    lowest = [float((sign * size)[cost < math.inf].min()) for cost, size in zip(harm, given, strict=True)]
    room = sign * budget - math.fsum(lowest)
    scale = max([abs(budget), *(float(size.abs().max()) for size in given)], default=0.0)
    if room < -_ROUNDING * scale:
        word, reach = ("at least", "most") if at_least else ("at most", "least")
        raise Error(
            f"{who}: sizes of {word} {budget:g} in all cannot be had: the {reach} they can come to is "
            f"{sign * math.fsum(lowest):g}; change the budget or offer other levels"
        )
    shifted = [(sign * size - low).clamp(min=0) for size, low in zip(given, lowest, strict=True)]
    return _Items(harm, shifted, given, max(room, 0.0))


def _unit(sizes: Sequence[Tensor], room: float, cells: int) -> float:
    """The step of the grid: the greatest that all sizes are multiples of, or else that of the finest grid."""
    if cells < 1:
        raise Error(f"a grid has at least 1 cell, got {cells}")
    scale = max([float(size.max()) for size in sizes], default=0.0)
    values = sorted({value for size in sizes for value in size.tolist()})
    unit = 0.0
    for value in values:
        unit = _divisor(value, unit, _ROUNDING * scale)
    if unit > 0 and room / unit <= cells and all(abs(v / unit - round(v / unit)) < 1e-6 for v in values):
        return unit
    if room > 0:
        return room / cells
    return min((value for value in values if value > _ROUNDING * scale), default=1.0)  # nothing that has a size fits


def _divisor(one: float, other: float, nothing: float) -> float:
    """The greatest number that both are multiples of (Euclid), where less than ``nothing`` is a rounding error."""
    while other > nothing:
        rest = math.fmod(one, other)
        one, other = other, 0.0 if other - rest <= nothing else rest
    return one


def _along_hulls(items: _Items) -> tuple[list[int], float, float]:
    """The levels after the steps that fit in order, the room that is left, and the least cost that any choice has."""
    hulls = [_hull(cost, size) for cost, size in zip(items.costs, items.sizes, strict=True)]
    steps = []
    for item, hull in enumerate(hulls):
        for rank, (before, after) in enumerate(pairwise(hull)):
            grown = float(items.sizes[item][after] - items.sizes[item][before])
            saved = float(items.costs[item][before] - items.costs[item][after])
            steps.append((-saved / grown, item, rank, after, grown, saved))
    steps.sort()  # along a hull steps save ever less for their size, so none comes before the one it stands on
    levels = [hull[0] for hull in hulls]
    left = items.room - math.fsum(float(size[level]) for size, level in zip(items.sizes, levels, strict=True))
    bound = math.fsum(float(cost[level]) for cost, level in zip(items.costs, levels, strict=True))
    for _, item, _, after, grown, saved in steps:
        if grown > left + _ROUNDING * items.room:
            return levels, left, bound - saved * max(left, 0.0) / grown  # a part of the step: the linear relaxation
        levels[item] = after
        left, bound = left - grown, bound - saved
    return levels, left, bound


def _hull(cost: Tensor, size: Tensor) -> list[int]:
    """Levels on the lower convex hull from the smallest size to the least cost, by size."""
    points = sorted(zip(size.tolist(), cost.tolist(), range(len(cost)), strict=True))
    hull: list[tuple[float, float, int]] = []
    for x, y, level in points:
        if y == math.inf or (hull and y >= hull[-1][1]):
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y, level))
    return [level for _, _, level in hull]


def _above(first: tuple[float, float, int], middle: tuple[float, float, int], last: tuple[float, float]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])


def _filled(items: _Items, levels: Sequence[int], left: float) -> list[int]:
    """Steps to any cheaper level that still fits, the one that saves most for its size first."""
    levels = list(levels)
    while True:
        best: tuple[float, int, int] | None = None
        for item, (cost, size) in enumerate(zip(items.costs, items.sizes, strict=True)):
            saved, grown = cost[levels[item]] - cost, size - size[levels[item]]
            able = (saved > 0) & (grown <= left + _ROUNDING * items.room)
            if able.any():
                worth = torch.where(able, saved / grown.clamp(min=1e-300), -math.inf)
                level = int(worth.argmax())
                if best is None or float(worth[level]) > best[0]:
                    best = float(worth[level]), item, level
        if best is None:
            return levels
        _, item, level = best
        left -= float(items.sizes[item][level] - items.sizes[item][levels[item]])
        levels[item] = level


def _choice(items: _Items, levels: list[int]) -> Choice:
    cost = math.fsum(float(cost[level]) for cost, level in zip(items.costs, levels, strict=True))
    size = math.fsum(float(size[level]) for size, level in zip(items.given, levels, strict=True))
    return Choice(levels, cost, size, min(_along_hulls(items)[2], cost))
