"""One bit, and three values."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.quantize.grids import Sign, Ternary


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(values: Tensor, step: float, heed: Tensor, ternary: bool) -> float:
    points = torch.tensor([-step, 0.0, step] if ternary else [-step, step])
    return float((heed * (values.unsqueeze(-1) - points).square().amin(-1)).sum())


def test_no_magnitude_of_signs_errs_less():
    for seed in range(5):
        values, heed = normal(30, seed=seed), normal(30, seed=seed + 9).square()
        for own in (None, heed):
            weights = torch.ones(30) if own is None else own
            found = float(Sign().fit(values, importance=own)["scale"])
            least = error(values, found, weights, False)
            assert all(
                least <= error(values, step, weights, False) + 1e-6 for step in torch.linspace(0, 3, 601).tolist()
            )


def test_no_step_of_three_values_errs_less():
    for seed in range(5):
        values, heed = normal(30, seed=seed), normal(30, seed=seed + 9).square()
        for own in (None, heed):
            weights = torch.ones(30) if own is None else own
            found = float(Ternary().fit(values, importance=own)["scale"])
            least = error(values, found, weights, True)
            assert all(
                least <= error(values, step, weights, True) + 1e-6 for step in torch.linspace(0, 4, 801).tolist()
            )


def test_the_mean_magnitude():
    values = torch.tensor([[1.0, -2.0, 6.0]])
    grid = Ternary(scale="mean")
    params = grid.fit(values)
    assert params["scale"].item() == 3
    assert grid.decode(grid.encode(values, params), params).tolist() == [[0, -3, 3]]


def test_a_code_that_is_not_written_is_no_fourth_value():
    scale = torch.tensor([2.0])
    assert Ternary().decode(torch.tensor([[0, 1, 2, 3]]), {"scale": scale}).tolist() == [[-2, 0, 2, 2]]


def test_signs_of_zeros_are_zeros():
    params = Sign().fit(torch.zeros(1, 3))
    assert Sign().decode(Sign().encode(torch.zeros(1, 3), params), params).tolist() == [[0, 0, 0]]
