"""Two children of one network that learned different digits: what claims on merging with data measure with."""

from __future__ import annotations

import copy

import torch
from _digits import Data, accuracy, mlp, split, train
from torch import nn

import weightsmith as ws

BASE, EACH = 200, 500


class Family:
    """A base trained a little on all digits, and two fine-tunes of it, on 0 to 4 and on 5 to 9."""

    def __init__(self, seed: int):
        first, second, self.test = split(seed, [BASE, EACH])
        self.base = mlp(seed)
        train(self.base, first, torch.optim.Adam(self.base.parameters(), lr=1e-3), epochs=10, seed=seed)
        self.tasks = [first, *(only(second, low) for low in (0, 5))]
        self.models = [child(self.base, task, seed) for task in self.tasks[1:]]

    def fisher(self, model: nn.Module, task: int, labels: ws.stats.Labels = "all") -> ws.Weights:
        """Fisher information of a model on the digits of a task; task 0 is that of the base."""
        inputs, right = self.tasks[task]
        return ws.stats.fisher(model, [(inputs, right)], labels=labels, at_once=128)

    def score(self, merged: ws.Weights) -> float:
        """Accuracy on test digits of all ten classes."""
        model = copy.deepcopy(self.base)
        merged.load_into(model)
        return accuracy(model, self.test)


def only(data: Data, low: int) -> Data:
    """The five digits from ``low`` on."""
    images, labels = data
    keep = (labels >= low) & (labels < low + 5)
    return images[keep], labels[keep]


def child(base: nn.Module, task: Data, seed: int) -> nn.Module:
    """A fine-tune of the base."""
    model = copy.deepcopy(base)
    train(model, task, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=10, seed=seed)
    return model
