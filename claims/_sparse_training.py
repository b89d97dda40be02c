"""Small networks trained sparsely: what claims on rules of sparse training measure with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _digits import Data, accuracy, loss, mlp, train
from torch import nn

import weightsmith as ws

EPOCHS, BATCH = 40, 32
RATE = 0.05

Controlled = Callable[[nn.Module, torch.optim.Optimizer], ws.prune.sparse.Controller | None]


def epoch_steps(data: Data) -> int:
    """Steps of an epoch."""
    return -(-len(data[1]) // BATCH)


def trained(
    data: Data,
    seed: int,
    controlled: Controlled,
    epochs: int = EPOCHS,
    width: int = 128,
    start: nn.Module | None = None,
) -> tuple[nn.Module, Any]:
    """A two-layer network of digits, SGD with momentum 0.9 and a rate that falls along a line; and its masks."""
    model = mlp(seed, width) if start is None else start
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    masks = controlled(model, optimizer)
    train(model, data, optimizer, epochs, seed, rate=lambda progress: 1 - progress, batch=BATCH)
    return model, masks


def scored(data: Data, test: Data, seed: int, rule: ws.prune.sparse.Rule, **options: Any) -> tuple[float, float, float]:
    """Accuracy, loss and sparsity of a network trained by a rule.

    Weights of random masks begin so much larger that what each layer computes is as large as if it were dense.
    """
    made: list[ws.prune.sparse.Controller] = []

    def controlled(model: nn.Module, optimizer: torch.optim.Optimizer) -> ws.prune.sparse.Controller:
        made.append(ws.prune.sparse.control(model, optimizer, rule, seed=seed, pattern="*.weight", **options))
        with torch.no_grad():
            for name, count in made[0].info.kept.items():
                weight = model.get_parameter(name)
                weight.mul_((weight.numel() / max(count, 1)) ** 0.5)
        return made[0]

    model, masks = trained(data, seed, controlled)
    return accuracy(model, test), loss(model, test), masks.sparsity
