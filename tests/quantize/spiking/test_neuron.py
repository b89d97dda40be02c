"""The rectifier by its three formulas, neurons by a loop over moments, and their gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.spiking import Fire, Neuron, rectified


def by_hand(u: float, k: float) -> float:
    if u < 0:
        return -((1 - u) ** (1 / 3)) + 1
    if u > 1:
        return u ** (1 / 3)
    return 1 / (2 * math.tanh(k / 2)) * math.tanh(k * (u - 1 / 2)) + 1 / 2


@pytest.mark.parametrize("k", [0.5, 3.0, 12.0])
def test_the_rectifier(k: float):
    values = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.tensor([by_hand(float(u), k) for u in values], dtype=torch.float64)
    torch.testing.assert_close(rectified(values, k), expected)
    assert bool((rectified(values, k).diff() > 0).all())
    fixed = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(rectified(fixed, k), fixed)


def test_it_draws_potentials_to_their_spikes():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) + 0.5
    spikes = Fire()(values)
    drawn = rectified(values)
    assert torch.equal(Fire()(drawn), spikes)
    assert bool(((drawn - spikes).abs() <= (values - spikes).abs() + 1e-6).all())
    assert float((drawn - spikes).abs().mean()) < 0.7 * float((values - spikes).abs().mean())


def test_its_limits_are_a_line_and_a_step():
    inside = torch.linspace(0, 1, 12)
    torch.testing.assert_close(rectified(inside, 1e-3), inside, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rectified(inside, 500.0), (inside > 0.5).float(), atol=1e-5, rtol=0)


def test_its_slope():
    values = torch.tensor([-50.0, -1.0, -1e-3, 0.2, 0.5, 0.9, 1.5, 90.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rectified, (values,))
    ends = torch.tensor([0.0, 1.0, 1e30, -1e30], requires_grad=True)
    rectified(ends).sum().backward()
    assert ends.grad is not None
    assert bool(ends.grad.isfinite().all())
    assert bool((ends.grad >= 0).all())


def test_shapes_and_dtypes_of_the_rectifier():
    low = torch.tensor([[0.3, -2.0]], dtype=torch.bfloat16)
    assert torch.equal(rectified(low), rectified(low.float()).bfloat16())
    assert rectified(torch.empty(0, 3)).shape == (0, 3)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(Error, match="a steepness above 0"):
            rectified(low, bad)


def loop(inputs: Tensor, decay: float, reset: str, rectify: bool, threshold: float) -> list[list[float]]:
    """Every neuron by itself."""
    columns = []
    for neuron in range(inputs.shape[1]):
        left, spikes = 0.0, []
        for now in inputs[:, neuron].tolist():
            potential = decay * left + now
            spike = float((by_hand(potential, 3.0) if rectify else potential) > threshold)
            left = potential - spike if reset == "soft" else (1 - spike) * potential
            spikes.append(spike)
        columns.append(spikes)
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("decay", "reset", "rectify", "threshold"),
    list(itertools.product((0.0, 0.5, 1.0), ("soft", "hard"), (False, True), (0.5, 0.9))),
)
def test_neurons_moment_after_moment(decay: float, reset: Any, rectify: bool, threshold: float):
    inputs = torch.randn(9, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.3
    neuron = Neuron(decay, reset=reset, rectify=rectify, threshold=threshold)
    spikes = neuron(inputs)
    assert spikes.tolist() == loop(inputs, decay, reset, rectify, threshold)
    assert torch.equal(neuron(inputs), spikes)  # nothing is remembered
    assert 0 < float(spikes.mean()) < 1


def test_a_soft_reset_loses_nothing():
    """Without a leak what came in is what went out and what is left."""
    inputs = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    soft, hard = (Neuron(1.0, reset=reset)(inputs).sum(dim=0) for reset in ("soft", "hard"))
    assert float((soft - inputs.sum(dim=0)).abs().max()) <= 0.5 + 1e-5
    assert float((hard - inputs.sum(dim=0)).abs().max()) > 0.5


def test_the_gradient_of_a_spike_is_that_of_a_ramp():
    potential = torch.tensor([-0.1, 0.0, 0.3, 0.5, 1.0, 1.1], requires_grad=True)
    spikes = Fire()(potential)
    assert spikes.tolist() == [0, 0, 0, 0, 1, 1]
    (spikes * torch.arange(1.0, 7.0)).sum().backward()
    assert potential.grad is not None
    assert potential.grad.tolist() == [0, 2, 3, 4, 5, 0]
    late = torch.tensor([0.4, 0.6, 1.6], requires_grad=True)
    Fire(1.0)(late).sum().backward()
    assert late.grad is not None
    assert late.grad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_the_gradient_goes_through_moments(reset: Any):
    """Against the same loop with ramps for spikes: their values from the comparison, their slopes from the ramp."""
    inputs = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, other = (inputs.clone().requires_grad_() for _ in range(2))
    (Neuron(0.5, reset=reset)(one) * torch.arange(24.0).view(4, 6)).sum().backward()
    left, total = torch.zeros(6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for moment in range(4):
        potential = 0.5 * left + other[moment]
        ramp = potential.clamp(0, 1)
        spike = (potential > 0.5).double() + ramp - ramp.detach()
        left = potential - spike if reset == "soft" else potential * (1 - spike)
        total = total + (spike * torch.arange(24.0).view(4, 6)[moment]).sum()
    total.backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_refusals_and_words():
    with pytest.raises(Error, match="soft or hard, got 'no'"):
        Neuron(reset="no")  # type: ignore[arg-type]
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(Error, match="between 0 and 1"):
            Neuron(decay)
    for inputs in (torch.empty(0, 3), torch.tensor(1.0)):
        with pytest.raises(Error, match="at least one moment"):
            Neuron()(inputs)
    assert "reset='soft'" in repr(Neuron())
    assert "threshold=0.5" in repr(Neuron())
    assert list(Neuron().parameters()) == []


def test_low_precision():
    assert Neuron(rectify=True)(torch.rand(3, 2).bfloat16()).dtype == torch.bfloat16
