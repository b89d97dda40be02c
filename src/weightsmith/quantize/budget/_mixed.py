"""Widths of codes that together fit a budget and cost least."""

from __future__ import annotations

import math

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize.budget._curves import Curves
from weightsmith.solve import knapsack
from weightsmith.solve import lagrangian as along_hulls


@card(
    paper="Shoham, Gersho 1988, 'Efficient bit allocation for an arbitrary set of quantizers'; Dong et al. 2020, "
    "'HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks' (applied to layers of networks)",
    unit="model",
    claim="no choice of widths within the budget has a smaller sum of errors",
    departs="exact by dynamic programming where asked; else one price a bit for all tensors, and what is left filled",
)
def mixed(curves: Curves, bits: float | None = None, *, size: int | None = None, exact: bool = False) -> dict[str, int]:
    """The width of every tensor, such that the sum of their errors is least.

    Args:
        curves: of `weightsmith.quantize.budget.curves`.
        bits: mean bits of a code, at most.
        size: or bytes of all that is stored of these tensors, at most.
        exact: by dynamic programming on a grid of budgets, instead of one price for all.

    Returns:
        tensor -> bits, as ``bits=`` of any rounding takes it.

    Raises:
        Error: no budget or two, or one below that of the fewest bits.

    >>> from weightsmith.quantize.budget import Level
    >>> felt = {"a": [Level(2, 20, 3, 9.0), Level(4, 40, 5, 1.0)], "b": [Level(2, 20, 3, 2.0), Level(4, 40, 5, 1.0)]}
    >>> mixed(felt, 3.0)
    {'a': 4, 'b': 2}
    """
    if (bits is None) == (size is None):
        raise Error(f"mixed takes one budget: bits= a weight or size= in bytes, got bits={bits} and size={size}")
    if not curves:
        raise Error("mixed needs the curves of at least one tensor, got none")
    levels = list(curves.values())
    costs = [[level.error for level in own] for own in levels]
    if size is not None:
        sizes, budget = [[float(level.size) for level in own] for own in levels], float(size)
    else:
        assert bits is not None
        if not math.isfinite(bits):
            raise Error(f"bits is a number, got {bits}")
        sizes = [[float(level.codes) for level in own] for own in levels]
        budget = bits * sum(own[0].codes / own[0].bits for own in levels)
    least = math.fsum(min(own) for own in sizes)
    if budget < least:
        said = f"{bits:g} bits a weight" if bits is not None else f"{size} bytes"
        have = f"{least / (budget / bits):g} bits" if bits else f"{least:.0f} bytes"
        raise Error(f"{said} cannot be had: with the fewest bits that were tried it is {have}; try fewer in curves")
    solve = knapsack if exact else along_hulls
    chosen = solve(costs, sizes, budget).levels
    return {name: curves[name][level].bits for name, level in zip(curves, chosen, strict=True)}
