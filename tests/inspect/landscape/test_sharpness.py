"""Sharpness by hand, and the measures that forgive scaling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.landscape import relative_flatness, sharpness


def network(factor: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        net[0].weight *= factor
        net[2].weight /= factor
    return net


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    return [(x[:12], y[:12]), (x[12:], y[12:])]


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*batches(), strict=True)
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_by_hand(adaptive: bool):
    net, (x, y) = network(), whole()
    before = copy.deepcopy(net.state_dict())
    found = sharpness(net, None, batches(), radius=0.3, adaptive=adaptive)
    loss = functional.cross_entropy(net(x), y)
    slopes = torch.autograd.grad(loss, list(net.parameters()))
    sizes = [p.detach().abs() if adaptive else torch.ones_like(p) for p in net.parameters()]
    norm = sum(float((g * s).square().sum()) for g, s in zip(slopes, sizes, strict=True)) ** 0.5
    moved = {
        name: p + 0.3 * s * s * g / norm for (name, p), s, g in zip(net.named_parameters(), sizes, slopes, strict=True)
    }
    after = functional.cross_entropy(torch.func.functional_call(net, moved, x), y)
    assert found["sharpness"] == pytest.approx(float((after - loss).detach()))
    assert found["gradient norm"] == pytest.approx(norm)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_more_ascents_find_more_and_a_flat_loss_has_none():
    net = network()
    net[0].weight.requires_grad_(False)
    once, often = (sharpness(net, None, batches(), radius=0.5, ascents=n)["sharpness"] for n in (1, 20))
    assert often > once > 0
    norms = [sharpness(net, None, batches(), radius=0.5, ascents=n)["gradient norm"] for n in (1, 3)]
    assert norms[0] == norms[1]  # that of where the model is
    assert not net[0].weight.requires_grad
    assert sharpness(net, lambda m: m[0].weight.sum() * 0)["sharpness"] == 0
    with pytest.raises(Error, match="radius"):
        sharpness(net, None, batches(), radius=-1)


def test_scaling_is_forgiven_where_it_should_be():
    plain = [sharpness(network(f), None, batches(), radius=0.1)["sharpness"] for f in (1.0, 4.0)]
    adaptive = [sharpness(network(f), None, batches(), radius=0.1, adaptive=True)["sharpness"] for f in (1.0, 4.0)]
    flatness = [relative_flatness(network(f), "2.weight", None, batches())["relative flatness"] for f in (1.0, 4.0)]
    assert plain[1] > 1.5 * plain[0]
    assert adaptive[1] == pytest.approx(adaptive[0])
    assert flatness[1] == pytest.approx(flatness[0])


def test_relative_flatness_by_a_loop():
    net, (x, y) = network(), whole()
    weight = net[2].weight.detach()

    def loss(given: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(torch.func.functional_call(net, {"2.weight": given}, x), y)

    hessian = torch.func.hessian(loss)(weight)
    expected = sum(
        float(weight[s] @ weight[t]) * sum(float(hessian[s, i, t, i]) for i in range(4))
        for s in range(3)
        for t in range(3)
    )
    found = relative_flatness(net, "2.weight", None, batches(), probes=1000)
    assert abs(found["relative flatness"] - expected) < 4 * found["standard error"]
    assert found["standard error"] < 0.2 * abs(expected)
    with pytest.raises(Error, match=r"is not a parameter.*did you mean '2.weight'"):
        relative_flatness(net, "1.weight", None, batches())
    with pytest.raises(Error, match="of a matrix"):
        relative_flatness(nn.Linear(1, 2).double(), "bias", lambda m: m.bias.square().sum())


def test_adaptive_ascents_stay_in_the_ball_of_the_weights_they_started_from():
    net, (x, y) = network(), whole()
    found = sharpness(net, None, batches(), radius=0.5, adaptive=True, ascents=3)
    start = {name: p.detach() for name, p in net.named_parameters()}
    place = dict(start)
    for _ in range(3):
        given = {name: value.clone().requires_grad_() for name, value in place.items()}
        loss = functional.cross_entropy(torch.func.functional_call(net, given, x), y)
        slopes = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
        norm = sum(float((slopes[n] * start[n]).square().sum()) for n in slopes) ** 0.5
        place = {n: place[n] + 0.5 / 3 * start[n].square() * slopes[n] / norm for n in place}
    far = sum(float(((place[n] - start[n]) / start[n]).square().sum()) for n in place) ** 0.5
    assert far <= 0.5 + 1e-12
    rise = functional.cross_entropy(torch.func.functional_call(net, place, x), y) - functional.cross_entropy(net(x), y)
    assert found["sharpness"] == pytest.approx(float(rise.detach()))


def test_small_ascents_are_not_lost_in_low_precision():
    net = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    found = sharpness(net, lambda m: m.weight.float().square().sum(), radius=0.25, ascents=200)
    assert found["sharpness"] == pytest.approx(1.25**2 - 1)
    assert net.weight.item() == 1
