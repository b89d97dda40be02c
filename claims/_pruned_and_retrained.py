"""A trained perceptron pruned to 95 % and trained again: bi-level, iterative and at once, by number of steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from _digits import Data, accuracy, one_thread
from _searches import best, parts, perceptron, train
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.adapt import fold
from weightsmith.prune.sparse import bilevel, bilevel_step

SPARSITY = 0.95
ROUNDS, EPOCHS = 13, 12
"""Of the iterative way: in 13 rounds, each of which cuts a fifth of what is left, 5 % remain."""

EPOCHS_BILEVEL = ROUNDS * EPOCHS // 6
"""Each has steps of both kinds, and so as many gradients as two plain epochs: a third of the iterative way's."""

RATES = (0.03, 0.1, 0.3)


def figures_of(seed: int, ways: tuple[str, ...]) -> dict[str, float]:
    """Test accuracies, of the whole network too. Every way chooses its learning rate by validation data."""
    training, validation, test = parts(seed)
    start = perceptron(seed)
    train(start, training, torch.optim.Adam(start.parameters(), lr=1e-3), 30, seed)
    how = {"bi-level": searched, "iterative": iterated, "one shot": at_once}
    figures = {"whole": accuracy(start, test)}
    for way in ways:
        figures[way] = accuracy(best([how[way](start, training, seed, rate) for rate in RATES], validation), test)
    return figures


def descent(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Of weights, everywhere."""
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


@one_thread()
def searched(start: nn.Module, training: Data, seed: int, rate: float) -> nn.Module:
    """Mask and weights in turns, each on batches of its own."""
    model = copy.deepcopy(start)
    masks = bilevel(model, SPARSITY)
    scores = [made.score for made in masks.values()]
    ours = {id(score) for score in scores}
    lower = descent([p for p in model.parameters() if id(p) not in ours], rate)
    upper = torch.optim.SGD(scores, lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, EPOCHS_BILEVEL) for one in (lower, upper)]
    for epoch in range(EPOCHS_BILEVEL):
        for one, other in zip(batches(training, seed, epoch, 0), batches(training, seed, epoch, 1), strict=True):
            bilevel_step(model, entropy, one, other, lower=lower, upper=upper)
        for schedule in schedules:
            schedule.step()
    fold(model)
    return model


def batches(data: Data, seed: int, epoch: int, kind: int) -> Iterator[Data]:
    """All examples once, in an order of their own."""
    images, labels = data
    generator = torch.Generator().manual_seed(10_000 * seed + 2 * epoch + kind)
    for part in torch.randperm(len(labels), generator=generator).split(64):
        yield images[part], labels[part]


def entropy(model: nn.Module, batch: Data) -> Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def iterated(start: nn.Module, training: Data, seed: int, rate: float) -> nn.Module:
    """A fifth of what is left of every matrix goes, the rest goes on learning; and again."""
    model = copy.deepcopy(start)
    for turn in range(ROUNDS):
        sparsity = SPARSITY if turn == ROUNDS - 1 else 1 - 0.8 ** (turn + 1)
        retrained(model, training, seed + turn, rate, sparsity, EPOCHS)
    return model


def at_once(start: nn.Module, training: Data, seed: int, rate: float) -> nn.Module:
    """All of it goes, and what is left learns for as many steps as the bi-level way."""
    return retrained(copy.deepcopy(start), training, seed, rate, SPARSITY, 2 * EPOCHS_BILEVEL)


def retrained(model: nn.Module, training: Data, seed: int, rate: float, sparsity: float, epochs: int) -> nn.Module:
    """Cut by magnitude and trained with the mask held."""
    ws.prune.magnitude(model, sparsity=sparsity).load_into(model)
    masks = [(p, p != 0) for p in model.parameters() if p.dim() > 1]

    def hold(done: float) -> None:
        with torch.no_grad():
            for parameter, mask in masks:
                parameter.mul_(mask)

    return train(model, training, descent(list(model.parameters()), rate), epochs, seed, after_step=hold)
