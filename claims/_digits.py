"""Handwritten digits and small networks for them: what several claims measure with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

Data = tuple[Tensor, Tensor]
"""Images ``[n, 64]`` in [0, 1] and their labels ``[n]``."""


@functools.cache
def _digits() -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def split(seed: int, sizes: Sequence[int]) -> list[Data]:
    """Disjoint random parts of the 1797 digits, of these sizes, and what is left."""
    images, labels = _digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    left = len(labels) - sum(sizes)
    return [(images[part], labels[part]) for part in order.split([*sizes, left])]


def mlp(seed: int, width: int = 64) -> nn.Sequential:
    """64 inputs, two hidden layers, 10 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


@contextmanager
def one_thread() -> Iterator[None]:
    """For networks this small, threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    seed: int,
    rate: Callable[[float], float] = lambda progress: 1.0,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda images, generator: images,
    batch: int = 32,
) -> None:
    """Plain training. ``rate(share of the epochs done)`` scales the learning rate."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    full = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(epochs):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * rate(epoch / epochs)
        for part in torch.randperm(len(labels), generator=generator).split(batch):
            loss = functional.cross_entropy(model(augment(images[part], generator)), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after_epoch(epoch)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of right answers."""
    images, labels = data
    return float((model(images).argmax(dim=1) == labels).float().mean())


@torch.no_grad()
def loss(model: nn.Module, data: Data) -> float:
    """Mean cross-entropy."""
    images, labels = data
    return float(functional.cross_entropy(model(images), labels))
