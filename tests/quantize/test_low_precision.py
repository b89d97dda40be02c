"""Products of quantized factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import low_precision
from weightsmith.quantize.grids import Float, Microscaling, quantized


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lead", [(7,), (2, 5), ()])
def test_forwards_and_backwards_by_hand(lead: tuple[int, ...]):
    forwards, backwards = Microscaling("e2m3", 4), Float("e2m1", 3)
    x, weight, bias = normal(*lead, 10).requires_grad_(), normal(6, 10, seed=1).requires_grad_(), torch.zeros(6)
    bias.requires_grad_()
    with low_precision(forwards, gradients=backwards):
        y = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(y, quantized(x, forwards) @ quantized(weight, forwards).t() + bias)
    given = normal(*lead, 6, seed=2)
    y.backward(given)
    rows, inputs = given.reshape(-1, 6), x.detach().reshape(-1, 10)
    torch.testing.assert_close(x.grad, quantized(given, backwards) @ quantized(weight, forwards, axis=0))
    torch.testing.assert_close(
        weight.grad, quantized(rows, backwards, axis=0).t() @ quantized(inputs, forwards, axis=0)
    )
    torch.testing.assert_close(bias.grad, rows.sum(0))


def test_a_fine_grid_is_the_plain_product():
    layer, x = nn.Linear(32, 8).double(), normal(5, 32).double()
    with low_precision(Microscaling("int8", 1)):
        found = layer(x)
    torch.testing.assert_close(found, layer(x), rtol=0.02, atol=0.02)


def test_only_within_and_without_a_trace():
    layer, x = nn.Linear(32, 8), normal(5, 32)
    before, state = layer(x), copy.deepcopy(layer.state_dict())
    with low_precision("mxfp4"):
        assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_some_weights_alone():
    first, second, x = nn.Linear(32, 32), nn.Linear(32, 8), normal(5, 32)
    with low_precision("mxfp4", weights=[second.weight]):
        found = second(first(x))
    inner = first(x)
    torch.testing.assert_close(found, quantized(inner, "mxfp4") @ quantized(second.weight, "mxfp4").t() + second.bias)


def test_frozen_weights_and_no_gradients():
    layer, x = nn.Linear(32, 8), normal(5, 32)
    layer.requires_grad_(False)
    with low_precision():
        layer(x.requires_grad_()).sum().backward()
        with torch.no_grad():
            assert layer(x).shape == (5, 8)
    assert x.grad is not None
    assert layer.weight.grad is None


def test_half_precision_and_other_modes():
    layer, x = nn.Linear(32, 8).bfloat16(), normal(5, 32).bfloat16()
    with low_precision("mxfp8"):
        assert layer(x).dtype == torch.bfloat16
        assert torch.allclose(nn.functional.relu(x), x.clamp(min=0))


def test_autocast_chooses_the_dtype():
    layer, x = nn.Linear(32, 8), normal(5, 32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with low_precision("mxfp8"):
            found = layer(x)
            again = layer(x.bfloat16())
        assert found.dtype == again.dtype == layer(x).dtype == torch.bfloat16
        assert torch.equal(found, again)
    half = quantized(x.bfloat16(), "mxfp8") @ quantized(layer.weight.bfloat16(), "mxfp8").t() + layer.bias.bfloat16()
    assert torch.equal(found, half)
    found.float().square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_gradients_of_gradients_are_refused():
    layer, x = nn.Linear(32, 8), normal(5, 32).requires_grad_()
    with low_precision():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_no_rows_and_words_for_arguments():
    layer = nn.Linear(32, 8)
    x = torch.zeros(0, 32, requires_grad=True)
    with low_precision():
        nn.functional.linear(weight=layer.weight, input=x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 32)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_attention_that_computes_its_own_products_stays_as_it_is():
    attention, x = nn.MultiheadAttention(32, 4, batch_first=True), normal(2, 5, 32)
    with low_precision("mxfp4"):
        found = attention(x, x, x)[0]
    assert torch.equal(found, attention(x, x, x)[0])


def test_a_network_learns_with_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    x = normal(256, 16)
    labels = (x[:, :4] + x[:, 4:8]).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    for _ in range(25):
        with low_precision(Microscaling("e3m2")):
            loss = nn.functional.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6


def test_refusals():
    with pytest.raises(Error, match="no grid"), low_precision("mxfp5"):
        pass
    with pytest.raises(Error, match="not finite"), ws.quantize.low_precision("mxfp8"):
        nn.Linear(2, 2)(torch.tensor([[1.0, float("nan")]]))
