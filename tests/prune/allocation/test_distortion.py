"""Allocations from curves: the best of all combinations, budgets met exactly, and harms that add up."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.allocation import Curves, distortion, lagrangian, measured
from weightsmith.prune.allocation._parts import met


def curves(seed: int, convex: bool = False) -> Curves:
    chance = random.Random(seed)
    levels = (0.0, 0.25, 0.5, 0.75, 1.0)
    harms = {}
    for name in "abc":
        steps = [chance.random() for _ in levels[1:]]
        harms[name] = torch.tensor([0.0, *itertools.accumulate(sorted(steps) if convex else steps)]).double()
    return Curves(levels, harms, {"a": 40, "b": 80, "c": 120})


def removed(found: Curves, shares: dict[str, float]) -> float:
    return sum(found.sizes[name] * share for name, share in shares.items()) / sum(found.sizes.values())


def best(found: Curves, sparsity: float) -> float:
    """The least harm of any combination of levels that removes as much."""
    combinations = itertools.product(found.levels, repeat=len(found.harms))
    shares = [dict(zip(found.harms, combination, strict=True)) for combination in combinations]
    return min(found.at(one) for one in shares if removed(found, one) >= sparsity - 1e-12)


@pytest.mark.parametrize("convex", [False, True])
def test_budgets_are_met_exactly_and_nothing_on_the_levels_is_better(convex):
    for seed in range(10):
        found = curves(seed, convex)
        for sparsity in (0.0, 0.3, 0.5, 0.81, 1.0):
            least = best(found, sparsity)
            for method in (distortion, lagrangian):
                shares = method(found, sparsity)
                assert removed(found, shares) == pytest.approx(sparsity, abs=1e-12)
                assert all(0 <= share <= 1 for share in shares.values())
                assert found.at(shares) <= least + 1e-12 or (method is lagrangian and not convex)


def test_on_convex_curves_one_multiplier_solves_the_linear_program():
    from scipy.optimize import linprog

    for seed in range(10):
        found, width = curves(seed, convex=True), 0.25
        slopes = [float(harm[k + 1] - harm[k]) / width for harm in found.harms.values() for k in range(4)]
        sizes = [size for size in found.sizes.values() for _ in range(4)]
        for sparsity in (0.2, 0.55, 0.9):
            solved = linprog(slopes, A_eq=[sizes], b_eq=[240 * sparsity], bounds=(0, width))
            assert found.at(lagrangian(found, sparsity)) == pytest.approx(solved.fun)


def test_what_a_level_removes_too_much_is_given_back_where_it_spares_most():
    found = Curves(
        (0.0, 0.5, 1.0),
        {"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.tensor([0.0, 4.0, 99.0])},
        {"a": 10, "b": 10},
    )
    assert distortion(found, 0.6) == pytest.approx({"a": 1.0, "b": 0.2})  # levels: 1.0 and 0.5
    assert lagrangian(found, 0.6) == pytest.approx({"a": 1.0, "b": 0.2})
    # Harm that falls on the way up: more than a level is to be given back.
    odd = Curves((0.0, 0.5, 1.0), {"a": torch.tensor([0.0, -1.0, -2.0])}, {"a": 10})
    assert distortion(odd, 0.3) == pytest.approx({"a": 0.3})


def test_harms_that_fall_and_nothing_to_remove():
    for seed in range(40):  # what is given back are shares that are no round numbers
        chance = random.Random(seed)
        levels = (0.0, *sorted(chance.random() for _ in range(3)))
        harms = {name: torch.tensor([0.0] + [-chance.random() for _ in levels[1:]]).double() for name in "abc"}
        found = Curves(levels, harms, {name: chance.randint(1, 1000) for name in "abc"})
        for method in (distortion, lagrangian):
            assert method(found, 0.0) == pytest.approx(dict.fromkeys("abc", 0.0))
            assert removed(found, method(found, levels[1] / 2)) == pytest.approx(levels[1] / 2)


def test_sizes_that_share_no_divisor():
    for seed in range(5):
        chance = random.Random(seed)
        base = curves(seed)
        found = Curves(
            base.levels, base.harms, {"a": 10007, "b": 997 * chance.randint(1, 9), "c": chance.randint(1, 5)}
        )
        for sparsity in (0.123, 0.5, 0.987):
            shares = distortion(found, sparsity)
            assert removed(found, shares) == pytest.approx(sparsity, abs=1e-12)
            assert found.at(shares) <= best(found, sparsity) + 1e-9


def test_one_tensor_and_one_of_no_elements():
    alone = Curves((0.0, 0.5, 1.0), {"a": torch.tensor([0.0, 1.0, 3.0])}, {"a": 10})
    empty = Curves(alone.levels, dict(alone.harms) | {"e": torch.zeros(3)}, {"a": 10, "e": 0})
    for method in (distortion, lagrangian):
        assert method(alone, 0.7) == pytest.approx({"a": 0.7})
        assert method(empty, 0.7)["a"] == pytest.approx(0.7)
        assert method(Curves(alone.levels, alone.harms, {"a": 0}), 0.7).keys() == {"a"}


def test_costs_by_tensor():
    found = curves(3)
    prices = {"a": 5.0, "b": 1.0, "c": 0.5}
    for method in (distortion, lagrangian):
        shares = method(found, 0.5, cost=prices)
        total = sum(found.sizes[n] * prices[n] for n in prices)
        assert sum(found.sizes[n] * prices[n] * shares[n] for n in prices) == pytest.approx(0.5 * total)
        assert shares != method(found, 0.5)
        assert method(found, 0.5, cost=7.0) == pytest.approx(method(found, 0.5))


def test_refusals():
    found = Curves((0.0, 0.5), {"a": torch.zeros(2)}, {"a": 4})
    for method in (distortion, lagrangian):
        with pytest.raises(Error, match=r"0.6 is beyond the last level of the curves, 0.5"):
            method(found, 0.6)
        with pytest.raises(Error, match="cost of an element of a is a number above 0, got 0"):
            method(found, 0.5, cost=0.0)
        with pytest.raises(Error, match="one sparsity between 0 and 1"):
            method(found, -1)
        with pytest.raises(Error, match=f"{method.__name__}: the harms of b are not all finite"):
            method(Curves((0.0, 0.5), {"a": torch.zeros(2), "b": torch.tensor([0.0, float("nan")])}, {"a": 4, "b": 4}))
        with pytest.raises(Error, match=r"the harms of a are \[3\]; there are 2 levels"):
            method(Curves((0.0, 0.5), {"a": torch.zeros(3)}, {"a": 4}))


def test_harms_of_single_layers_add_up_and_the_best_allocation_does_less():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(100):
            part = torch.randint(1200, (64,))
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    calibration, held_out = images[:200], images[1200:]
    found = measured(model, [calibration])

    def true(shares: dict[str, float], inputs: torch.Tensor) -> float:
        other = ws.prune.magnitude(model, shares, pattern="*.weight").to_dict()
        with torch.no_grad():
            return float((torch.func.functional_call(model, other, (inputs,)) - model(inputs)).square().mean())

    chance = random.Random(0)
    predicted, real = [], []
    for _ in range(30):
        shares = {name: chance.random() * 0.7 for name in found.harms}
        predicted.append(found.at(shares))
        real.append(true(shares, calibration))
    assert torch.corrcoef(torch.tensor([predicted, real]))[0, 1] > 0.9
    others = [met({n: chance.random() for n in found.sizes}, found.sizes, 0.7) for _ in range(9)]
    harms = sorted(true(shares, held_out) for shares in others)
    assert true(distortion(found, 0.7), held_out) < harms[2]
