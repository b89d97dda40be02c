"""Three tasks on one set of digits, and a network fine-tuned on each: what claims on learned merges measure with.

The digits upright, turned by a quarter and turned by a half: nothing in an image says for certain which it is, and
what was learned on one task is in the way of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from _digits import Data, accuracy, mlp, split, train
from torch import Tensor, nn

import weightsmith as ws

BASE, EACH, UNLABELLED, VALIDATION = 200, 400, 300, 300
BATCH, WIDTH = 32, 256


class Tasks:
    """A base trained a little on all tasks, a fine-tune of it for each, and digits that none of them saw."""

    def __init__(self, seed: int):
        parts = split(seed, [BASE, EACH, UNLABELLED, VALIDATION])
        begin, learn, inputs, self.validation, self.test = ([turned(part, by) for by in range(3)] for part in parts)
        self.base = mlp(seed, WIDTH)
        all_of_them = torch.cat([images for images, _ in begin]), torch.cat([labels for _, labels in begin])
        train(self.base, all_of_them, torch.optim.Adam(self.base.parameters(), lr=1e-3), epochs=10, seed=seed)
        self.models = []
        for task in learn:
            model = copy.deepcopy(self.base)
            train(model, task, torch.optim.Adam(model.parameters(), lr=3e-4), epochs=10, seed=seed)
            self.models.append(model)
        self.unlabelled = [list(images.split(BATCH)) for images, _ in inputs]
        """Batches of inputs alone, for each task."""

    def accuracies(self, models: ws.Weights | nn.Module | Sequence[ws.Weights], data: Sequence[Data]) -> float:
        """Mean accuracy of one model on all tasks, or of one model for each on its own."""
        several = list(models) if isinstance(models, Sequence) else [models] * len(data)
        return sum(accuracy(self._plain(model), part) for model, part in zip(several, data, strict=True)) / len(data)

    def _plain(self, model: ws.Weights | nn.Module) -> nn.Module:
        if isinstance(model, nn.Module):
            return model
        scratch = copy.deepcopy(self.base)
        model.load_into(scratch)
        return scratch

    def best_single(self) -> tuple[float, ws.Weights]:
        """Task arithmetic with the one coefficient that is best on labelled validation data of all tasks."""
        tried = {c / 20: ws.merge.task_arithmetic(self.models, base=self.base, weight=c / 20) for c in range(1, 21)}
        best = max(tried, key=lambda c: self.accuracies(tried[c], self.validation))
        return best, tried[best]


def turned(data: Data, quarters: int) -> Data:
    """The images turned by so many quarters."""
    images, labels = data
    return rotated(images, quarters), labels


def rotated(images: Tensor, quarters: int) -> Tensor:
    """``[n, 64]``, each an 8 by 8 image."""
    return torch.rot90(images.reshape(-1, 8, 8), quarters, (1, 2)).reshape(len(images), 64)
