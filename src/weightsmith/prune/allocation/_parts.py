"""What allocations share: the tensors and their sizes, budgets that are met exactly, and what counts as one layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from weightsmith.errors import Error
from weightsmith.prune.room import Source, chosen_targets
from weightsmith.weights import Pattern, Weights, open

_LAYER = re.compile(r".*?(?:^|[._/])\d+(?=[._/])")


def sized(weights: Source, pattern: Pattern | None) -> tuple[Weights, dict[str, int]]:
    """The weights, and how many elements each of the tensors has that are to be pruned."""
    opened = open(weights)
    return opened, {name: opened.spec(name).numel for name in chosen_targets(opened, pattern)}


def share_of(sparsity: float, who: str) -> float:
    """The budget, checked: one number for all tensors together."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity <= 1:
        raise Error(f"{who} shares one sparsity between 0 and 1 among all tensors; got {sparsity!r}")
    return float(sparsity)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number in it, or all of it.

    >>> layer_of("model.layers.7.mlp.up.weight"), layer_of("stem.weight")
    ('model.layers.7', 'stem.weight')
    """
    found = _LAYER.match(name)
    return found[0] if found else name


def met(
    start: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: float,
    most: Mapping[str, float] | None = None,
    who: str = "the allocation",
) -> dict[str, float]:
    r"""Shares moved up or down together until the budget is met.

    .. math:: p_l = \min(\max(a_l + t,\ 0),\ m_l), \qquad \sum_l n_l p_l = S \sum_l n_l

    Args:
        start: :math:`a_l`, on any scale.
        sizes: :math:`n_l`, elements.
        sparsity: :math:`S`, checked.
        most: :math:`m_l`; 1 by default.

    Raises:
        Error: with all tensors at their most too little is removed.

    >>> met({"a": 0.0, "b": 0.25}, {"a": 10, "b": 10}, 0.5)
    {'a': 0.375, 'b': 0.625}
    """
    highest = {name: 1.0 if most is None else most[name] for name in start}
    budget = sparsity * sum(sizes.values())
    able = math.fsum(sizes[name] * highest[name] for name in start)
    if budget > able * (1 + 1e-12) + 1e-9:
        raise Error(
            f"{who}: a sparsity of {sparsity:g} in all cannot be had: at most {able / max(sum(sizes.values()), 1):.4g} "
            "can be removed; ask for less, or raise what a tensor may lose at most"
        )

    def removed(moved: float) -> float:
        return math.fsum(sizes[name] * min(max(value + moved, 0.0), highest[name]) for name, value in start.items())

    # What is removed is a line between two neighbours among the places where a share starts to grow or stops.
    bends = sorted({bend for name, value in start.items() for bend in (-value, highest[name] - value)})
    low, high = 0, len(bends) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if removed(bends[middle]) <= budget else (low, middle)
    before, after = removed(bends[low]), removed(bends[high])
    part = (budget - before) / (after - before) if after > before else 0.0
    moved = bends[low] + min(max(part, 0.0), 1.0) * (bends[high] - bends[low])
    return {name: min(max(value + moved, 0.0), highest[name]) for name, value in start.items()}
