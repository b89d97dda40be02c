"""Tables fitted to weights, against every way to cut a line."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.grids import Levels, _levels, centres


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def error(values: Tensor, levels: Tensor, heed: Tensor) -> float:
    return float((heed * (values.unsqueeze(-1) - levels).square().amin(-1)).sum())


def least(values: Tensor, count: int, heed: Tensor) -> float:
    """Of all cuts of the sorted values into runs."""
    values, order = values.sort()
    heed, best = heed[order], float("inf")
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(values))):
            run, own = values[start:stop], heed[start:stop]
            total += float((own * (run - (run * own).sum() / own.sum()).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_near_the_best_of_all_cuts(count: int, weighted: bool):
    values = normal(40, 12)
    heed = normal(40, 12, seed=1).square() if weighted else torch.ones(40, 12).double()
    levels = centres(values, count, heed if weighted else None)
    assert torch.equal(levels, levels.sort(-1).values)
    ratios = [error(v, l, h) / least(v, count, h) for v, l, h in zip(values, levels, heed, strict=True)]
    assert min(ratios) > 1 - 1e-9
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 20  # turns end at the best for most
    assert sum(ratios) / len(ratios) < 1.25


def test_centres_stand_still():
    values, heed = normal(5, 100), normal(5, 100, seed=1).square()
    levels = centres(values, 8, heed)
    owner = (values.unsqueeze(-1) - levels.unsqueeze(1)).abs().argmin(-1)
    for row in range(5):
        for k in range(8):
            mine = owner[row] == k
            mean = (values[row] * heed[row])[mine].sum() / heed[row][mine].sum()
            assert float(levels[row, k]) == pytest.approx(float(mean), rel=1e-9)


def test_never_worse_than_even_spacing_from_which_it_starts():
    values = normal(20, 64).pow(5)  # heavy tails, where quantiles start badly
    levels = centres(values, 4)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    even = low + (high - low) * (torch.arange(4) + 0.5) / 4
    ones = torch.ones(64).double()
    assert all(error(v, l, ones) <= error(v, e, ones) for v, l, e in zip(values, levels, even, strict=True))


def test_normal_weights_get_the_levels_of_lloyd_and_max():
    levels = centres(normal(1, 400_000), 4)[0]
    assert levels.tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=0.02)


def test_what_is_far_from_zero_is_told_apart():
    values = torch.tensor([[1e4, 1e4 + 0.01, 1e4 + 1, 1e4 + 1.01]], dtype=torch.float64)
    assert centres(values, 2)[0].tolist() == pytest.approx([1e4 + 0.005, 1e4 + 1.005], abs=1e-9)


def test_few_values_are_kept():
    assert centres(torch.tensor([3.0, 1.0]), 4).tolist() == [1, 3, 3, 3]
    assert centres(torch.tensor([5.0, 5.0, 5.0]), 2).tolist() == [5, 5]
    assert centres(torch.zeros(3, 0), 2).tolist() == [[0, 0]] * 3


def test_importance_of_zero_and_worse():
    values = normal(2, 9)
    torch.testing.assert_close(centres(values, 3, torch.zeros(9)), centres(values, 3))
    only = torch.tensor([0.0, 1, 0, 0, 1, 0, 0, 0, 0]).double()
    levels = centres(values, 2, only)
    assert torch.allclose(levels, values[:, [1, 4]].sort(1).values)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(Error, match="importance"):
            centres(values, 2, torch.tensor(bad))


def test_runs_of_groups_change_nothing(monkeypatch: pytest.MonkeyPatch):
    values, heed = normal(3, 5, 20), normal(3, 5, 20, seed=1).square()
    expected = centres(values, 4, heed)
    monkeypatch.setattr(_levels, "AT_ONCE", 45)
    assert torch.equal(centres(values, 4, heed), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_groups_that_stand_still_early_do_not_disturb_others(weighted: bool):
    values = normal(300, 60) * torch.linspace(0.1, 3, 300).double().unsqueeze(1)
    values[::3] = values[::3].round(decimals=0)  # few values, which settle at once
    heed = normal(300, 60, seed=1).square() if weighted else None
    together = centres(values, 8, heed)
    alone = [centres(row, 8, None if heed is None else heed[k]) for k, row in enumerate(values)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-12)


def test_a_table_of_the_tensor():
    values = normal(4, 30).float()
    grid = Levels(3, per_tensor=True)
    shared = grid.shared(values)
    assert shared["levels"].shape == (8,)
    assert grid.fit(values) == {}
    torch.testing.assert_close(shared["levels"], centres(values.flatten(), 8))
    with pytest.raises(Error, match="one table for all"):
        Levels(3, 16, per_tensor=True)


def test_levels_are_stored_in_their_dtype():
    values = normal(4, 30).float()
    levels = Levels(2, scale_dtype=torch.float16).fit(values)["levels"]
    assert torch.equal(levels.half().float(), levels)
    with pytest.raises(Error, match="too large for levels"):
        Levels(2, scale_dtype=torch.float16).fit(values * 1e6)


def test_sixteen_levels_of_normal_weights_err_as_little_as_can_be():
    values = normal(1, 50_000)
    assert error(values[0], centres(values, 16)[0], torch.ones(50_000)) / 50_000 == pytest.approx(0.0095, rel=0.02)
