"""Clothes, a small convolutional network trained on them, and a plain loop for what is quantized while it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import _fashion
import torch
from _digits import one_thread
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


class Setting(NamedTuple):
    """A trained network, the images it was trained on, and 2,000 others."""

    network: nn.Module
    training: _fashion.Data
    test: _fashion.Data


def labels_alone(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def setting(seed: int, size: int = 6000, epochs: int = 3) -> Setting:
    """A network in floats, trained for a few epochs."""
    (training,) = _fashion.split(seed, [size])
    network = _fashion.cnn(seed)
    _fashion.train(network, training, epochs, seed)
    return Setting(network, training, _fashion.held_out(seed))


@one_thread()
def trained(
    model: nn.Module,
    data: _fashion.Data,
    epochs: int,
    seed: int,
    loss: Step = labels_alone,
    rate: float = 1e-3,
    batch: int = 128,
    groups: Callable[[nn.Module], list[dict[str, object]]] | None = None,
    after_step: Callable[[float], None] = lambda progress: None,
) -> nn.Module:
    """Adam with a rate that falls along a cosine, in place. ``loss`` may go backwards by itself and give zero."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    learning = groups(model) if groups else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.Adam(learning, lr=rate)  # type: ignore[arg-type]
    steps = epochs * -(-len(labels) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    done = 0
    for _ in range(epochs):
        for part in torch.randperm(len(labels), generator=generator).split(batch):
            optimizer.zero_grad()
            total = loss(model, (images[part], labels[part]))
            if total.requires_grad:
                total.backward()
            optimizer.step()
            schedule.step()
            done += 1
            after_step(done / steps)
    return model.eval()


def score(model: nn.Module, data: _fashion.Data) -> float:
    """Share of right answers."""
    return _fashion.accuracy(model, data)


def like(network: nn.Module) -> nn.Module:
    """A copy to quantize."""
    return copy.deepcopy(network)
