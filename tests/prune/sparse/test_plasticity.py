"""How well a network recovers: `plasticity`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.prune.sparse import plasticity


def setting() -> tuple[nn.Module, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(64, 8, generator=generator), torch.randn(8, 4, generator=generator)
    layer = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(target.t() + 0.1 * torch.randn(4, 8, generator=generator))

    def error(model: nn.Module) -> torch.Tensor:
        return (model(inputs) - inputs @ target).square().mean()

    def train(model: nn.Module, hold: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        hold(optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            error(model).backward()
            optimizer.step()

    return layer, train, lambda model: -float(error(model).detach())


def test_the_scores_by_hand():
    layer, train, evaluate = setting()
    start = layer.weight.detach().clone()
    seen = []

    def watched(model: nn.Module, hold: Any) -> None:
        assert int(model.weight.count_nonzero()) == 16  # type: ignore[operator]
        train(model, hold)
        seen.append(model.weight.detach().clone())

    found = plasticity(layer, watched, evaluate, 0.5)
    pruned = ws.prune.magnitude(layer, 0.5)["weight"]
    assert torch.equal(seen[0] != 0, pruned != 0)
    assert torch.equal(layer.weight, start)
    assert found.before == evaluate(layer)
    other = nn.Linear(8, 4, bias=False)
    other.weight = nn.Parameter(pruned)
    assert found.pruned == pytest.approx(evaluate(other))
    other.weight = nn.Parameter(seen[0])
    assert found.after == pytest.approx(evaluate(other))
    assert found.gain == found.after - found.before
    assert found.pruned < found.after  # it recovers some


def test_regrowth_goes_where_gradients_say():
    layer, train, evaluate = setting()
    gradients = {"weight": torch.zeros(4, 8)}
    start = layer.weight.detach()
    smallest = start.abs().flatten().argsort()[:3]
    gradients["weight"].view(-1)[smallest] = 1.0
    seen = []

    def watched(model: nn.Module, hold: Any) -> None:
        train(model, hold)
        seen.append(model.weight.detach().clone())

    plasticity(layer, watched, evaluate, 0.5, regrow=3 / 16, gradients=gradients)
    assert seen[0].flatten()[smallest].all()
    assert int(seen[0].count_nonzero()) == 16
    with pytest.raises(ws.Error, match="gradients="):
        plasticity(layer, train, evaluate, 0.5, regrow=0.1)
    with pytest.raises(ws.Error, match="hold"):
        plasticity(layer, lambda model, hold: train(model, lambda optimizer: None), evaluate, 0.5)
    with pytest.raises(ws.Error, match="sparsity"):
        plasticity(layer, train, evaluate, 1.5)


def test_each_tensor_its_share():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)  # type: ignore[operator]
    seen: list[list[int]] = []

    def count(model: nn.Module, hold: Any) -> None:
        seen.append([int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1])

    plasticity(model, count, lambda model: 0.0, 0.5, scope="tensor")
    plasticity(model, count, lambda model: 0.0, 0.5)
    assert seen == [[18, 18], [36, 0]]
