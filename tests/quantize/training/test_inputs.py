"""Quantized inputs of layers: ranges of tokens, of tensors and over data, and taking them off again."""

import copy

import pytest
import torch
from torch import nn

from weightsmith import Error
from weightsmith.quantize.grids import Integer, Levels
from weightsmith.quantize.training import calibrating, fake, fake_inputs, without_inputs


def seen(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes with, for a layer of ones on the diagonal."""
    with torch.no_grad():
        layer.weight.copy_(torch.eye(len(layer.weight)))
        layer.bias.zero_()
    return layer(x)


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("range", ["token", "tensor"])
def test_ranges_by_hand(range, symmetric):
    layer = nn.Linear(4, 4)
    fake_inputs(layer, bits=3, symmetric=symmetric, range=range, pattern="weight")
    found = seen(layer, X)
    for i in [0, 1, 2]:
        for j in [0, 1, 2, 3, 4]:
            values = X[i, j] if range == "token" else X
            for k in [0, 1, 2, 3]:
                value = X[i, j, k].item()
                if symmetric:
                    step = values.abs().max().item() / 3.5
                    wanted = step * min(max(round(value / step), -4), 3)
                else:
                    low, high = min(values.min().item(), 0), max(values.max().item(), 0)
                    step = (high - low) / 7
                    zero = round(-low / step)
                    wanted = step * (min(max(round(value / step) + zero, 0), 7) - zero)
                assert found[i, j, k].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_gradients_pass_straight():
    layer = nn.Linear(4, 2)
    fake_inputs(layer, bits=2, pattern="weight")
    x = X.clone().requires_grad_()
    upstream = torch.randn(3, 5, 2)
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream @ layer.weight.detach())


def test_static_ranges_come_from_data_and_stay():
    layer = nn.Linear(4, 4)
    made = fake_inputs(layer, bits=2, range="static", pattern="weight")["weight"]
    with pytest.raises(Error, match="within calibrating"):
        layer(X)
    with calibrating(layer):
        assert torch.equal(seen(layer, X[:1]), X[:1])
        layer(X[2:])
    low, high = torch.cat([X[:1], X[2:]]).aminmax()
    assert (made.low, made.high) == (low, high)
    found = seen(layer, X)
    assert found.max() <= high + (high - low) / 3
    assert torch.equal(found, layer(X))
    assert len(found.unique()) <= 4
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(X), found)


def test_copies_have_their_own_and_all_can_be_taken_off():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    plain = model(X)
    made = fake_inputs(model, bits=2, range="static", pattern="*")
    with calibrating(model):
        model(X)
    other = copy.deepcopy(model)
    made["0.weight"].low.fill_(-1e6)
    assert not torch.equal(other(X), model(X))
    without_inputs(model)
    assert torch.equal(model(X), plain)
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "2"]
    assert not torch.equal(other(X), plain)


def test_it_goes_with_quantized_weights_convolutions_and_narrow_inputs():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2)).bfloat16()
    fake(model, bits=4)
    made = fake_inputs(model, bits=4)
    assert list(made) == ["0.weight", "2.weight"]
    x = torch.randn(2, 1, 3, 3, dtype=torch.bfloat16)
    model(x).sum().backward()
    assert model(x).dtype == torch.bfloat16
    assert model[0].parametrizations.weight.original.grad.isfinite().all()


def test_nothing_comes_in():
    layer = nn.Linear(4, 2)
    fake_inputs(layer, pattern="weight")
    assert layer(torch.zeros(0, 4)).shape == (0, 2)
    assert layer(torch.zeros(2, 4)).isfinite().all()


def test_what_cannot_be_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(Error, match=r"0\.weight: a convolution's inputs have no tokens"):
        fake_inputs(model, range="token")
    assert not hasattr(model[0], "input_grid")
    with pytest.raises(Error, match="range is one of"):
        fake_inputs(model, range="batch")
    with pytest.raises(Error, match="one range each"):
        fake_inputs(model, grid=Integer(4, group=2))
    fake_inputs(model, pattern="2.*")
    with pytest.raises(Error, match="quantized already"):
        fake_inputs(model)
    assert not hasattr(model[0], "input_grid")
    with pytest.raises(Error, match="no range of inputs in this module is static"), calibrating(model):
        pass


def test_inputs_by_name_are_quantized_too_and_the_others_are_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x, other=None):
            return x @ self.weight, other

    layer = Twice()
    fake_inputs(layer, bits=1, pattern="weight")
    by_place, by_name = layer(X, X), layer(x=X, other=X)
    assert torch.equal(by_place[0], by_name[0])
    assert not torch.equal(by_name[0], X)
    assert torch.equal(by_place[1], X)
    assert torch.equal(by_name[1], X)
    without_inputs(layer)
    assert torch.equal(layer(x=X)[0], X)
    assert not layer._forward_pre_hooks_with_kwargs


def test_whole_numbers_and_ranges_of_tables_are_refused():
    table = nn.Embedding(10, 4)
    fake_inputs(table, bits=2, pattern="*")
    with pytest.raises(Error, match="int64 have no points"):
        table(torch.tensor([1, 7]))
    with pytest.raises(Error, match="a static range keeps two"):
        fake_inputs(nn.Linear(4, 2), grid=Levels(3), range="static", pattern="weight")
    layer = nn.Linear(4, 2)
    fake_inputs(layer, range="static", pattern="weight")
    with calibrating(layer):
        layer(torch.full((2, 4), torch.nan))
    with pytest.raises(Error, match="not finite"):
        layer(X)
