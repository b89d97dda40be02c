"""The average that always spans the same share of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.average._power_ema import LONGEST, power_ema, power_of, relative_length
from weightsmith.errors import Error


def along(moments: Tensor, sigma_rel: float) -> Tensor:
    mean = moments[0]
    for count, moment in enumerate(moments[1:], start=1):
        mean = power_ema(mean, moment, count, sigma_rel=sigma_rel)
    return mean


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2, LONGEST])
@pytest.mark.parametrize("moments", [1, 2, 30])
def test_the_weights_by_hand(moments: int, sigma_rel: float):
    """Each moment's weight is what the paper's betas leave of it."""
    gamma = power_of(sigma_rel)
    weights = [1.0]
    for t in range(2, moments + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        weights = [weight * beta for weight in weights] + [1 - beta]
    run = torch.randn(moments, 4, generator=torch.Generator().manual_seed(0))
    expected = sum(weight * moment.double() for weight, moment in zip(weights, run, strict=True))
    torch.testing.assert_close(along(run, sigma_rel), torch.as_tensor(expected).float(), rtol=1e-5, atol=1e-6)
    closed = [(i ** (gamma + 1) - (i - 1) ** (gamma + 1)) / moments ** (gamma + 1) for i in range(1, moments + 1)]
    assert weights == pytest.approx(closed, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_the_length_is_the_spread_of_the_weights_times(sigma_rel: float):
    """Measured on the times themselves, and by integrating the profile."""
    steps = 4000
    times = torch.arange(1, steps + 1, dtype=torch.float64)
    moments = torch.stack([times, times**2], dim=1)
    mean, square = along(moments, sigma_rel).tolist()
    assert math.sqrt(square - mean**2) / steps == pytest.approx(sigma_rel, rel=0.003)
    power = power_of(sigma_rel)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    profile = (power + 1) * t**power / len(t)
    spread = (profile * t**2).sum() - (profile * t).sum() ** 2
    assert float(spread) ** 0.5 == pytest.approx(sigma_rel, rel=1e-5)


def test_power_and_length_are_inverse():
    for power in (0.0, 0.5, 1.0, 6.94, 16.97, 1000.0):
        assert power_of(relative_length(power)) == pytest.approx(power, rel=1e-9, abs=1e-9)
    assert round(power_of(0.05), 2) == 16.97  # the paper's two
    assert round(power_of(0.10), 2) == 6.94


def test_the_plain_mean_is_the_longest():
    run = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(along(run, 12**-0.5), run.mean(0))
    assert relative_length(0.0) == LONGEST


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan"), float("inf")])
def test_lengths_that_no_average_has(sigma_rel: float):
    with pytest.raises(Error, match=r"above 0 and at most 0\.2887 .*; got"):
        power_of(sigma_rel)
    with pytest.raises(Error, match="sigma_rel is the length"):
        power_ema(torch.zeros(1), torch.ones(1), 1, sigma_rel=sigma_rel)


def test_along_a_run_in_bfloat16():
    """The shadow is float32: in bfloat16 a late step would change nothing."""
    average = ws.average.power_ema(sigma_rel=0.2)
    values = torch.linspace(1, 2, 400).bfloat16()
    for value in values:
        average.update({"w": value.reshape(1)})
    expected = float(along(values.double().reshape(-1, 1), 0.2))
    assert average.weights("float32")["w"].item() == pytest.approx(expected, rel=1e-5)
    assert average.weights("float32").spec("w").dtype == torch.float32
    assert average.weights().spec("w").dtype == torch.bfloat16
    assert average.weights()["w"].item() == torch.tensor(expected).bfloat16().item()


def test_moments_of_another_dtype_take_that_of_the_mean():
    found = power_ema(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16), 1)
    assert found.dtype == torch.float64
    assert power_ema(torch.zeros(2), torch.ones(2, dtype=torch.bfloat16), 1).dtype == torch.float32
