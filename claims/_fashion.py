"""Clothes (Fashion-MNIST) and a small convolutional network with batch norm: what claims on real images measure with.

The images are those of Debian's package ``dataset-fashion-mnist``; set ``FASHION_MNIST`` to have them elsewhere.
"""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from _digits import one_thread
from torch import Tensor, nn
from torch.nn import functional

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
THERE = (FOLDER / "train-images-idx3-ubyte.gz").exists()

Data = tuple[Tensor, Tensor]
"""Images ``[n, 1, 28, 28]`` in [0, 1] and their labels ``[n]``."""


@functools.cache
def _read(part: str) -> Data:
    with gzip.open(FOLDER / f"{part}-images-idx3-ubyte.gz") as file:
        images = numpy.frombuffer(file.read(), numpy.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(FOLDER / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = numpy.frombuffer(file.read(), numpy.uint8, offset=8)
    return torch.tensor(images / 255, dtype=torch.float32), torch.tensor(labels.astype("int64"))


def split(seed: int, sizes: list[int]) -> list[Data]:
    """Disjoint random parts of the 60,000 training images, of these sizes."""
    images, labels = _read("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [(images[part], labels[part]) for part in order[: sum(sizes)].split(sizes)]


def held_out(seed: int, size: int = 2000) -> Data:
    """Some of the 10,000 test images."""
    images, labels = _read("t10k")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:size]
    return images[chosen], labels[chosen]


def cnn(seed: int, classes: int = 10) -> nn.Sequential:
    """A stem of stride 2 and two convolutions with batch norm; 37 k parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 96, 3, padding=1, bias=False),
            nn.BatchNorm2d(96),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(96, classes),
        )


@one_thread()
def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    seed: int,
    rate: float = 3e-3,
    batch: int = 128,
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda images, generator: images,
    smoothing: float = 0.0,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """AdamW with a learning rate that falls to nothing along a cosine."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = epochs * -(-len(labels) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        for part in torch.randperm(len(labels), generator=generator).split(batch):
            logits = model(augment(images[part], generator))
            loss = functional.cross_entropy(logits, labels[part], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        after_epoch(epoch)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of right answers, in evaluation mode."""
    images, labels = data
    was = model.training
    model.eval()
    right = sum(
        int((model(part).argmax(dim=1) == truth).sum())
        for part, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    model.train(was)
    return right / len(labels)


def noisy(images: Tensor, generator: torch.Generator, size: float = 0.3) -> Tensor:
    """The images with Gaussian noise."""
    return images + size * torch.randn(images.shape, generator=generator)


def turned(images: Tensor, degrees: float) -> Tensor:
    """The images turned about their middle."""
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.new_zeros(()), angle.sin(), angle.cos(), angle.new_zeros(())])
    grid = functional.affine_grid(turn.reshape(1, 2, 3).expand(len(images), 2, 3), list(images.shape), False)
    return functional.grid_sample(images, grid, align_corners=False)
