"""Inductive bias: hypothesis spaces whose chances are known."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.landscape import inductive_bias
from weightsmith.inspect.landscape._bias import _fits_again
from weightsmith.inspect.landscape._tail import fit, log_chance


def central(freedom: int, x: float) -> float:
    """Minus the logarithm of the chance that so many squares of Gaussians sum to at most x."""
    a, y = freedom / 2, x / 2
    term = total = 1.0
    for step in range(1, 200):
        term *= y / (a + step)
        total += term
    return -(a * math.log(y) - y - math.lgamma(a + 1) + math.log(total))


def test_a_linear_gaussian_space_is_within_ten_per_cent():
    # y = w' x, weights Gaussian, orthonormal inputs, truth 0: the squared error is a sum of squares
    for freedom, eps in ((10, 0.1), (20, 1.0)):
        generator = torch.Generator().manual_seed(freedom)
        found = inductive_bias(
            lambda seed, g=generator, f=freedom: torch.randn(f, generator=g, dtype=torch.float64),
            lambda w: float(w.square().sum()),
            eps,
            samples=1000,
        )
        assert found["nats"] == pytest.approx(central(freedom, eps), rel=0.1)
        assert found["low"] <= found["nats"] <= found["high"]
        assert found["bits"] == pytest.approx(found["nats"] / math.log(2))
        assert found["reached"] == 0
        assert found["samples"] == 1000
        assert not found.notes


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    truth, inside = central(8, 0.5), 0
    for seed in range(6):
        sample = torch.randn(200, 8, generator=torch.Generator().manual_seed(seed)).square().sum(dim=1)
        found = inductive_bias(sample, eps=0.5, bootstrap=40, seed=seed)
        inside += found["low"] <= truth <= found["high"]
    assert inside >= 5


def test_a_share_that_is_reached_is_found():
    sample = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)).square().sum(dim=1)
    eps = float(sample.quantile(0.05))
    found = inductive_bias(sample, eps=eps, bootstrap=0)
    assert found["reached"] == pytest.approx(0.05, abs=0.001)
    assert found["nats"] == pytest.approx(-math.log(0.05), rel=0.05)
    assert "low" not in found.figures
    assert found.plots[0].lines[2].x == [eps, eps]


def test_more_is_needed_for_less_error_and_more_dimensions():
    def nats(freedom: int, eps: float) -> float:
        sample = torch.randn(1000, freedom, generator=torch.Generator().manual_seed(1)).square().sum(dim=1)
        return inductive_bias(sample, eps=eps, bootstrap=0)["nats"]

    assert nats(10, 0.1) > nats(10, 1.0) > nats(10, 5.0)
    assert nats(20, 1.0) > nats(10, 1.0)


def test_the_sampler_gets_seeds_and_a_bad_fit_is_said():
    seen = []
    inductive_bias(lambda seed: seen.append(seed) or 1.0 + seed, eps=0.5, samples=9, bootstrap=0, seed=2)
    assert seen == list(range(18, 27))
    two = torch.cat([torch.full((500,), 1.0), torch.full((500,), 9.0)]) + torch.rand(1000) / 100
    found = inductive_bias(two, eps=0.5, bootstrap=0)
    assert found["misfit"] > 0.1
    assert "do not follow" in found.notes[0]


def test_what_is_refused():
    with pytest.raises(Error, match="eps is the loss"):
        inductive_bias([1.0] * 10)
    with pytest.raises(Error, match="2 of 10 losses"):
        inductive_bias([1.0] * 8 + [0.0, math.nan], eps=1.0)
    with pytest.raises(Error, match="samples is at least 8"):
        inductive_bias(lambda seed: 1.0, eps=1.0, samples=3)
    with pytest.raises(Error, match="confidence"):
        inductive_bias([1.0] * 10, eps=1.0, confidence=1.5)


def test_the_interval_is_of_quantiles_of_fits_to_samples_of_the_sample():
    sample = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)).square().sum(dim=1).double()
    found = inductive_bias(sample, eps=0.5, bootstrap=30, confidence=0.8, seed=4)
    ordered = sample.sort().values
    others = -log_chance(_fits_again(ordered, fit(ordered), 30, 4), 0.5)
    expected = torch.quantile(others, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    assert [found["low"], found["high"]] == pytest.approx(expected, rel=1e-6)
