"""Learning permutations: the closed form against brute force and real networks."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import ensemble_complexity, permutation_ensemble, relu_kernels, trained_outputs
from weightsmith.inspect.theory._permutations import all_inputs


def test_relu_kernels_against_wide_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator).double()
    inner = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    before = x @ inner.T
    hidden, active = before.relu(), (before > 0).double()
    start, training = relu_kernels(x, x)
    measured = 2 * hidden @ hidden.T / len(inner)
    torch.testing.assert_close(start, measured, rtol=0.03, atol=0.03)
    torch.testing.assert_close(
        training, measured + (x @ x.T) * (2 * active @ active.T / len(inner)), rtol=0.03, atol=0.03
    )
    assert relu_kernels(torch.zeros(1, 2), torch.ones(1, 2))[1].tolist() == [[0.0]]


def test_real_networks_have_that_mean_and_variance():
    outputs = permutation_ensemble([2, 0, 3, 1], models=400, width=512, steps=100).double()
    asked, unit = all_inputs(4), torch.eye(4)
    mean, variance = trained_outputs(unit, unit[[2, 0, 3, 1]], asked)
    error = (variance / 400).sqrt()[:, None].expand_as(mean)
    assert float(((outputs.mean(0) - mean).abs() - 4 * error - 0.02).max()) < 0
    spread = outputs.var(dim=0).mean(dim=1)
    torch.testing.assert_close(spread, variance, rtol=0.15, atol=0.01)
    ones = asked.sum(1) == 1
    assert float(variance[ones].abs().max()) < 1e-9


def test_complexity_against_all_inputs_one_by_one():
    length, chance = 5, 0.05
    unit, asked = torch.eye(length), all_inputs(length)
    mean, variance = trained_outputs(unit, unit, asked)
    free = asked.sum(1) > 1
    ratio = (mean.abs() / variance.sqrt().clamp(min=1e-12)[:, None])[free]
    row = ensemble_complexity([length], chance).rows()[0]
    for count, at_most in ((row["for all inputs"], True), (row["for all inputs"] - 1, False)):
        total = float(torch.special.ndtr(-math.sqrt(count) * ratio).sum())
        assert (total <= chance) == at_most
    worst = float(torch.special.ndtr(-math.sqrt(row["for one input"]) * ratio).sum(dim=1).max())
    assert worst <= chance
    assert row["is right"]
    assert bool(((mean > 0) == (asked > 0))[free].all())


def test_more_bits_need_more_and_refusals():
    found = ensemble_complexity([12, 4, 8])
    assert found["length"] == [4, 8, 12]
    assert sorted(found["for all inputs"]) == found["for all inputs"]
    assert found["growth for all inputs"] > 1
    assert ensemble_complexity([4])["growth for one input"] is None
    for lengths, chance in (([], 0.1), ([1], 0.1), ([4], 0.0)):
        with pytest.raises(Error, match="lengths"):
            ensemble_complexity(lengths, chance)
    with pytest.raises(Error, match="permutation"):
        permutation_ensemble([0, 0])
    with pytest.raises(Error, match="at least 1"):
        permutation_ensemble([0, 1], models=0)
