"""The same weights are pruned as by torch.nn.utils.prune, where no two are equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import weightsmith as ws


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 17), nn.Linear(17, 5))


def places(module: nn.Sequential) -> list[tuple[nn.Module, str]]:
    return [(layer, "weight") for layer in module if hasattr(layer, "weight")]


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_l1_unstructured(amount: float):
    module = network()
    found = ws.prune.magnitude(module, amount).to_dict()
    for layer, name in places(module):
        prune.l1_unstructured(layer, name, amount)
        prune.remove(layer, name)
    for name, value in module.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_global_unstructured(amount: float):
    module = network()
    found = ws.prune.magnitude(module, amount, scope="global").to_dict()
    prune.global_unstructured(places(module), pruning_method=prune.L1Unstructured, amount=amount)
    for layer, name in places(module):
        prune.remove(layer, name)
    for name, value in module.state_dict().items():
        assert torch.equal(found[name], value), name
