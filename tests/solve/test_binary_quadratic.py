"""A fixed number of ones, against every choice there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.solve import binary_quadratic


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(size: int, seed: int) -> Tensor:
    made = normal(size, size, seed=seed)
    return made + made.T


def value(matrix: Tensor, linear: Tensor, chosen: Tensor) -> float:
    x = chosen.double()
    return float(x @ matrix @ x + linear @ x)


def brute_force(matrix: Tensor, linear: Tensor, ones: int) -> float:
    best = math.inf
    for chosen in itertools.combinations(range(len(linear)), ones):
        mask = torch.zeros(len(linear), dtype=torch.bool)
        mask[list(chosen)] = True
        best = min(best, value(matrix, linear, mask))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_optimum_on_small_problems(seed):
    size, ones = 8 + seed % 5, 2 + seed % 6
    matrix, linear = symmetric(size, seed), normal(size, seed=100 + seed)
    chosen, found = binary_quadratic(matrix, linear, ones)
    assert int(chosen.sum()) == ones
    assert found == pytest.approx(value(matrix, linear, chosen), rel=1e-9)
    assert found == pytest.approx(brute_force(matrix, linear, ones), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_of_low_rank_as_gradients_of_examples_are(seed):
    effects = normal(4, 12, seed=seed)
    matrix, linear = effects.T @ effects, -effects.mean(0)
    assert binary_quadratic(matrix, linear, 5)[1] == pytest.approx(brute_force(matrix, linear, 5), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_no_swap_betters_it_and_it_is_no_worse_than_the_start(seed):
    matrix, linear = symmetric(40, seed), normal(40, seed=50 + seed)
    start = torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.5
    chosen, found = binary_quadratic(matrix, linear, int(start.sum()), start=start, restarts=0)
    assert found <= value(matrix, linear, start)
    for out, into in itertools.product(chosen.nonzero()[:, 0].tolist(), (~chosen).nonzero()[:, 0].tolist()):
        other = chosen.clone()
        other[out], other[into] = False, True
        assert value(matrix, linear, other) >= found - 1e-9


def test_the_search_climbs_out_where_no_single_swap_helps():
    """Two pairs that only help each other whole: from one pair to the other is uphill at first."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = -1.0
    matrix[2, 3] = matrix[3, 2] = -2.0
    start = torch.tensor([True, True, False, False])
    assert binary_quadratic(matrix, torch.zeros(4), 2, start=start, restarts=0, steps=0)[1] == -2.0
    assert binary_quadratic(matrix, torch.zeros(4), 2, start=start, restarts=0)[1] == -4.0


def test_a_linear_problem_takes_the_least():
    linear = normal(30)
    chosen, found = binary_quadratic(torch.zeros(30, 30), linear, 7)
    assert torch.equal(chosen, linear <= linear.sort().values[6])
    assert found == pytest.approx(float(linear.sort().values[:7].sum()))


def test_edges():
    assert binary_quadratic(torch.zeros(0, 0), torch.zeros(0), 0)[0].shape == (0,)
    assert not binary_quadratic(torch.ones(3, 3), -torch.ones(3), 0)[0].any()
    chosen, found = binary_quadratic(torch.ones(3, 3), -torch.ones(3), 3)
    assert chosen.all()
    assert found == 6.0
    same = binary_quadratic(torch.zeros(5, 5), torch.zeros(5), 2)[0]
    assert torch.equal(same, binary_quadratic(torch.zeros(5, 5), torch.zeros(5), 2)[0])


@pytest.mark.parametrize(
    ("matrix", "linear", "ones", "start", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3), 1, None, "is of"),
        (torch.zeros(3, 3), torch.zeros(3), 4, None, "cannot be chosen"),
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.zeros(2), 1, None, "symmetric"),
        (torch.full((2, 2), float("nan")), torch.zeros(2), 1, None, "finite"),
        (torch.zeros(2, 2), torch.zeros(2), 1, torch.tensor([True, True]), "of which 1 are true"),
    ],
)
def test_refusals(matrix, linear, ones, start, words):
    with pytest.raises(Error, match=words):
        binary_quadratic(matrix, linear, ones, start=start)
