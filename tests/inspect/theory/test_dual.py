"""Duals and deep kernels: against closed forms and real networks."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import deep_kernels, dual
from weightsmith.inspect.theory._parts import ACTIVATIONS, correlated

XI = torch.linspace(-1, 1, 401, dtype=torch.float64)


def test_dual_of_relu_erf_and_hermite():
    angle = torch.arccos(XI)
    relu = dual("relu")
    torch.testing.assert_close(relu.value(XI), (angle.sin() + (math.pi - angle) * XI) / math.pi, atol=1e-10, rtol=0)
    torch.testing.assert_close(relu.slope(XI), (math.pi - angle) / math.pi, atol=1e-10, rtol=0)
    erf = dual("erf")
    torch.testing.assert_close(erf.value(XI), torch.arcsin(2 * XI / 3) / math.asin(2 / 3), atol=1e-10, rtol=0)
    cubic = dual(lambda x: x**3 - 3 * x)
    torch.testing.assert_close(cubic.value(XI), XI**3, atol=1e-10, rtol=0)
    torch.testing.assert_close(cubic.slope(XI), 3 * XI**2, atol=1e-9, rtol=0)


def test_scale_of_the_activation_does_not_matter():
    one, other = dual("tanh"), dual(lambda x: -7 * torch.tanh(x))
    assert one.slope_at_one == pytest.approx(other.slope_at_one)
    torch.testing.assert_close(one.value(XI), other.value(XI))


def test_vanishing_correlations_keep_their_ratio():
    tiny = torch.tensor([1e-200, 2e-200], dtype=torch.float64)
    known = dual("tanh")
    found = known.value(tiny)
    assert float(found[0] / tiny[0]) == pytest.approx(known.slope_at_zero, rel=1e-10)
    assert float(found[1] / found[0]) == pytest.approx(2)


def test_deep_kernels_against_a_loop_and_a_wide_network():
    start, training = deep_kernels("relu", XI, 3)
    xi, tangent = XI, XI
    for _ in range(3):
        angle = torch.arccos(xi.clamp(-1, 1))
        tangent = (angle.sin() + (math.pi - angle) * xi) / math.pi + tangent * (math.pi - angle) / math.pi
        xi = (angle.sin() + (math.pi - angle) * xi) / math.pi
    torch.testing.assert_close(start, xi, atol=1e-8, rtol=0)
    torch.testing.assert_close(training, tangent, atol=1e-7, rtol=0)
    # The gradients of one wide network: f = v' relu(U x) sqrt(2 / m), in both layers.
    generator = torch.Generator().manual_seed(0)
    width = 40_000
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    inner, outer = torch.randn(width, 2, generator=generator), torch.randn(width, generator=generator)
    before = x @ inner.T
    hidden = before.relu()
    slopes = (before > 0).float() * outer
    measured = 2 / width * (hidden[0] @ hidden[1] + (x[0] @ x[1]) * (slopes[0] @ slopes[1]))
    assert float(measured) == pytest.approx(float(deep_kernels("relu", torch.tensor([0.6]), 1)[1]), rel=0.04)


def test_refusals():
    with pytest.raises(Error, match="mean square"):
        dual(torch.zeros_like)
    with pytest.raises(Error, match="depth"):
        deep_kernels("relu", XI, -1)


def test_table_and_power_series_against_the_averages():
    for name in ("tanh", "gelu", "relu"):
        known = dual(name)
        value, slope = correlated(lambda x, name=name, known=known: known.scale * ACTIVATIONS[name](x), XI)
        torch.testing.assert_close(known.value(XI), value, atol=1e-11, rtol=0)
        torch.testing.assert_close(known.slope(XI), slope, atol=1e-10, rtol=0)
    found = known.both(torch.tensor([[0.3, torch.nan]]))
    assert found[0].shape == (1, 2)
    assert torch.isnan(found[0]).tolist() == torch.isnan(found[1]).tolist() == [[False, True]]
    assert known.value(torch.tensor([])).tolist() == []
