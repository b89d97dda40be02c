"""Sparsity against sorting, the knee against its formula, one threshold against the pruning room."""

from __future__ import annotations

import math

import pytest
import torch

import weightsmith
from weightsmith.errors import Error
from weightsmith.inspect import sparsity_knees


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_sparsity_is_the_one_that_sorting_finds():
    weights = {"h.0.q": normal(300, 500), "h.1.q": 3 * normal(200, 100, seed=1) ** 3}
    found = sparsity_knees(weights, energy=(0.001, 0.05, 0.5))
    for row in found.table[:2]:
        squares = weights[row["tensor"]].double().square().flatten().sort().values
        lost = squares.cumsum(0) / squares.sum()
        for share, key in ((0.001, "sparsity at 0.1 %"), (0.05, "sparsity at 5 %"), (0.5, "sparsity at 50 %")):
            exact = float((lost <= share).double().mean())
            assert row[key] == pytest.approx(exact, abs=3e-4)


def test_the_knee_is_where_weights_are_as_large_as_their_root_mean_square():
    values = 1.3 * normal(1000, 200)  # their root mean square is not at the edge of a bucket
    found = sparsity_knees({"w": values})
    below = float((values.double().square() < values.double().square().mean()).double().mean())
    assert found.figures["knee"] == pytest.approx(below, abs=3e-4)
    assert found.figures["knee"] == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.005)  # of a Gaussian
    squares = values.double().square().flatten().sort().values
    lost = float(squares[: round(below * len(squares))].sum() / squares.sum())
    assert found.figures["lost at knee"] == pytest.approx(lost, abs=3e-4)


def test_one_threshold_removes_what_pruning_does():
    weights = {"h.0.q": normal(100, 100), "h.1.q": 5 * normal(100, 100, seed=1)}
    found = sparsity_knees(weights, sparsity=0.6)
    pruned = weightsmith.prune.magnitude(weights, sparsity=0.6, scope="global")
    for row in found.table[:2]:
        removed = float((pruned[row["tensor"]] == 0).double().mean())
        assert row["removed"] == pytest.approx(removed, abs=4e-4)
    assert found.table[-1]["removed"] == pytest.approx(0.6, abs=1e-9)


def test_zeros_and_what_is_not_finite():
    found = sparsity_knees({"w": torch.tensor([[0.0, -0.0, 1.0, math.nan, math.inf]]), "z": torch.zeros(2, 2)})
    one, zero, _ = found.table
    assert one["zeros"] == pytest.approx(2 / 3)
    assert one["sparsity at 1 %"] == pytest.approx(2 / 3, abs=0.02)
    assert (zero["zeros"], zero["knee"], zero["sparsity at 1 %"]) == (1.0, 1.0, 1.0)
    assert "2 values are not finite" in found.notes[-1]
    assert sparsity_knees({"w": torch.full((2, 2), math.nan)}).table[0]["knee"] is None


def test_bfloat16_and_threads_make_no_difference():
    values = normal(64, 4096).bfloat16()
    first = sparsity_knees({"w": values}, threads=1).table
    assert first == sparsity_knees({"w": values.float()}, threads=3).table


@pytest.mark.parametrize("options", [{"energy": ()}, {"energy": (1.0,)}, {"sparsity": 0.0}])
def test_shares_out_of_range_are_refused(options):
    with pytest.raises(Error, match="between 0 and 1"):
        sparsity_knees({"w": torch.ones(2, 2)}, **options)
