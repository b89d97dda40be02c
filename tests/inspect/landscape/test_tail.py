"""The non-central chi-square law: against scipy, sampled sums of squares, and what its tail must be."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.landscape._tail import Law, bessel_log, fit, log_chance, log_density

LAWS = [
    (2.0, 5.0, 0.3),
    (10.0, 0.1, 2.0),
    (300.0, 200.0, 0.01),
    (0.5, 3.0, 1.0),
    (1.0, 1e-9, 1.0),
    (4000.0, 6000.0, 1e-4),
]


def law(*values: float) -> Law:
    return Law(*(torch.tensor(value, dtype=torch.float64) for value in values))


def test_bessel_log_where_it_is_an_elementary_function():
    x = torch.tensor([0.01, 0.3, 2.0, 30.0, 3000.0], dtype=torch.float64)
    half = bessel_log(torch.tensor(0.5), x)
    expected = 0.5 * (2 / (math.pi * x)).log() + x + (-torch.expm1(-2 * x) / 2).log()  # sqrt(2 / pi x) sinh x
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-6)
    minus = bessel_log(torch.tensor(-0.5), x)
    expected = 0.5 * (2 / (math.pi * x)).log() + x + ((1 + (-2 * x).exp()) / 2).log()
    torch.testing.assert_close(minus, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("values", LAWS)
def test_density_and_chance_against_scipy(values):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    k, offset, scale = values
    middle = scale * (k + offset)
    for share in (0.3, 0.7, 1.0, 1.3, 3.0):
        x = share * middle
        theirs = stats.ncx2(k, offset, scale=scale)
        expected = theirs.logpdf(x)
        if math.isfinite(expected) and expected > -600:
            assert float(log_density(law(*values), torch.tensor(x, dtype=torch.float64))) == pytest.approx(
                expected, abs=1e-5
            )
        chance = theirs.cdf(x)
        if chance > 1e-250:
            assert float(log_chance(law(*values), x)) == pytest.approx(math.log(chance), rel=1e-6, abs=1e-8)


def test_chance_in_the_far_tail():
    # central: P(a, y) is y ** a / Gamma(a + 1) for small y
    found = float(log_chance(law(100.0, 1e-12, 1.0), 1e-8))
    assert found == pytest.approx(50 * math.log(5e-9) - math.lgamma(51), rel=1e-6)
    # and a mixture's smallest term takes over: exp(-offset / 2) times that
    shifted = float(log_chance(law(100.0, 80.0, 1.0), 1e-8))
    assert shifted == pytest.approx(found - 40, rel=1e-6)
    # nearer: half of 4000 squares sum to at most so much as often as so many events or more are counted
    events = torch.arange(2000, 8000, dtype=torch.float64)
    counted = torch.logsumexp(events * math.log(600.0) - 600 - torch.lgamma(events + 1), dim=0)
    assert float(counted) < -700
    assert float(log_chance(law(4000.0, 1e-12, 1.0), 1200.0)) == pytest.approx(float(counted), rel=1e-9)
    assert float(log_chance(law(3.0, 2.0, 1.0), 0.0)) == -math.inf
    assert float(log_chance(law(3.0, 2.0, 1.0), 1e6)) == pytest.approx(0, abs=1e-9)


def test_density_is_the_slope_of_the_chance():
    for values in LAWS:
        middle = 0.8 * values[2] * (values[0] + values[1])
        step = 1e-4 * middle / max(values[0] + values[1], 1) ** 0.5
        high, low = (float(log_chance(law(*values), middle + sign * step).exp()) for sign in (1, -1))
        density = float(log_density(law(*values), torch.tensor(middle, dtype=torch.float64)).exp())
        assert (high - low) / (2 * step) == pytest.approx(density, rel=1e-3)


def sums(count: int, freedom: int, mean: float, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(count, freedom, generator=generator, dtype=torch.float64) + mean).square().sum(dim=1)


@pytest.mark.parametrize(("freedom", "mean", "scale"), [(10, 0.8, 0.2), (3, 0.0, 1.0), (40, 3.0, 0.01)])
def test_fit_is_at_least_as_likely_as_the_truth(freedom, mean, scale):
    sample = sums(2000, freedom, mean, scale)
    found = fit(sample)
    truth = law(float(freedom), freedom * mean**2 + 1e-9, scale)
    gain = float(log_density(found, sample).sum() - log_density(truth, sample).sum())
    assert -1e-3 < gain < 15  # three numbers fitted
    assert float(found.scale * (found.freedom + found.offset)) == pytest.approx(float(sample.mean()), rel=0.01)


def test_fit_as_scipy_does():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    sample = sums(1000, 10, 0.8, 0.2, seed=1)
    k, offset, _, scale = stats.ncx2.fit(sample.numpy(), floc=0)
    ours, theirs = fit(sample), law(k, offset, scale)
    gain = float(log_density(ours, sample).sum() - log_density(theirs, sample).sum())
    assert gain > -0.01


def test_fit_with_weights_is_that_of_repeated_samples():
    sample = sums(200, 6, 0.5, 1.0)
    counts = torch.randint(0, 4, (2, 200), generator=torch.Generator().manual_seed(0))
    together = fit(sample, counts)
    for row in range(2):
        alone = fit(sample.repeat_interleave(counts[row]))
        one = Law(together.freedom[row], together.offset[row], together.scale[row])
        for x in (0.5, 3.0, 10.0):
            assert float(log_chance(one, x)) == pytest.approx(float(log_chance(alone, x)), rel=1e-3, abs=1e-4)
    with pytest.raises(Error, match="at least 8 finite losses"):
        fit(torch.ones(3))
    with pytest.raises(Error, match="above 0"):
        fit(torch.arange(10.0))


def test_a_wide_mixture_is_summed_whole():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for k, offset in ((1e6, 1e6), (1e2, 4e6)):  # thousands of terms count
        for deviations in (-6, -1, 0, 2):
            x = k + offset + deviations * (2 * (k + 2 * offset)) ** 0.5
            expected = float(stats.ncx2.logcdf(x, k, offset))
            assert float(log_chance(law(k, offset, 1.0), x)) == pytest.approx(expected, rel=1e-4)


def test_losses_that_are_alike_have_no_tail():
    with pytest.raises(Error, match="hardly differ"):
        fit(torch.ones(20))
    with pytest.raises(Error, match="at least 8 finite losses above 0, got 0"):
        fit(torch.ones(0))
