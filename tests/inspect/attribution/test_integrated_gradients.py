"""Integrated gradients, against integrals done by hand and against a sum written out point by point."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.inspect.attribution import integrated_gradients


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 3)).double()


def data(count: int = 6) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Polynomial(nn.Module):
    """``x^2 y``, whose parts on the way from (a, b) can be integrated by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] ** 2 * x[:, 1]


def test_the_integral_of_a_polynomial():
    """From 0: part of x is x int 2 (a x)(a y) da = 2/3 x^2 y, part of y 1/3 x^2 y."""
    inputs = torch.tensor([[2.0, 3.0], [-1.0, 5.0]], dtype=torch.float64)
    found = integrated_gradients(Polynomial(), inputs, steps=2)
    torch.testing.assert_close(found.values, torch.tensor([[8.0, 4.0], [10 / 3, 5 / 3]], dtype=torch.float64))
    torch.testing.assert_close(found.change, torch.tensor([12.0, 5.0], dtype=torch.float64))
    assert found.gap.abs().max() < 1e-12


@pytest.mark.parametrize("rule", ["gauss-legendre", "trapezoid", "middle", "left", "right"])
def test_a_loop_over_points(rule):
    from weightsmith.inspect.attribution._parts import quadrature

    model, inputs, labels = network().eval(), data(), torch.tensor([0, 1, 2, 0, 1, 2])
    base = data().flip(0) / 2
    expected = torch.zeros_like(inputs)
    for i in range(len(inputs)):
        for place, weight in zip(*quadrature(rule, 7), strict=True):
            point = (base[i] + place * (inputs[i] - base[i]))[None].requires_grad_()
            (slope,) = torch.autograd.grad(model(point)[0, labels[i]], point)
            expected[i] += weight * (inputs[i] - base[i]) * slope[0]
    for at_once in (4, 1000):
        found = integrated_gradients(model, inputs, target=labels, baselines=base, steps=7, rule=rule, at_once=at_once)
        torch.testing.assert_close(found.values, expected)


def test_it_is_complete_and_gradient_times_input_is_not():
    model, inputs = network(), data()
    found = integrated_gradients(model, inputs, target=1, steps=48)
    assert found.gap.abs().max() < 1e-8
    point = inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.eval()(point)[:, 1].sum(), point)
    assert ((point * slope).sum(1) - found.change).abs().max() > 0.01


def test_several_baselines_are_averaged():
    model, inputs = network(), data()
    bases = torch.randn(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    both = integrated_gradients(model, inputs, target=0, baselines=bases)
    single = [integrated_gradients(model, inputs, target=0, baselines=base) for base in bases]
    torch.testing.assert_close(both.values, torch.stack([one.values for one in single]).mean(0))
    torch.testing.assert_close(both.change, torch.stack([one.change for one in single]).mean(0))


def test_equal_functions_have_equal_parts():
    """One hidden unit doubled and its output halved: another network, the same function."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[1] *= 2
        other[0].bias[1] *= 2
        other[2].weight[:, 1] /= 2
    one, same = (integrated_gradients(net, data()).values for net in (model, other))
    torch.testing.assert_close(one, same)


class Text(nn.Module):
    """Embeds, mixes, and speaks at every position."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(input_ids).cumsum(1))))


def test_words_through_their_embedding():
    model, ids = Text(), torch.tensor([[1, 2, 3], [4, 4, 0]])
    found = integrated_gradients(model, {"input_ids": ids}, target=(2, 5), layer="embed")
    assert found.values.shape == (2, 3, 4)
    assert found.gap.abs().max() < 1e-5
    embedded = model.embed(ids).detach()

    class Rest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model.head(torch.tanh(model.mix(x.cumsum(1))))

    torch.testing.assert_close(found.values, integrated_gradients(Rest(), embedded, target=(2, 5)).values)
    assert integrated_gradients(model, ids, target=(0, 5), layer="embed").values[:, 1:].abs().max() == 0


def test_the_model_is_left_as_it_was():
    model = network().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    integrated_gradients(model, data(), target=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_is_summed_in_float32():
    model = nn.Linear(3, 1).bfloat16()
    found = integrated_gradients(model, torch.ones(2, 3).bfloat16(), steps=64)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, model.weight.detach().float().expand(2, 3), rtol=1e-2, atol=1e-3)


def test_what_it_refuses():
    model = network()
    with pytest.raises(Error, match="say with target="):
        integrated_gradients(model, data())
    with pytest.raises(Error, match="inputs are floats"):
        integrated_gradients(Text(), torch.tensor([[1, 2]]))
    with pytest.raises(Error, match="no layer 'embedd'"):
        integrated_gradients(Text(), torch.tensor([[1, 2]]), layer="embedd")
    with pytest.raises(Error, match="at least one example"):
        integrated_gradients(model, data(0), target=0)
    with pytest.raises(Error, match="do not fit inputs"):
        integrated_gradients(model, data(), target=0, baselines=torch.ones(4))
    with pytest.raises(Error, match="does not depend"):
        integrated_gradients(model, data(), target=lambda o: o[:, 0].detach() + 0 * model[0].weight.sum())
