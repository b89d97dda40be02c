"""A small spiking network for handwritten digits: what claims on spikes measure with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _digits import Data, one_thread, split
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.quantize.spiking import Fire, Neuron, potentials

MOMENTS, EPOCHS, TRAINING = 4, 30, 600


class Spiking(nn.Module):
    """Images for 4 moments, two layers of neurons, 10 sums; batch norm before neurons, over images and moments."""

    def __init__(self, width: int = 48, **options):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.neurons = nn.ModuleList(Neuron(**options) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        drive = self.norms[0](self.first(images)).expand(MOMENTS, -1, -1)
        spikes = self.neurons[0](drive)
        drive = self.norms[1](self.second(spikes).flatten(0, 1)).unflatten(0, (MOMENTS, -1))
        return self.head(self.neurons[1](drive)).mean(dim=0)


def parts(seed: int) -> tuple[Data, Data]:
    """Digits to learn from and to test with."""
    training, test = split(seed, [TRAINING])
    return training, test


@one_thread()
def trained(
    seed: int, data: Data, penalty: Callable[[float, list[Tensor]], Tensor] | None = None, **options
) -> Spiking:
    """Adam with a rate that falls to 0. ``penalty(share of the epochs done, potentials)`` is added to the loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Spiking(**options)
    images, labels = data
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - epoch / EPOCHS)
        for part in torch.randperm(len(labels), generator=generator).split(50):
            with potentials(model) as found:
                loss = functional.cross_entropy(model(images[part]), labels[part])
            if penalty is not None:
                loss = loss + penalty(epoch / EPOCHS, [one for calls in found.values() for one in calls])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@one_thread()
@torch.no_grad()
def distance(model: Spiking, data: Data) -> float:
    """How far what neurons compare lies from the spikes that they answer with, in the mean."""
    with potentials(model) as found:
        model(data[0])
    return float(torch.stack([(one - Fire()(one)).abs().mean() for calls in found.values() for one in calls]).mean())
