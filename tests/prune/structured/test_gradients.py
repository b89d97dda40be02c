"""Gradients of masks, against masks that are really there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.graph import declare
from weightsmith.prune.structured import fisher, taylor

PLACES = {"one": 2, "two": 4}  # the layers of the perceptron that read each space
MAPS = {"a": 3, "b": 5}


def slopes(model: nn.Sequential, place: int, size: int, inputs: Tensor, labels: Tensor) -> Tensor:
    """The derivative of the summed loss by a mask of ones, put on what the layer at ``place`` is given."""
    mask = torch.ones(size, requires_grad=True)
    value = inputs
    for index, layer in enumerate(model):
        if index == place:
            value = value * mask.reshape(1, -1, *[1] * (value.dim() - 2))
        value = layer(value)
    (slope,) = torch.autograd.grad(functional.cross_entropy(value, labels, reduction="sum"), mask)
    return slope


def batches(random_tensor, shape: tuple[int, ...], classes: int) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(14) % classes
    inputs = random_tensor(14, *shape)
    return [(inputs[:9], labels[:9]), (inputs[9:], labels[9:])]


@pytest.mark.parametrize("squared", [False, True])
def test_taylor_is_the_derivative_of_a_mask(mlp, random_tensor, squared):
    model, graph = mlp
    data = batches(random_tensor, (6,), 3)
    found = taylor(model, graph, data, squared=squared)
    for space, place in PLACES.items():
        each = [slopes(model, place, graph.sizes[space], x, y) / len(x) for x, y in data]
        wanted = sum((e.square() if squared else e.abs()) for e in each) / 2
        torch.testing.assert_close(found[space], wanted, rtol=1e-4, atol=1e-6)


def test_taylor_through_convolutions_and_a_flattened_map(cnn, random_tensor):
    model, graph = cnn
    data = batches(random_tensor, (1, 8, 8), 4)
    found = taylor(model, graph, data)
    for space, place in MAPS.items():
        wanted = sum(slopes(model, place, graph.sizes[space], x, y).abs() / len(x) for x, y in data) / 2
        torch.testing.assert_close(found[space], wanted, rtol=1e-4, atol=1e-6)


def test_taylor_is_what_a_small_cut_costs(mlp, random_tensor):
    """To first order: shrink what is read of a unit a little, and the loss changes by its slope."""
    model, graph = mlp
    data = batches(random_tensor, (6,), 3)[:1]
    found = taylor(model, graph, data)["two"]
    for unit in range(4):
        changed = []
        for step in (1e-3, -1e-3):
            other = copy.deepcopy(model).double()
            other[4].weight.data[:, unit] *= 1 - step
            changed.append(functional.cross_entropy(other(data[0][0].double()), data[0][1]).item())
        assert float(found[unit]) == pytest.approx(abs(changed[0] - changed[1]) / 2e-3, rel=1e-3, abs=1e-6)


def test_fisher_is_the_mean_square_over_single_examples(mlp, random_tensor):
    model, graph = mlp
    data = batches(random_tensor, (6,), 3)
    found = fisher(model, graph, data)
    for space, place in PLACES.items():
        each = [
            slopes(model, place, graph.sizes[space], x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))
        ]
        torch.testing.assert_close(found[space], torch.stack(each).square().mean(0) / 2, rtol=1e-4, atol=1e-7)


def test_tied_weights_count_where_they_read(random_tensor):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
            return self.second(self.first(x).tanh() * mask)

    torch.manual_seed(0)
    model = Tied()
    graph = declare(model, {"first.weight": "> middle, 4", "second.weight": "4, < middle"})
    x = random_tensor(3, 4)
    mask = torch.ones(4, requires_grad=True)
    (wanted,) = torch.autograd.grad(model(x, mask).square().sum(), mask)
    found = taylor(model, graph, [x], loss=lambda model, x: model(x).square().sum())["middle"]
    torch.testing.assert_close(found, wanted.abs() / 3)


def test_the_model_is_left_as_it_was(cnn, random_tensor):
    model, graph = cnn
    model.train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    taylor(model, graph, batches(random_tensor, (1, 8, 8), 4))
    fisher(model, graph, [(random_tensor(2, 1, 8, 8), torch.tensor([0, 1]))])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert model[7].weight.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_refusals(mlp):
    model, graph = mlp
    with pytest.raises(Error, match="at least one batch"):
        taylor(model, graph, [])
    with pytest.raises(Error, match="one number"):
        taylor(model, graph, [torch.ones(2, 6)], loss=lambda model, x: model(x))
    with pytest.raises(Error, match="no parameter"):
        taylor(nn.Linear(2, 2), graph, [torch.ones(2, 6)])
