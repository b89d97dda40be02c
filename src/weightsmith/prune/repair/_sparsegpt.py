"""Remove weights column by column; those that are left make up for each loss as it happens.

When a weight goes, the outputs change least if the others of its row move along the directions that the inputs share
with it. One triangular matrix says how, for all rows at once. What is to go is decided late, a block of columns at a
time, on weights that have already made up for what went before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.prune._select import kept_of_groups
from weightsmith.prune.repair._parts import Budget, lowest, posed
from weightsmith.solve import BLOCK, Begin, Settle, column_loop, inverse_factor


@card(
    paper="Frantar, Alistarh 2023, 'SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot'",
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less than where the same weights are only set to zero",
    departs="of a block exactly its share goes, ties or not; inputs that were always zero go first, but not beyond it",
)
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    mask: Tensor | None = None,
    *,
    sparsity: float | str | None = None,
    damp: float = 0.01,
    shrink: float = 0.0,
    block: int = BLOCK,
) -> Tensor:
    r"""Prune a matrix column by column, with the columns after each making up for it.

    .. math:: s_{ij} = \frac{w_{ij}^2}{U_{jj}^2}, \qquad H^{-1} = U^\top U

    Of each block of columns the weights of least :math:`s` go, or of every few inputs those of least :math:`s` as
    their turn comes.

    Args:
        weight: ``[out, in]``, before pruning.
        gram: ``[in, in]`` or blocks ``[in / b, b, b]`` (`weightsmith.stats.gram`).
        mask: ``[out, in]``, true for what is kept; or None where ``sparsity`` is given.
        sparsity: the share to remove, or a pattern such as ``"2:4"``.
        damp: what is added to the diagonal of the Gram matrix, as a share of its mean.
        shrink: how far the Gram matrix is drawn to its diagonal, from 0 to 1.
        block: columns among which a share is chosen at once; for patterns rounded to whole groups.

    Returns:
        ``[out, in]`` in the dtype of ``weight``, exact zeros where the mask is false. Memory: the Gram matrix
        three times in float64, then the weight three times.

    Raises:
        Error: neither a mask nor a sparsity, or both; shapes that do not fit; NaN.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> sparsegpt(torch.tensor([[1.0, 1.0]]), gram, torch.tensor([[False, True]]), damp=0)
    tensor([[0.0000, 1.5000]])
    """
    problem = posed("sparsegpt", weight, gram, mask, sparsity, damp=damp, shrink=shrink, chooses=True)
    before = problem.weight
    factor = inverse_factor(problem.matrix).to(before.dtype)
    if problem.mask is not None:
        begin, width = _given(problem.mask), block
    else:
        worth = factor.diagonal().square().reciprocal().masked_fill(problem.dead, 0)[:, None]
        begin, width = _choosing(worth, problem.budget or 0.0, len(weight), block)
    del problem  # and its matrix
    return column_loop(before, factor, begin, block=width).to(weight.dtype)


def _given(mask: Tensor) -> Begin:
    columns = mask.t().contiguous()

    def begin(start: int, values: Tensor) -> Settle:
        return lambda column: torch.where(columns[start + column], values[column], 0)

    return begin


def _choosing(worth: Tensor, budget: Budget, rows: int, block: int) -> tuple[Begin, int]:
    """How a mask comes about along the way, and in which blocks of columns."""
    if not isinstance(budget, tuple):

        def begin(start: int, values: Tensor) -> Settle:
            stop = start + len(values)
            count = round(budget * rows * stop) - round(budget * rows * start)  # so that they add up
            gone = lowest(values.square() * worth[start:stop], count)
            return lambda column: values[column].masked_fill(gone[column], 0)

        return begin, block

    keep, group = budget

    def begin_groups(start: int, values: Tensor) -> Settle:
        stays = torch.empty_like(values, dtype=torch.bool)

        def settle(column: int) -> Tensor:
            if column % group == 0:
                at, now = slice(start + column, start + column + group), slice(column, column + group)
                score = values[now].square() * worth[at]
                stays[now] = kept_of_groups(score.t(), keep=keep, group=group).t()
            return torch.where(stays[column], values[column], 0)

        return settle

    return begin_groups, max(block // group, min(block, 1)) * group
