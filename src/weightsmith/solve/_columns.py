"""One column of a weight matrix after the other is settled, and those that come later make up for its error.

What a column of weights becomes (zero where it is pruned, a code where it is quantized) changes the outputs of its
layer. The columns that are still free are moved so that the outputs change least: exactly so, by one row of a
triangular matrix. Pruning and quantizing differ only in what a column becomes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightsmith.errors import Error

Settle = Callable[[int], Tensor]
"""``column of the block -> [rows]``: what it becomes."""

Begin = Callable[[int, Tensor], Settle]
"""``(first column, values [columns of the block, rows]) -> settle``. The values are the present ones, and stay so
while the block is worked on: where a column is settled, those after it have made up for all before it."""

BLOCK = 128
"""Columns that are kept up to date one by one; those after them once a block."""


def column_loop(weight: Tensor, factor: Tensor, begin: Begin, *, block: int = BLOCK) -> Tensor:
    r"""Settle the columns of a matrix in their order.

    .. math:: e_j = \frac{w_j - q_j}{U_{jj}}, \qquad w_k \leftarrow w_k - e_j\, U_{jk} \quad (k > j)

    with :math:`w_j` the present values of column j, :math:`q_j` what they become and :math:`H^{-1} = U^\top U`
    (`inverse_factor`).

    Args:
        weight: ``[rows, columns]``, float32 or float64; unchanged.
        factor: ``U [columns, columns]``, of its dtype.
        begin: called once a block; what it returns says what each column becomes.
        block: columns of a block, 1 or more.

    Returns:
        ``[rows, columns]``, every column as it was settled. Beside it one copy of the weight is held.

    Raises:
        Error: a block of no columns.

    >>> factor = ws.solve.inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> double_the_first = lambda start, values: lambda column: values[column] if column else 2 * values[column]
    >>> column_loop(torch.tensor([[1.0, 3.0]]), factor, double_the_first)
    tensor([[2.0000, 2.5000]])
    """
    if block < 1:
        raise Error(f"columns are settled in blocks of 1 or more, got block={block}")
    values = weight.t().contiguous()  # a column is then one run of memory
    values = values.clone() if values.data_ptr() == weight.data_ptr() else values
    sizes = factor.diagonal().tolist()
    for start in range(0, len(values), block):
        stop = min(start + block, len(values))
        piece = values[start:stop]
        errors = torch.empty_like(piece)
        settle = begin(start, piece)
        for column in range(stop - start):
            settled = settle(column)
            torch.sub(piece[column], settled, out=errors[column]).div_(sizes[start + column])
            piece[column] = settled
            later = factor[start + column, start + column + 1 : stop]
            piece[column + 1 :].addr_(later, errors[column], alpha=-1)
        values[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return values.t().contiguous()
