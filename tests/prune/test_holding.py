"""Masks that are kept while somebody trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.prune import holding


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def some(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in model.named_parameters() if p.dim() == 2
    }


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rprop": lambda p: torch.optim.Rprop(p),
    "whole matrices": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_with_anything_in_its_memory(name):
    model = net()
    masks, inputs = some(model), torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with holding(model, masks):
        for key, mask in masks.items():
            assert torch.equal(model.get_parameter(key), before[key] * mask)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        for _ in range(4):
            optimizer.zero_grad()
            (model(inputs) - 1).square().mean().backward()
            for key, mask in masks.items():
                slope = model.get_parameter(key).grad
                assert slope is not None
                assert not slope[~mask].any()
                assert slope[mask].any()
            optimizer.step()
            assert all(not model.get_parameter(key)[~mask].any() for key, mask in masks.items())
    assert all(not torch.equal(model.get_parameter(k)[m], before[k][m]) for k, m in masks.items())
    assert [name for name, _ in model.named_parameters()] == list(before)


def test_afterwards_nothing_is_kept_any_more():
    model = net()
    masks = some(model)
    weight = model.get_parameter("0.weight")

    def stopped() -> None:
        with holding(model, masks):
            weight.data.fill_(1.0)  # past any optimizer
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert not weight[~masks["0.weight"]].any()
    assert weight[masks["0.weight"]].eq(1).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(2, 6)).sum().backward()
    assert all(not p._backward_hooks for p in model.parameters())
    optimizer.step()
    assert weight[~masks["0.weight"]].any()


def test_weights_that_are_not_finite_and_other_modules():
    model, other = net(), net()
    weight = model.get_parameter("0.weight")
    weight.data.fill_(float("nan"))
    before = [p.clone() for p in other.parameters()]
    with holding(model, {"0.weight": torch.zeros(5, 6, dtype=torch.bool)}):
        assert not weight.any()
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        other(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))


def test_frozen_and_tied_parameters():
    layer = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(layer, layer)
    layer.weight.requires_grad_(False)
    mask = torch.eye(3, dtype=torch.bool)
    with holding(model, {"1.weight": mask}):
        assert not layer.weight[~mask].any()


def test_masks_of_one_tied_parameter():
    layer = nn.Linear(3, 3, bias=False)
    model, eye = nn.Sequential(layer, layer), torch.eye(3, dtype=torch.bool)
    with holding(model, {"0.weight": eye, "1.weight": eye.clone()}):
        assert not layer.weight[~eye].any()
    with pytest.raises(Error, match=r"1.weight is tied to another parameter .* masks differ"):
        holding(model, {"0.weight": eye, "1.weight": ~eye}).__enter__()


def test_nothing_is_left_behind_whoever_stops():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    before = len(hooks)
    model = net()
    other = nn.Parameter(torch.ones(3))

    def stopped() -> None:
        with holding(model, some(model)):
            assert len(hooks) == before + 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(hooks) == before
    assert all(not p._backward_hooks for p in model.parameters())
    with holding(model, some(model)), holding(net(), {}):  # one inside another; an optimizer that knows neither
        torch.optim.SGD([other], lr=1.0).step()
    assert len(hooks) == before
    assert other.eq(1).all()


def test_masks_that_are_weights():
    import weightsmith as ws

    model = net()
    mask = ws.prune.magnitude(model, 0.5, action="mask")
    with holding(model, mask):
        pass
    assert ws.prune.sparsity_of(model) == pytest.approx(0.5, abs=0.02)


def test_refusals():
    model = net()
    with pytest.raises(Error, match=r"masks of 1.weight: the module has no such parameters"):
        holding(model, {"1.weight": torch.ones(1, dtype=torch.bool)}).__enter__()
    for wrong in (torch.ones(5, 6), torch.ones(6, 5, dtype=torch.bool)):
        with pytest.raises(Error, match=r"the mask of 0.weight is .*; needed is a boolean one of \[5, 6\]"):
            holding(model, {"0.weight": wrong}).__enter__()

    def replace() -> None:
        with holding(model, some(model)):
            model[2].weight = nn.Parameter(torch.ones(3, 5))

    with pytest.raises(Error, match=r"other parameters in the place of 2.weight"):
        replace()
