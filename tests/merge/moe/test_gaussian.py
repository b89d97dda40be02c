"""Mixtures of linear experts: densities by hand, and a fit that finds what was planted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.merge.moe import Mixture, expected, fit, log_likelihood
from weightsmith.merge.moe._gaussian import RIDGE, least_squares, softmax_regression, with_one


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(count: int, seed: int = 0) -> tuple[Mixture, Tensor, Tensor]:
    mixture = Mixture(
        torch.tensor([[2.0, 0.0], [-2.0, 0.0]]).double(),
        torch.tensor([[2.0, 1.0], [-1.0, -2.0]]).double(),
        torch.tensor([0.05, 0.2]).double(),
    )
    features = random(count, 1, seed=seed)
    gate = (with_one(features) @ mixture.gates.T).softmax(1)
    chosen = torch.multinomial(gate, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    means = (with_one(features) @ mixture.experts.T).gather(1, chosen[:, None]).squeeze(1)
    return mixture, features, means + mixture.variances[chosen].sqrt() * random(count, seed=seed + 1)


def test_expectation_and_density_by_hand():
    mixture = Mixture(random(3, 3), random(3, 3, seed=1), random(3, seed=2).square() + 0.1)
    features, targets = random(5, 2, seed=3), random(5, seed=4)
    means, heights = expected(mixture, features), log_likelihood(mixture, features, targets)
    for n, x in enumerate(with_one(features)):
        scores = [math.exp(float(gate @ x)) for gate in mixture.gates]
        shares = [score / sum(scores) for score in scores]
        centres = [float(expert @ x) for expert in mixture.experts]
        assert float(means[n]) == pytest.approx(sum(s * c for s, c in zip(shares, centres, strict=True)))
        density = sum(
            s * math.exp(-((float(targets[n]) - c) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
            for s, c, v in zip(shares, centres, mixture.variances.tolist(), strict=True)
        )
        assert float(heights[n]) == pytest.approx(math.log(density))


def test_several_mixtures_side_by_side():
    many = Mixture(random(4, 3, 3), random(4, 3, 3, seed=1), random(4, 3, seed=2).square() + 0.1)
    features, targets = random(5, 2, seed=3), random(5, seed=4)
    for number in range(4):
        one = Mixture(*(part[number] for part in many))
        torch.testing.assert_close(expected(many, features)[number], expected(one, features))
        found = log_likelihood(many, features, targets)[number]
        torch.testing.assert_close(found, log_likelihood(one, features, targets))


def test_a_fit_finds_what_was_planted():
    mixture, features, targets = planted(2000)
    found = fit(features, targets, 2)
    order = found.experts[:, 1].argsort(descending=True)
    torch.testing.assert_close(found.experts[order], mixture.experts, atol=0.08, rtol=0)
    torch.testing.assert_close(found.variances[order], mixture.variances, atol=0.03, rtol=0)
    gap = found.gates[order][0] - found.gates[order][1]
    torch.testing.assert_close(gap, torch.tensor([4.0, 0.0]).double(), atol=0.5, rtol=0)
    likelihoods = [float(log_likelihood(one, features, targets).mean()) for one in (found, mixture)]
    assert likelihoods[0] >= likelihoods[1]  # the planted one is not the likeliest


def test_one_expert_is_linear_regression():
    features, targets = random(50, 3), random(50, seed=1)
    found = fit(features, targets, 1)
    solution = torch.linalg.lstsq(with_one(features), targets[:, None]).solution.squeeze(1)
    torch.testing.assert_close(found.experts[0], solution)
    torch.testing.assert_close(found.variances[0], (targets - with_one(features) @ solution).square().mean())
    assert torch.equal(found.gates, torch.zeros(1, 4, dtype=torch.float64))


def test_more_starts_are_never_less_likely():
    _, features, targets = planted(150, seed=5)
    found = [float(log_likelihood(fit(features, targets, 3, starts=s), features, targets).sum()) for s in (1, 3, 6)]
    assert found[0] <= found[1] <= found[2]


def test_least_squares_is_weighted():
    rows, weight, goals = with_one(random(30, 2)), random(30, 2, seed=1).square(), random(30, 2, seed=2)
    found = least_squares(rows, weight, weight * goals)
    for k in range(2):
        scaled = weight[:, k].sqrt()[:, None]
        solution = torch.linalg.lstsq(rows * scaled, goals[:, k : k + 1] * scaled).solution.squeeze(1)
        torch.testing.assert_close(found[k], solution)


def test_gates_sum_to_zero_wherever_they_start():
    rows, shares = with_one(random(40, 2)), random(40, 3, seed=1).softmax(1)
    found = [softmax_regression(rows, shares, start) for start in (None, 3 + random(3, 3, seed=2))]
    for gates in found:
        torch.testing.assert_close(gates.sum(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_gates_of_separable_data_stay_finite():
    rows = with_one(torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]))
    shares = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
    gates = softmax_regression(rows, shares)
    assert gates.isfinite().all()
    slope = ((rows @ gates.T).softmax(1) - shares).T @ rows + RIDGE * len(rows) * gates
    assert float(slope.abs().max()) < 1e-9
    torch.testing.assert_close((rows @ gates.T).softmax(1), shares, atol=0.01, rtol=0)


def test_refusals():
    with pytest.raises(Error, match=r"fit needs features \[n, d\], targets \[n\] and n >= 3"):
        fit(random(2, 1), random(2), 3)
    with pytest.raises(Error, match="targets"):
        fit(random(4, 1), random(5), 1)
    with pytest.raises(Error, match=r"features are \[n, d\], got \[4\]"):
        expected(Mixture(random(1, 2), random(1, 2), torch.ones(1)), random(4))
