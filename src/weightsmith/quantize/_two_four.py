"""Two bits a weight, and four where the range of a group would cost most.

What rounding costs grows with the square of a group's range. A tenth of the groups hold the widest ones; giving them
four bits takes most of the error away and costs a fifth of a bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import Coded, checked_matrix, energy_of, runs_of
from weightsmith.quantize._gptq import Order, column_by_column
from weightsmith.quantize.grids import Grid, TwoFour
from weightsmith.solve import BLOCK


def fine_groups(weight: Tensor, group: int | None, count: int, gram: Tensor | None = None) -> Tensor:
    r"""The groups of each row to which a rounding error would cost most: boolean ``[out, groups]``.

    .. math:: s_g = \Big(\max_{i \in g} w_i - \min_{i \in g} w_i\Big)^2 \sum_{i \in g} H_{ii}

    Args:
        weight: ``[out, in]``, float32 or wider.
        group: inputs of a group; the last may be shorter.
        count: how many of each row; of equal ones the first.
        gram: of the inputs, any form; without it all inputs count alike.

    >>> fine_groups(torch.tensor([[0.0, 1.0, 0.0, 3.0, 2.0, 2.5]]), 2, 1)
    tensor([[False,  True, False]])
    """
    heed = weight.new_ones(weight.shape[1]) if gram is None else energy_of(gram).to(weight)
    parts = []
    for runs, weights in zip(runs_of(weight, group), runs_of(heed.unsqueeze(0), group), strict=True):
        low, high = torch.aminmax(runs, dim=-1) if runs.shape[-1] else (runs.new_zeros(runs.shape[:-1]),) * 2
        parts.append((high.clamp(min=0) - low.clamp(max=0)).square() * weights.sum(-1))
    score = torch.cat(parts, 1)
    chosen = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)


@card(
    paper="Li et al. 2023, 'Enabling Fast 2-bit LLM on GPUs: Memory Alignment and Asynchronous Dequantization'",
    covers=("enabling-fast-2-bit-llm",),
    unit="tensor",
    claim="at equal bits, 4-bit groups chosen by range leave less error in the outputs than as many chosen at random",
    departs="groups are weighed by the inputs they are given; the kernels that decode while they load are not here",
)
def two_four(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    grid: Grid = TwoFour(),  # noqa: B008
    damp: float = 0.01,
    shrink: float = 0.0,
    order: Order = "activation",
    block: int = BLOCK,
) -> Coded:
    r"""Codes of two bits, and of four for the groups of widest range in each row.

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, any form; groups are then weighed by it, and columns that are not rounded yet make up for
            the errors of those that are. Without it every weight is rounded to nearest.
        grid: a `TwoFour`: inputs of a group, and the share of those that have 4 bits.
        damp, shrink, order, block: as of `gptq`.

    Returns:
        codes and parameters. Memory: as of `gptq`.

    Raises:
        Error: another grid, or shapes that do not fit.

    >>> grid = ws.quantize.grids.TwoFour(group=2, share=0.5)
    >>> two_four(torch.tensor([[0.0, 1.5, 6.0, -9.0]]), grid=grid).params["zero_point"]
    tensor([[ 0, 25]], dtype=torch.uint8)
    """
    if not isinstance(grid, TwoFour):
        raise Error(f"two_four rounds to grids of two and four bits alone (grid='two_four'), got {grid}")
    rows = checked_matrix("two_four", weight, gram)
    inputs = rows.shape[1]
    size = grid.size(inputs)
    fine = fine_groups(rows, size, grid.count(inputs), gram)
    padded = torch.nn.functional.pad(rows, (0, fine.shape[1] * size - inputs)).unflatten(1, (fine.shape[1], size))
    params, shared = grid.ranges(padded, fine)  # zero lies in every range, so what pads changes none
    if gram is None or not rows.numel():
        codes = grid.encode(padded, {**shared, **params}).flatten(1)[:, :inputs].contiguous()
        return Coded(codes, params, grid, shared)
    return column_by_column(rows, gram, grid, params, shared=shared, damp=damp, shrink=shrink, order=order, block=block)
