"""Shapley values, against the mean over all orders of joining, and estimates against exact ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.inspect.attribution import Shapley, shapley, swapped


def game(players: int, seed: int = 0):
    """Random values of all coalitions."""
    values = torch.randn(2**players, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    powers = 2 ** torch.arange(players)
    return lambda s: values[(s.long() * powers).sum(1)]


def by_orders(value, players: int) -> Tensor:
    total = torch.zeros(players, dtype=torch.float64)
    for order in itertools.permutations(range(players)):
        there = torch.zeros(1, players, dtype=torch.bool)
        before = value(there)
        for player in order:
            there[0, player] = True
            after = value(there)
            total[player] += (after - before)[0]
            before = after
    return total / math.factorial(players)


@pytest.mark.parametrize("players", [1, 2, 5])
def test_the_mean_over_all_orders(players):
    found = shapley(game(players), players, at_once=3)
    torch.testing.assert_close(found.values, by_orders(game(players), players))
    assert float(found.values.sum()) == pytest.approx(found.whole - found.empty)
    assert found.evaluations == 2**players
    assert found.errors.abs().max() == 0


def smooth(players: int):
    """A value with pairs and a bend, which is not symmetric."""
    weights = torch.linspace(-1, 2, players, dtype=torch.float64)

    def value(s: Tensor) -> Tensor:
        x = s.double()
        return torch.tanh(x @ weights) + x[:, 0] * x[:, 1] - x[:, 2] * x[:, 3] * x[:, 4]

    return value


@pytest.mark.parametrize("method", ["permutation", "kernel"])
def test_estimates_come_to_the_exact_values_within_their_errors(method):
    exact = shapley(smooth(9), 9).values
    outside, errors = [], {}
    for samples in (400, 6400):
        for seed in range(10):
            found = shapley(smooth(9), 9, method=method, samples=samples, seed=seed)
            assert float(found.values.sum()) == pytest.approx(found.whole - found.empty)
            errors.setdefault(samples, []).append(float((found.values - exact).norm()))
            outside.append(((found.values - exact).abs() > 1.96 * found.errors).double().mean())
            assert found.evaluations <= samples + 2
    assert 0.0 < float(torch.stack(outside).mean()) < 0.15
    ratio = sum(errors[400]) / sum(errors[6400])
    assert 2 < ratio < 8  # 16 times the samples: a quarter of the error


@pytest.mark.parametrize("method", ["permutation", "kernel"])
def test_sums_and_pairs_need_few_samples(method):
    """Antithetic orders, and complements, are exact for values of single players and pairs."""
    pairs = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = lambda s: ((s.double() @ pairs) * s.double()).sum(1)  # noqa: E731
    exact = (pairs + pairs.T).sum(1) / 2
    found = shapley(value, 8, method=method, samples=200)
    torch.testing.assert_close(shapley(value, 8).values, exact)
    torch.testing.assert_close(found.values, exact)
    assert found.errors.max() < 1e-10


def test_axioms():
    value = smooth(6)
    doubled = shapley(lambda s: 3 * value(s) + 5, 6)
    torch.testing.assert_close(doubled.values, 3 * shapley(value, 6).values)
    nobody = shapley(lambda s: value(s[:, :6]), 7)
    assert abs(float(nobody.values[6])) < 1e-12
    assert shapley(value, 6, method="permutation", seed=1).values.tolist() == pytest.approx(
        shapley(value, 6, method="permutation", seed=1).values.tolist(), abs=0
    )
    assert shapley(smooth(17), 17, samples=200).method == "permutation"


def test_the_report():
    found = shapley(smooth(5), ["a", "b", "c", "d", "e"], method="permutation", samples=400)
    assert isinstance(found, Shapley)
    report = found.report()
    assert report["player"] == ["a", "b", "c", "d", "e"]
    assert report["sum of shares"] == pytest.approx(report["all"] - report["none"])
    assert all(row["low"] <= row["value"] <= row["high"] for row in report.rows())


def test_tensors_as_players():
    one = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0]), "c": torch.tensor([3.0])}
    two = {"a": torch.tensor([5.0]), "b": torch.tensor([7.0]), "c": torch.tensor([9.0])}

    def evaluate(weights: ws.Weights) -> float:
        return float(weights["a"] * weights["b"] + weights["c"])

    value = swapped(one, two, {"first": "a", "rest": ["b", "c"]}, evaluate)
    coalitions = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    assert value(coalitions).tolist() == [5.0, 13.0, 16.0, 44.0]
    found = shapley(value, ["first", "rest"])
    assert found.values.tolist() == pytest.approx([(8 + 28) / 2, (11 + 31) / 2])
    partly = swapped(one, two, {"first": "a"}, evaluate)
    assert partly(torch.tensor([[True]])).tolist() == [13.0]
    with pytest.raises(Error, match="a belongs to two players: 'x' and 'y'"):
        swapped(one, two, {"x": "a", "y": "*"}, evaluate)
    with pytest.raises(Error, match="the pattern of player 'x'"):
        swapped(one, two, {"x": "z"}, evaluate)
    with pytest.raises(Error, match="same tensors"):
        swapped(one, {"a": torch.ones(1)}, {"x": "a"}, evaluate)


def test_what_it_refuses():
    with pytest.raises(Error, match="at least 1 player"):
        shapley(game(1), 0)
    with pytest.raises(Error, match="method is exact"):
        shapley(game(2), 2, method="all")  # type: ignore[arg-type]
    with pytest.raises(Error, match=r"2\^30 coalitions"):
        shapley(game(2), 30, method="exact")
    with pytest.raises(Error, match="at least 32 samples, got 20"):
        shapley(game(9), 9, method="permutation", samples=20)
    with pytest.raises(Error, match="needs 80 samples, got 40"):
        shapley(game(9), 9, method="kernel", samples=40)
    with pytest.raises(Error, match="the value of a, c is not finite"):
        shapley(lambda s: torch.where((s == torch.tensor([True, False, True])).all(1), torch.nan, 0.0), ["a", "b", "c"])
    with pytest.raises(Error, match="the value of nobody is not finite"):
        shapley(lambda s: torch.full((len(s),), torch.inf), 2)
    with pytest.raises(Error, match=r"gives \[4, 2\] for 4 coalitions"):
        shapley(lambda s: s.double(), 2)
    with pytest.raises(Error, match="at_once is at least 1, got 0"):
        shapley(game(2), 2, at_once=0)
