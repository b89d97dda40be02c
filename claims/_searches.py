"""Digits, trained with a penalty or with masks that change step by step: what claims on sparse training share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from _digits import Data, accuracy, one_thread, split
from torch import Tensor, nn
from torch.nn import functional


def parts(seed: int) -> tuple[Data, Data, Data]:
    """Digits to train on, to choose settings by, and to measure with: 900, 300 and 597."""
    training, validation, test = split(seed, [900, 300])
    return training, validation, test


def perceptron(seed: int, width: int = 128, activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """64 inputs, two hidden layers, 10 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = [(64, width), (width, width), (width, 10)]
        first, second, third = (nn.Linear(inputs, out, bias=bias) for inputs, out in sizes)
        return nn.Sequential(first, activation(), second, activation(), third)


@one_thread()
def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    seed: int,
    batch: int = 64,
    penalty: Callable[[int], Tensor | float] = lambda epoch: 0.0,
    after_step: Callable[[float], None] = lambda progress: None,
) -> nn.Module:
    """Training with a learning rate that falls along a cosine; ``after_step(share of the steps done)``."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    total = epochs * -(-len(labels) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    done = 0
    for epoch in range(epochs):
        for part in torch.randperm(len(labels), generator=generator).split(batch):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[part]), labels[part]) + penalty(epoch)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            after_step(done / total)
    return model


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def best(found: Iterable[nn.Module] | Mapping[float, nn.Module], validation: Data) -> nn.Module:
    """The one with the highest accuracy on validation data; of equal ones the first."""
    models = list(found.values()) if isinstance(found, Mapping) else list(found)
    return max(models, key=lambda model: accuracy(model, validation))


def loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other weights."""
    made = copy.deepcopy(model)
    made.load_state_dict(dict(weights))
    return made
