"""Put the points of a grid where rounding costs most, then round column by column.

How much the error of one weight costs, once all others have made up for it, is one over its entry on the diagonal of
the inverse Gram matrix. Few weights cost much, and a grid fitted to all alike misses them. Fitted with a power of this
cost, points go to where the costly weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import (
    NARROWEST,
    Coded,
    checked_matrix,
    energy_of,
    fitted,
    joined,
    parts_by_gram,
    runs_of,
)
from weightsmith.quantize._gptq import Order, column_by_column, factored
from weightsmith.quantize.grids import Grid, Integer, Params
from weightsmith.solve import BLOCK


@card(
    paper="Zhang, Shrivastava 2024, 'LeanQuant: Accurate and Scalable Large Language Model Quantization with "
    "Loss-error-aware Grid'",
    covers=("leanquant",),
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less than with GPTQ on a grid that is fitted to all weights alike",
    departs="ends of ranges are searched in the same steps for all groups, down to half of each side; the power is 2: "
    "the authors' code takes the power 4 of the diagonal of the triangular factor, the square root of a cost",
)
def leanquant(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid = Integer(),  # noqa: B008
    power: float = 2.0,
    steps: int = 16,
    damp: float = 0.1,
    shrink: float = 0.0,
    order: Order = "activation",
    block: int = BLOCK,
) -> Coded:
    r"""Points fitted where errors cost most, and codes for them column by column.

    .. math:: \min_g \sum_i \bigl( [H^{-1}]_{ii} \bigr)^{-p} \bigl( w_i - g(q_i) \bigr)^2

    and then `gptq` on this grid. Tables are fitted by k-means with these weights; of other grids the range of each
    group is the best of those that are narrower at the one end, the other, or both.

    Args:
        weight: ``[out, in]``.
        gram: ``[in, in]``, blocks, a diagonal, or ``[runs, in, in]`` for runs of rows.
        grid: the points.
        power: :math:`p`; 0 for all weights alike. A larger one serves fewer weights: at 3 bits 4 left more error than
            2 or 1 in layers of SmolLM2-135M, on the text it was fitted to and on others.
        steps: how many ends are tried on each side of a range that is not a table's.
        damp, shrink, order, block: as for `gptq`.

    Returns:
        codes and parameters. Memory: the Gram matrix three times in float64, then the weight five times.

    Raises:
        Error: shapes that do not fit, NaN, or options out of their range.

    >>> weight, gram = torch.tensor([[0.1, 0.9, 8.0]]), torch.diag(torch.tensor([9.0, 9.0, 1.0]))
    >>> leanquant(weight, gram, grid=ws.quantize.grids.Integer(bits=2, symmetric=False), damp=0).values()
    tensor([[0.0000, 1.3333, 4.0000]])
    """
    if not power >= 0 or not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise Error(f"power is 0 or more and steps a whole number from 0, got {power} and {steps!r}")
    rows = checked_matrix("leanquant", weight, gram, runs=True)
    shared = grid.shared(rows)
    found = []
    for part, own in parts_by_gram(rows, gram):
        heed = importance(own, power, damp=damp, shrink=shrink, order=order, dtype=part.dtype)
        params = fitted(part, grid, shared=shared, importance=heed)
        if "levels" not in grid.stored():
            params = _narrowed(part, grid, shared, heed, params, steps)
        found.append(
            column_by_column(part, own, grid, params, shared=shared, damp=damp, shrink=shrink, order=order, block=block)
        )
    return joined(found)


def importance(
    gram: Tensor, power: float, *, damp: float, shrink: float, order: Order = "given", dtype: torch.dtype
) -> Tensor:
    """``diag(H^-1)^-p`` ``[in]``, 1 at its largest; zero for inputs that were always zero."""
    factor, places = factored(gram, damp=damp, shrink=shrink, order=order, dtype=dtype)
    cost = factor.square().sum(0).reciprocal()  # H^-1 = U'U
    if places is not None:
        cost = cost[torch.argsort(places)]
    cost = torch.where(energy_of(gram) > 0, cost, 0)
    most = cost.max() if cost.numel() else cost.new_ones(())
    return (cost / torch.where(most > 0, most, 1)).pow(power) if power else torch.ones_like(cost)


def _narrowed(
    rows: Tensor, grid: Grid, shared: Params, heed: Tensor, params: dict[str, Tensor], steps: int
) -> dict[str, Tensor]:
    """For every row and group the ends of its range that leave the least weighted error."""
    parts: list[dict[str, Tensor]] = []
    done = 0
    for runs, weights in zip(runs_of(rows, grid.group), runs_of(heed[None], grid.group), strict=True):
        best = {name: value[:, done : done + runs.shape[1]].clone() for name, value in params.items()}
        done += runs.shape[1]
        parts.append(_best_ends(runs, grid, shared, weights, best, steps) if runs.numel() else best)
    return {name: torch.cat([part[name] for part in parts], 1) for name in params}


def _best_ends(
    runs: Tensor, grid: Grid, shared: Params, weights: Tensor, best: dict[str, Tensor], steps: int
) -> dict[str, Tensor]:
    low, high = torch.aminmax(runs, dim=-1, keepdim=True)

    def error(params: Params) -> Tensor:
        both = {**shared, **params}
        return (grid.decode(grid.encode(runs, both), both).sub_(runs).square_() * weights).sum(-1)

    least = error(best)
    ends = [1 - (1 - NARROWEST) * step / max(steps, 1) for step in range(steps + 1)]
    for lower in ends:
        for upper in ends:
            if lower == upper == 1:
                continue
            tried = grid.fit(torch.minimum(torch.maximum(runs, low * lower), high * upper), shared, importance=weights)
            found = error(tried)
            better = found < least
            least = torch.where(better, found, least)
            for name, value in tried.items():
                best[name] = torch.where(better.reshape(*better.shape, *[1] * (value.dim() - 2)), value, best[name])
    return best
