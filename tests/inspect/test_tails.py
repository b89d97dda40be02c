"""The fit of a power law against one written as loops, and the edge of noise against noise."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import _tails, noise_edge, power_law
from weightsmith.inspect._tails import marchenko_pastur_median


def by_hand(values):
    """Clauset, Shalizi and Newman, candidate by candidate."""
    values = sorted(value for value in values if value > 0)
    best = None
    for least in sorted(set(values))[:-1]:
        tail = [value for value in values if value >= least]
        alpha = 1 + len(tail) / sum(math.log(value / least) for value in tail)
        distance = max(abs(1 - (x / least) ** (1 - alpha) - i / len(tail)) for i, x in enumerate(tail))
        if best is None or distance < best[3]:
            best = (alpha, least, len(tail), distance)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_law_is_the_one_found_by_hand(seed, monkeypatch):
    monkeypatch.setattr(_tails, "_BLOCK", 100)  # several blocks
    values = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs() + 0.01
    found = power_law(values)
    assert (found.exponent, found.least, found.count, found.distance) == pytest.approx(by_hand(values.tolist()))


def test_ties_zeros_and_too_little():
    found = power_law(torch.tensor([0.0, -1.0, 1.0, 1.0, 2.0, 2.0, 4.0]))
    expected = by_hand([1.0, 1.0, 2.0, 2.0, 4.0])
    assert (found.exponent, found.least, found.count, found.distance) == pytest.approx(expected)
    assert power_law(torch.ones(5)) is None
    assert power_law(torch.tensor([3.0])) is None
    assert power_law(torch.zeros(0)) is None


@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_a_true_law_is_found_behind_a_body(exponent):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1500, generator=generator, dtype=torch.float64)
    tail = (1 - uniform) ** (-1 / (exponent - 1))
    body = torch.rand(800, generator=generator, dtype=torch.float64)
    found = power_law(torch.cat([tail, body]))
    assert found.exponent == pytest.approx(exponent, rel=0.1)
    assert 0.9 < found.least < 2


@pytest.mark.parametrize("shape", [(200, 200), (60, 300), (300, 60)])
def test_noise_has_hardly_a_spike_and_a_planted_one_is_seen(shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    values = torch.linalg.svdvals(noise)
    found = noise_edge(values, *shape)
    assert found.noise == pytest.approx(0.3, rel=0.03)
    assert found.edge == pytest.approx(float(values[0]), rel=0.05)
    assert found.spikes <= 1
    left, right = torch.ones(shape[0]) / shape[0] ** 0.5, torch.ones(shape[1]) / shape[1] ** 0.5
    planted = torch.linalg.svdvals(noise + 3 * found.edge * torch.outer(left, right))
    assert noise_edge(planted, *shape).spikes - found.spikes in (0, 1)
    assert noise_edge(planted, *shape).spikes >= 1


def test_the_median_of_noise():
    for ratio in (0.1, 0.5, 1.0):
        rows = 400
        noise = torch.randn(rows, int(rows / ratio), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        measured = float((torch.linalg.svdvals(noise).square() / noise.shape[1]).median())
        assert marchenko_pastur_median(ratio) == pytest.approx(measured, rel=0.02)


def test_a_wrong_number_of_values_is_refused():
    with pytest.raises(Error, match="has 3 singular values, got 4"):
        noise_edge(torch.ones(4), 3, 5)
