"""The penalty by a loop over values and levels; hooks that leave no trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.quantize.spiking import Fire, Neuron, potentials, pull_to_levels


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.7,), (2.0, -1.0, 0.1)])
def test_the_penalty_by_hand(levels: tuple[float, ...], power: float):
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sum(min(abs(float(x) - level) for level in levels) ** power for x in values.flatten()) / 35
    assert float(pull_to_levels(values, levels, power=power)) == pytest.approx(expected)


def test_to_spikes_it_is_the_distance_to_what_fires():
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = (values - Fire()(values)).square().mean()
    torch.testing.assert_close(pull_to_levels(values), expected)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_its_gradient(power: float):
    values = torch.tensor([0.3, 0.8, -2.0, 1.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pull_to_levels(x, power=power), (values,))
    at = torch.tensor([0.0, 1.0, 0.5], requires_grad=True)
    pull_to_levels(at, power=power).backward()
    assert at.grad is not None
    assert at.grad[:2].tolist() == [0, 0]
    assert float(at.grad[2]) > 0  # towards the earlier of two that are equally near


def test_levels_of_each_value():
    values = torch.tensor([[0.4, 0.4]])
    levels = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])
    assert float(pull_to_levels(values, levels)) == pytest.approx((0.16 + 0.01) / 2)


def test_it_draws_weights_to_a_grid():
    weight = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    grid = tuple(i / 4 for i in range(-12, 13))
    before = float(pull_to_levels(weight, grid).detach())
    optimizer = torch.optim.SGD([weight], lr=10.0)
    for _ in range(20):
        optimizer.zero_grad()
        pull_to_levels(weight, grid).backward()
        optimizer.step()
    assert float(pull_to_levels(weight, grid).detach()) < 0.01 * before


def test_dtypes_nothing_and_refusals():
    low = torch.tensor([0.3], dtype=torch.bfloat16, requires_grad=True)
    penalty = pull_to_levels(low)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert low.grad is not None
    nothing = torch.empty(0, requires_grad=True)
    assert float(pull_to_levels(nothing).detach()) == 0
    for levels in ((), (math.nan,), torch.tensor(1.0)):
        with pytest.raises(Error, match="at least one level"):
            pull_to_levels(torch.ones(1), levels)
    for power in (0.5, math.nan):
        with pytest.raises(Error, match="a power of at least 1"):
            pull_to_levels(torch.ones(1), power=power)


def test_potentials_are_what_neurons_compare():
    model = nn.Sequential(nn.Linear(3, 4), Neuron(1.0), nn.Linear(4, 2), Neuron(1.0, rectify=True))
    inputs = torch.randn(3, 5, 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model(inputs)
    with potentials(model) as found:
        output = model(inputs)
    assert torch.equal(output, plain)
    assert list(found) == ["1.fire", "3.fire"]
    assert [len(calls) for calls in found.values()] == [3, 3]
    torch.testing.assert_close(found["1.fire"][0], model[0](inputs[0]))
    sum(pull_to_levels(one) for calls in found.values() for one in calls).backward()  # type: ignore[union-attr]
    assert float(model[0].weight.grad.abs().max()) > 0
    model(inputs)
    assert len(found["1.fire"]) == 3
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_inputs_of_chosen_modules_and_none():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with potentials(model, lambda name, module: name == "1") as found:
        model(torch.ones(2, 3))
    assert list(found) == ["1"]
    with pytest.raises(Error, match="no module of the model is chosen"), potentials(model):
        pass
    alone = pytest.raises(Error, match="ReLU is called with keywords alone")
    with alone, potentials(model, lambda name, module: name == "1"):
        model[1](input=torch.ones(2))
    with pytest.raises(RuntimeError), potentials(model, lambda name, module: name == "0"):
        raise RuntimeError
    assert not any(part._forward_pre_hooks for part in model.modules())
