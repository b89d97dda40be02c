"""Nearly one bit a weight: signs, with magnitudes placed where they err least.

A few columns matter most to the outputs: their weights are binarized, and what is left of them once more. Weights of
the other columns lie in a bell; split at the best magnitude, those around zero and those far from it are binarized
apart. Columns that are not binarized yet make up for the errors of those that are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import Coded, checked_matrix, group_count
from weightsmith.quantize._gptq import factored
from weightsmith.quantize.grids import Grid, Residual
from weightsmith.quantize.grids._grid import held
from weightsmith.solve import Settle, column_loop


@card(
    paper="Huang et al. 2024, 'BiLLM: Pushing the Limit of Post-Training Quantization for LLMs'",
    covers=("billm",),
    needs=("stats.gram",),
    unit="tensor",
    claim="a language model loses less than with GPTQ at one bit, which stores half as much",
    departs="the break point is the best of all, of each row; columns make up for those before them in their block "
    "too, and a weight that has done so is given to whichever part is nearer; the bit that says which part it is in "
    "is stored and counted",
)
def billm(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid = Residual(),  # noqa: B008
    damp: float = 0.01,
    shrink: float = 0.0,
    salient: int = 50,
) -> Coded:
    r"""Signs and two magnitudes for most columns, sums of two signs for the salient ones.

    .. math:: s_j = \sum_i \frac{w_{ij}^2}{[H^{-1}]_{jj}^2}, \qquad
        \min_p \sum_{|w| \le p} (|w| - a_1)^2 + \sum_{|w| > p} (|w| - a_2)^2, \qquad
        w \approx b_1 \operatorname{sign}(w) + b_2 \operatorname{sign}(w - b_1 \operatorname{sign}(w))

    with each magnitude the mean of what it stands for, by row and block. How many columns of a block are salient is
    searched: those of largest :math:`s_j` and the rest, with one magnitude a row each, are to err least.

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, any form.
        grid: a `Residual`: columns of a block.
        damp, shrink: as of `gptq`.
        salient: the most columns of a block that are binarized twice; the paper searches up to 30, its program to 49.

    Returns:
        codes and parameters; as stored they take two bits and what `Residual` says. Memory: as of `gptq`.

    Raises:
        Error: another grid, shapes that do not fit, or options out of their range.

    >>> made = billm(torch.tensor([[1.0, -1.0, 5.0, -7.0]]), torch.eye(4), salient=0)
    >>> made.values()
    tensor([[ 1., -1.,  6., -6.]])
    """
    if not isinstance(grid, Residual):
        raise Error(f"billm rounds to its own points alone (grid='billm'), got {grid}")
    if not isinstance(salient, int) or salient < 0:
        raise Error(f"salient is a number of columns, 0 or more, got {salient!r}")
    rows = checked_matrix("billm", weight, gram)
    inputs = rows.shape[1]
    size = grid.group or max(inputs, 1)
    factor, _ = factored(gram, damp=damp, shrink=shrink, dtype=rows.dtype)
    spread = factor.square().sum(0)  # the diagonal of the inverse
    codes = torch.empty(inputs, len(rows), dtype=torch.uint8, device=rows.device)
    magnitudes = rows.new_zeros(len(rows), group_count(inputs, grid.group), 4)
    chosen = torch.zeros(inputs, dtype=torch.uint8, device=rows.device)

    def begin(start: int, values: Tensor) -> Settle:
        piece = values.t()
        mask = salient_columns(piece, spread[start : start + piece.shape[1]], salient)
        found = held(torch.cat([split(piece[:, ~mask]), residual(piece[:, mask])], 1), grid.scale_dtype, "magnitudes")
        magnitudes[:, start // size] = found
        chosen[start : start + piece.shape[1]] = mask.to(torch.uint8)

        def settle(column: int) -> Tensor:
            own = {"magnitudes": found, "salient": chosen[start + column]}
            code = grid.encode(values[column].unsqueeze(-1), own)
            codes[start + column] = code.squeeze(-1)
            return grid.decode(code, own).squeeze(-1)

        return settle

    column_loop(rows, factor, begin, block=size)
    return Coded(codes.t().contiguous(), {"magnitudes": magnitudes}, grid, {"salient": chosen})


def salient_columns(weight: Tensor, spread: Tensor, most: int) -> Tensor:
    """Which columns of ``[rows, columns]`` are salient, given the inverse Gram matrix's diagonal: ``[columns]``."""
    columns = weight.shape[1]
    order = (weight.square().sum(0) / spread.square()).argsort(descending=True, stable=True)
    most = min(most, columns - 1)
    mask = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    if most < 1:
        return mask
    sums = weight.abs()[:, order].double().cumsum(1)
    count = torch.arange(1, columns, device=weight.device, dtype=sums.dtype)
    gain = _gain(sums[:, :-1], sums[:, -1:], count, columns).sum(0)[:most]
    mask[order[: int(gain.argmax()) + 1]] = True
    return mask


def _gain(first: Tensor, total: Tensor, count: Tensor, size: int) -> Tensor:
    """What two means take off a sum of squares: of ``count`` values of sum ``first``, and of the rest."""
    return first.square() / count + (total - first).square() / (size - count)


def split(weight: Tensor) -> Tensor:
    """The two magnitudes of each row that leave the least squared error: ``[rows, 2]``, the smaller first.

    Of all ways to cut the sorted magnitudes in two the best is taken; each part's magnitude is its mean.

    >>> split(torch.tensor([[1.0, -2.0, 8.0, 10.0]]))
    tensor([[1.5000, 9.0000]])
    """
    size = weight.abs().double().sort(1).values
    columns = size.shape[1]
    if columns < 2:
        return (size if columns else size.new_zeros(len(size), 1)).expand(-1, 2).to(weight.dtype)
    sums = size.cumsum(1)
    count = torch.arange(1, columns, device=size.device, dtype=size.dtype)
    best = _gain(sums[:, :-1], sums[:, -1:], count, columns).argmax(1, keepdim=True)
    low = sums.gather(1, best)
    return torch.cat([low / (best + 1), (sums[:, -1:] - low) / (columns - 1 - best)], 1).to(weight.dtype)


def residual(weight: Tensor) -> Tensor:
    """The two magnitudes that sums of two signs have: ``[rows, 2]``, the smaller first.

    >>> residual(torch.tensor([[1.0, -3.0]]))    # 2 and 1, so 1 and 3
    tensor([[1., 3.]])
    """
    if not weight.shape[1]:
        return weight.new_zeros(len(weight), 2)
    first = weight.abs().mean(1, keepdim=True)
    second = (weight.abs() - first).abs().mean(1, keepdim=True)
    return torch.cat([(first - second).abs(), first + second], 1)
