"""Levels that learn under weights that stand still."""

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith import Error
from weightsmith.quantize.grids import Levels
from weightsmith.quantize.training import bits_by_gradient, coded, codes, learned_levels


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 5, bias=False)


@pytest.mark.parametrize("options", [{}, {"per_tensor": False}, {"per_tensor": False, "group": 4}])
def test_a_level_gets_the_gradients_of_the_weights_that_chose_it(options):
    model = layer()
    made = learned_levels(model, bits=2, pattern="*", **options)["weight"]
    upstream = torch.randn(5, 12)
    (model.weight * upstream).sum().backward()
    found = codes(model)["weight"].codes
    wanted = torch.zeros_like(made.levels)
    for row in range(5):
        for column in range(12):
            code = int(found[row, column])
            if made.whole:
                wanted[code] += upstream[row, column]
            else:
                wanted[row, column // 4 if "group" in options else 0, code] += upstream[row, column]
    torch.testing.assert_close(made.levels.grad, wanted)
    assert model.parametrizations.weight.original.grad is None
    assert not model.parametrizations.weight.original.requires_grad


def test_they_begin_as_the_grid_of_levels():
    model = layer()
    grid = Levels(2, per_tensor=True)
    wanted = ws.quantize.coded(model.weight.detach(), grid).values()
    learned_levels(model, bits=2, pattern="*")
    assert torch.equal(model.weight, wanted)


@pytest.mark.parametrize("fixed", [False, True])
def test_levels_learn_their_way_and_may_pass_each_other(fixed):
    model = layer()
    made = learned_levels(model, bits=2, fixed=fixed, pattern="*")["weight"]
    before = codes(model)["weight"].codes
    with torch.no_grad():
        made.levels.copy_(made.levels.flip(0))
    after = codes(model)["weight"]
    if fixed:
        assert torch.equal(after.codes, before)
        assert torch.equal(model.weight, made.levels[before.long()])
    else:
        nearest = (model.parametrizations.weight.original.unsqueeze(-1) - made.levels).abs().argmin(-1)
        assert torch.equal(model.weight, made.levels[nearest])
    assert torch.equal(ws.quantize.dequantize(coded(model))["weight"], model.weight)


def test_learning_lowers_the_loss_below_that_of_the_nearest_levels():
    torch.manual_seed(1)
    model, x = nn.Linear(12, 5, bias=False), torch.randn(200, 12) * torch.linspace(0.1, 3, 12)
    target = model(x).detach()
    made = learned_levels(model, bits=2, pattern="*")["weight"]
    optimizer = torch.optim.Adam([made.levels], lr=0.005)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


def test_widths_follow_the_gradients():
    gradients = {"a": torch.full((4,), 1.0), "b": torch.full((2, 2), 16.0), "c": torch.zeros(3)}
    found = bits_by_gradient({name: gradients[name] for name in "ab"}, mean=4)
    assert found == {"a": 2, "b": 6}
    assert bits_by_gradient({name: gradients[name] for name in "ab"}, mean=7) == {"a": 5, "b": 8}
    assert bits_by_gradient(gradients, mean=4)["c"] == 1


def test_what_cannot_be_is_refused():
    model = layer()
    with pytest.raises(Error, match="per_tensor=True has one table"):
        learned_levels(model, group=4, pattern="*")
    with pytest.raises(Error, match="do not fill"):
        learned_levels(model, group=5, per_tensor=False, pattern="*")
    assert model.weight.requires_grad


def test_a_tensor_without_gradient_takes_nothing_from_the_others():
    gradients = {"a": torch.full((4,), 1.0), "b": torch.full((2, 2), 16.0)}
    assert bits_by_gradient({**gradients, "c": torch.zeros(3)}, mean=4) == {"a": 2, "b": 6, "c": 1}
    assert bits_by_gradient({"c": torch.zeros(3)}, mean=4) == {"c": 1}
    for wrong in ({}, {"a": torch.tensor([1.0, torch.nan])}, {"a": torch.zeros(0)}):
        with pytest.raises(Error, match="bits_by_gradient needs"):
            bits_by_gradient(wrong, mean=4)
