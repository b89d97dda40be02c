"""Shortcuts make the surroundings of a minimum convex: deep networks with and without them, on digits.

Twelve hidden layers of 32 units with ReLUs, the same but for shortcuts around each. Both are trained alike, and the
loss on 600 training digits is mapped over the same kind of plane of filter-normalised random directions. Of three
planes each, the share of points with negative curvature is the mean. Depth, width and training were set once, so that
the plain network learns at all, before any plane was drawn.
"""

import torch
from _digits import accuracy, loss, split, train
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="loss-landscape",
    statement="around its minimum a deep network with shortcuts has less negative curvature than one without",
    method="negative curvature, shortcuts",
    baseline="negative curvature, plain",
    higher_is_better=False,
    needs=("sklearn",),
)
DEPTH, WIDTH, PLANES = 12, 32, 3


class Block(nn.Module):
    """A layer, with or without a way around it."""

    def __init__(self, shortcut: bool):
        super().__init__()
        self.layer, self.shortcut = nn.Linear(WIDTH, WIDTH), shortcut
        nn.init.kaiming_normal_(self.layer.weight, nonlinearity="relu")
        if shortcut:
            with torch.no_grad():
                self.layer.weight /= DEPTH**0.5  # so that signals do not grow with depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer on."""
        found = self.layer(x).relu()
        return x + found if self.shortcut else found


def network(seed: int, shortcut: bool) -> nn.Sequential:
    """64 inputs, 12 hidden layers, 10 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [Block(shortcut) for _ in range(DEPTH)]
        return nn.Sequential(nn.Linear(64, WIDTH), *blocks, nn.Linear(WIDTH, 10))


def measure(seed: int) -> dict[str, float]:
    """Shares of points, the barrier along a line, and how well both learned."""
    training, test = split(seed, [1200])
    part = (training[0][:600], training[1][:600])
    figures = {}
    for name, shortcut in (("shortcuts", True), ("plain", False)):
        model = network(seed, shortcut)
        train(model, training, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=30, seed=seed)
        planes = [
            ws.inspect.landscape.plane(model, None, [part], steps=13, seed=100 * seed + 2 * index)
            for index in range(PLANES)
        ]
        shares = [found["share with negative curvature"] for found in planes]
        ends = ws.inspect.landscape.top_eigen(model, None, [part], ends="both", block=2, steps=20)
        figures |= {
            f"negative curvature, {name}": sum(shares) / PLANES,
            f"least over largest eigenvalue, {name}": abs(ends.values[-1] / ends.values[0]),
            f"accuracy, {name}": accuracy(model, test),
            f"training loss, {name}": loss(model, part),
        }
    return figures
