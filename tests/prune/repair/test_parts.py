"""What repairs share."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.prune.repair._parts import budget_of, chosen, lowest


@pytest.mark.parametrize("count", range(8))
def test_exactly_so_many_of_the_lowest_go_and_of_equal_ones_the_last(count: int):
    score = torch.tensor([[2.0, 1.0, 1.0, 0.0], [1.0, torch.inf, 0.0, 1.0]])
    order = sorted(range(8), key=lambda i: (score.flatten()[i], -i))
    expected = torch.zeros(8, dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(lowest(score, count), expected.view(2, 4))


def test_budgets():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert chosen(score, 0.25).tolist() == [[False, True, True, True]]
    assert chosen(score, (1, 2)).tolist() == [[False, True, False, True]]
    assert chosen(torch.empty(0, 4), 0.5).shape == (0, 4)
    for bad in (-0.1, float("nan"), "2:3"):
        with pytest.raises(Error, match="x: "):
            budget_of(bad, 4, "x")
