"""Penalties against their formulas, and what they do to weights."""

import math

import pytest
import torch
from torch import nn

from weightsmith import Error
from weightsmith.quantize import rtn
from weightsmith.quantize.training import fake, moments, span, to_points


def network(*weights: torch.Tensor) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
    for layer, weight in zip(model, weights, strict=True):
        layer.weight = nn.Parameter(weight.clone())
    return model


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).exp()


def test_moments_by_hand():
    first, second = draws(4, 5), draws(3, 4) ** 2
    wanted = []
    for weight in (first, second):
        values = weight.flatten().tolist()
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        third = sum((v - mean) ** 3 for v in values) / len(values) / variance**1.5
        fourth = sum((v - mean) ** 4 for v in values) / len(values) / variance**2
        wanted.append((fourth - 2) ** 2 + 3 * (third - 0.5) ** 2)
    found = moments(network(first, second), kurtosis=2, skewness=0.5, share=3, pattern="*")
    assert found.item() == pytest.approx(sum(wanted) / 2, rel=1e-4)


def test_normal_weights_have_a_kurtosis_of_three_and_even_ones_cost_nothing():
    normal = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    assert moments(network(normal), pattern="*").item() == pytest.approx((3 - 1.8) ** 2, rel=0.05)
    even = torch.linspace(-1, 1, 160_000).view(400, 400)
    assert moments(network(even), pattern="*").item() < 1e-3


def test_equal_weights_cost_nothing_and_give_no_nan():
    model = network(torch.full((3, 4), 2.0))
    moments(model, pattern="*").backward()
    assert torch.equal(model[0].weight.grad, torch.zeros(3, 4))
    zeros = network(torch.zeros(3, 4))
    for penalty in (span, to_points, moments):
        loss = penalty(zeros, pattern="*")
        loss.backward()
        assert loss.item() == 0
        assert zeros[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("penalty", [moments, span, lambda m, pattern: to_points(m, bits=2, pattern=pattern)])
def test_each_makes_rounding_lose_less(penalty):
    model = network(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))

    def lost() -> float:
        weight = model[0].weight.detach()
        return ((rtn(weight, bits=2).values() - weight).square().sum() / weight.square().sum()).item()

    before = lost()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        penalty(model, pattern="*").backward()
        optimizer.step()
    assert lost() < 0.8 * before


def test_the_pull_to_points_is_the_relative_error_of_rounding():
    first, second = draws(4, 6), draws(3, 4)
    model = network(first, second)
    wanted = [
        ((rtn(w, bits=3, group=2).values() - w).square().sum() / w.square().sum()).item() for w in (first, second)
    ]
    found = to_points(model, bits=3, group=2, pattern="*")
    assert found.item() == pytest.approx(sum(wanted) / 2, rel=1e-5)
    found.backward()
    apart = first - rtn(first, bits=3, group=2).values()
    torch.testing.assert_close(model[0].weight.grad, apart / first.square().sum())


def test_weights_with_a_grid_are_pulled_to_theirs():
    model = network(draws(4, 6), draws(3, 4))
    fake(model, bits=2, pattern="0.*")
    weight = model[0].parametrizations.weight.original
    both = to_points(model, bits=5, pattern="*").item()
    own = ((model[0].weight - weight).square().sum() / weight.square().sum()).item()
    rest = model[1].weight
    other = ((rtn(rest.detach(), bits=5).values() - rest).square().sum() / rest.square().sum()).item()
    assert both == pytest.approx((own + other) / 2, rel=1e-5)


def test_span_by_hand():
    weight = torch.tensor([[3.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, -1.0]])
    runs = [(3, math.sqrt(4.5)), (1, 1), (2, math.sqrt(2.5))]  # a group of zeros does not count
    found = span(network(weight), group=2, pattern="*")
    assert found.item() == pytest.approx(sum(a / b for a, b in runs) / 3, rel=1e-5)


def test_the_weights_beneath_a_quantization_count():
    weight = draws(4, 6)
    plain, quantized = network(weight), network(weight)
    fake(quantized, bits=2, pattern="*")
    assert moments(quantized).item() == pytest.approx(moments(plain, pattern="*").item())
    moments(quantized).backward()
    assert quantized[0].parametrizations.weight.original.grad.abs().sum() > 0


def test_nothing_to_be_penalised_is_an_error():
    with pytest.raises(Error, match="no weight of two axes or more"):
        moments(network(draws(2, 2)), pattern="x")


def test_a_pattern_says_which_quantized_weights_count():
    model = network(draws(4, 6), draws(3, 4) ** 2)
    fake(model, bits=2, pattern="*")
    for penalty in (moments, span, to_points):
        first, second = (penalty(model, pattern=f"{index}.*").item() for index in (0, 1))
        assert first != second
        assert penalty(model).item() == pytest.approx((first + second) / 2)
        with pytest.raises(Error, match="fits 'x'"):
            penalty(model, pattern="x")


def test_moments_do_not_depend_on_the_size_of_weights():
    found = []
    for factor in (1.0, 1e-11, 1e11):
        model = network(draws(8, 8) * factor)
        loss = moments(model, pattern="*")
        loss.backward()
        found.append((loss.item(), (model[0].weight.grad * factor).tolist()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-3)
        torch.testing.assert_close(torch.tensor(gradient), torch.tensor(found[0][1]), rtol=1e-2, atol=1e-4)


def test_the_share_is_that_of_the_authors_code():
    model = network(draws(4, 5))
    even = moments(model, share=0, pattern="*").item()
    both = moments(model, pattern="*").item()
    tilted = moments(model, share=1, pattern="*").item() - even
    assert 0.015 * both == pytest.approx(0.015 * even + tilted, rel=1e-4)


def test_rows_of_fused_experts_are_those_of_each():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(draws(2, 3, 4))

    model = Experts()
    rows = model.experts.detach().flatten(0, 1)
    wanted = (rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean()
    assert span(model, pattern="*").item() == pytest.approx(wanted.item(), rel=1e-5)
    with pytest.raises(Error, match="group must be 1 or more"):
        span(model, group=0, pattern="*")
