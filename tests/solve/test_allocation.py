"""One level for each item within a budget: against enumeration, on grids and on convex curves."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.solve import Choice, knapsack, lagrangian


def enumerated(costs, sizes, budget, at_least=False) -> float:
    """The least cost of any choice within the budget."""
    best = math.inf
    for levels in itertools.product(*(range(len(cost)) for cost in costs)):
        size = sum(size[level] for size, level in zip(sizes, levels, strict=True))
        if size >= budget if at_least else size <= budget:
            best = min(best, sum(cost[level] for cost, level in zip(costs, levels, strict=True)))
    return best


def problem(seed: int, whole: bool = True) -> tuple[list[list[float]], list[list[float]], float]:
    chance = random.Random(seed)
    costs, sizes = [], []
    for _ in range(4):
        count = chance.randint(1, 5)
        costs.append([chance.uniform(-1, 5) for _ in range(count)])
        sizes.append([chance.randint(-3, 9) if whole else chance.uniform(-3, 9) for _ in range(count)])
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return costs, sizes, least + chance.random() * (most - least)


def checked(found: Choice, costs, sizes, budget, at_least) -> None:
    """What a choice says of itself is so."""
    assert found.cost == pytest.approx(sum(cost[level] for cost, level in zip(costs, found.levels, strict=True)))
    assert found.size == pytest.approx(sum(size[level] for size, level in zip(sizes, found.levels, strict=True)))
    assert found.size >= budget - 1e-9 if at_least else found.size <= budget + 1e-9


@pytest.mark.parametrize("at_least", [False, True])
def test_the_grid_is_exact_for_whole_numbers(at_least):
    for seed in range(60):
        costs, sizes, budget = problem(seed)
        found = knapsack(costs, sizes, budget, at_least=at_least)
        checked(found, costs, sizes, budget, at_least)
        best = enumerated(costs, sizes, budget, at_least)
        assert found.cost == pytest.approx(best, abs=1e-9)
        assert found.bound <= best + 1e-9


@pytest.mark.parametrize("at_least", [False, True])
def test_a_fine_grid_is_all_but_exact_for_any_sizes(at_least):
    for seed in range(30):
        costs, sizes, budget = problem(seed, whole=False)
        found = knapsack(costs, sizes, budget, at_least=at_least, cells=5000)
        checked(found, costs, sizes, budget, at_least)
        # Rounded to the grid it is as good as the best within a budget that is tighter by a step for each item.
        step = 4 * sum(max(size) - min(size) for size in sizes) / 5000
        tighter = enumerated(costs, sizes, budget + step if at_least else budget - step, at_least)
        assert enumerated(costs, sizes, budget, at_least) - 1e-9 <= found.cost <= tighter + 1e-9


def test_a_coarse_grid_still_meets_the_budget():
    for seed in range(30):
        costs, sizes, budget = problem(seed, whole=False)
        for at_least in (False, True):
            found = knapsack(costs, sizes, budget, at_least=at_least, cells=7)
            checked(found, costs, sizes, budget, at_least)
            assert found.cost <= lagrangian(costs, sizes, budget, at_least=at_least).cost


def test_large_whole_numbers_are_divided_by_what_they_share():
    costs, sizes = [[3.0, 1.0, 0.0]] * 3, [[0, 10**12, 2 * 10**12]] * 3
    found = knapsack(costs, sizes, 4 * 10**12, cells=10)
    assert found.cost == enumerated(costs, sizes, 4 * 10**12)
    assert knapsack(costs, sizes, 10**15, cells=10).levels == [2, 2, 2]


def convex(seed: int) -> tuple[list[list[float]], list[list[float]]]:
    """Costs that fall ever less as sizes grow."""
    chance = random.Random(seed)
    costs, sizes = [], []
    for _ in range(4):
        grown = [chance.randint(1, 4) for _ in range(4)]
        slopes = sorted((chance.uniform(0.1, 5) for _ in range(4)), reverse=True)
        sizes.append([0, *itertools.accumulate(grown)])
        costs.append([20 - x for x in (0, *itertools.accumulate(s * g for s, g in zip(slopes, grown, strict=True)))])
    return costs, sizes


def test_along_hulls_it_is_optimal_wherever_a_step_ends_on_the_budget():
    for seed in range(10):
        costs, sizes = convex(seed)
        steps = sorted(
            ((c[k] - c[k + 1]) / (s[k + 1] - s[k]), s[k + 1] - s[k])
            for c, s in zip(costs, sizes, strict=True)
            for k in range(4)
        )[::-1]
        for budget in itertools.accumulate(grown for _, grown in steps):
            found = lagrangian(costs, sizes, budget)
            checked(found, costs, sizes, budget, False)
            assert found.cost == pytest.approx(enumerated(costs, sizes, budget))
            assert found.bound == pytest.approx(found.cost)


@pytest.mark.parametrize("at_least", [False, True])
def test_bounds_hold_and_room_is_filled(at_least):
    gaps = []
    for seed in range(60):
        costs, sizes, budget = problem(seed)
        found, best = lagrangian(costs, sizes, budget, at_least=at_least), enumerated(costs, sizes, budget, at_least)
        checked(found, costs, sizes, budget, at_least)
        assert found.bound - 1e-9 <= best <= found.cost + 1e-9
        gaps.append(found.cost - best)
        for item, (cost, size) in enumerate(zip(costs, sizes, strict=True)):  # no single change makes it better
            now = found.levels[item]
            for level in range(len(cost)):
                moved = found.size - size[now] + size[level]
                assert cost[level] >= cost[now] - 1e-9 or (moved < budget if at_least else moved > budget)
    assert sum(gap < 1e-9 for gap in gaps) > 30


def test_the_bound_is_that_of_the_linear_program():
    from scipy.optimize import linprog

    for seed in range(10):
        costs, sizes, budget = problem(seed)
        flat, owners = [c for cost in costs for c in cost], [i for i, cost in enumerate(costs) for _ in cost]
        equal = [[float(owner == item) for owner in owners] for item in range(len(costs))]
        solved = linprog(
            flat, A_ub=[[s for size in sizes for s in size]], b_ub=[budget], A_eq=equal, b_eq=[1.0] * len(costs)
        )
        assert lagrangian(costs, sizes, budget).bound == pytest.approx(solved.fun, abs=1e-9)


def test_what_is_not_allowed_is_not_chosen():
    for method in (knapsack, lagrangian):
        assert method([[math.inf, 2.0, 9.0]], [[1, 2, 3]], 3).levels == [1]
        assert method([torch.tensor([0.0, math.inf])], [torch.tensor([5, 1])], 5).levels == [0]
        with pytest.raises(Error, match="at most 4 in all cannot be had: the least they can come to is 5"):
            method([[0.0, math.inf]], [[5, 1]], 4)


def test_a_budget_of_nothing_leaves_room_for_nothing():
    # Sizes without a common divisor, of very different scale; and one far beyond the budget.
    for method in (knapsack, lagrangian):
        assert method([[2.0, 1.0, 0.0], [1.0, 0.0]], [[0, 1e-7, math.pi], [0, math.e * 1e-7]], 0.0).levels == [0, 0]
        far = method([[2.0, 1.0, 0.5], [1.0, 0.0]], [[0, 1e20, 1e20 * math.pi], [0, 1e-9]], 1.3e-9)
        assert far.levels == [0, 1]


def test_edges():
    for method in (knapsack, lagrangian):
        assert method([], [], 1.0) == Choice([], 0.0, 0.0, 0.0)
        assert method([[2.0]], [[0.0]], 0.0) == Choice([0], 2.0, 0.0, 2.0)
        assert method([[2.0, 1.0]], [[0.1, 0.3]], 0.1 + 0.2).levels == [1]  # equal but for rounding
        assert method([[2.0, 1.0]] * 3, [[0.0, 0.1]] * 3, 0.1 + 0.1 + 0.1).levels == [1, 1, 1]
        assert method([[1.0, 1.0]], [[3, 1]], 3).cost == 1.0
        for costs, sizes, budget, words in (
            ([[1.0]], [], 1, "sizes of as many items"),
            ([[1.0, 2.0]], [[1.0]], 1, r"item 0 has costs \[2\] and sizes \[1\]"),
            ([[math.nan]], [[1.0]], 1, "no number"),
            ([[1.0]], [[math.inf]], 1, "not finite"),
            ([[math.inf]], [[1.0]], 1, "no level of finite cost"),
            ([[1.0]], [[1.0]], math.nan, "finite number"),
        ):
            with pytest.raises(Error, match=words):
                method(costs, sizes, budget)
        with pytest.raises(Error, match="at least 7 in all cannot be had: the most they can come to is 6"):
            method([[1.0, 2.0]] * 2, [[1, 3]] * 2, 7, at_least=True)
    with pytest.raises(Error, match="at least 1 cell"):
        knapsack([[1.0]], [[1.0]], 1, cells=0)
