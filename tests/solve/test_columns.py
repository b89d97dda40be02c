"""The loop over columns: what is settled, and how the rest makes up for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.solve import Settle, column_loop, inverse_factor


def problem(rows: int = 3, columns: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(20, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), data.T @ data


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_each_column_is_made_up_for_by_the_best_change_of_those_after_it(block: int):
    weight, gram = problem()
    before = weight.clone()

    def begin(start: int, values: Tensor) -> Settle:
        return lambda column: values[column].round()

    found = column_loop(weight, inverse_factor(gram), begin, block=block)
    assert torch.equal(weight, before)
    now = weight.clone()
    for column in range(7):  # solved anew for each column: those after it are free, those before it stand
        settled = now[:, column].round()
        change = settled - now[:, column]
        now[:, column] = settled
        if column < 6:
            free = slice(column + 1, None)
            now[:, free] -= torch.linalg.solve(gram[free, free], torch.outer(gram[free, column], change)).T
    torch.testing.assert_close(found, now)


def test_what_begin_sees_is_up_to_date():
    weight, gram = problem(columns=6)
    factor = inverse_factor(gram)
    seen = {}

    def begin(start: int, values: Tensor) -> Settle:
        def settle(column: int) -> Tensor:
            seen[start + column] = values[column:].clone()
            return torch.zeros(3, dtype=torch.float64)

        return settle

    column_loop(weight, factor, begin, block=3)
    # With the first j columns gone, the others are the least squares fit.
    for column, stop in ((1, 3), (2, 3), (4, 6), (5, 6)):
        free = slice(column, None)
        fit = weight @ gram[:, free] @ torch.linalg.inv(gram[free, free])
        torch.testing.assert_close(seen[column], fit[:, : stop - column].T)


def test_edges():
    def begin(start: int, values: Tensor) -> Settle:
        return lambda column: values[column]

    for shape in ((0, 4), (1, 1), (2, 0)):
        weight = torch.ones(shape)
        assert torch.equal(column_loop(weight, torch.eye(shape[1]), begin), weight)
    strided = torch.arange(12.0).reshape(3, 4).T
    before = strided.clone()
    zeros = column_loop(strided, torch.eye(3), lambda start, values: lambda column: torch.zeros(4))
    assert not zeros.any()
    assert torch.equal(strided, before)
    one = torch.ones(1, 5)  # its transpose lies as it does
    column_loop(one, torch.eye(5), lambda start, values: lambda column: torch.zeros(1))
    assert torch.equal(one, torch.ones(1, 5))
