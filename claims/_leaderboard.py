"""Systems of known order and their scores on small tasks of different scales: what claims on rankings measure with.

The systems are networks for handwritten digits, each trained on more examples than the one before; the true order is
that of their accuracies on all digits that nobody trained on. A task is twenty of those digits and one of three
scores: accuracy, the log-likelihood, or the log-odds of the right class, which has the widest scale. How near the
sizes are, how many examples a task has and how long the networks learn was chosen on a seed that no claim uses, so
that scores on these tasks do not simply find the true order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from _digits import mlp, split, train
from torch import Tensor

SIZES = (200, 215, 232, 250, 270, 290, 313, 338)


@dataclass(frozen=True)
class Board:
    """``logs`` [systems, n, 10] log-probabilities, ``labels`` [n], ``truth`` [systems] accuracies on all of them."""

    logs: Tensor
    labels: Tensor
    truth: Tensor

    @property
    def right(self) -> Tensor:
        """``[systems, n]`` log-probabilities of the right class."""
        return self.logs.gather(2, self.labels[None, :, None].expand(len(self.logs), -1, 1))[:, :, 0]


@functools.cache
def board(seed: int, sizes: tuple[int, ...] = SIZES) -> Board:
    """The systems of one seed."""
    pool, test = split(seed, [max(sizes)])
    logs = []
    for index, size in enumerate(sizes):
        model = mlp(100 * seed + index)
        part = (pool[0][:size], pool[1][:size])
        train(model, part, torch.optim.Adam(model.parameters(), lr=2e-3), epochs=12, seed=seed, batch=64)
        with torch.no_grad():
            logs.append(model(test[0]).double().log_softmax(1))
    found = torch.stack(logs)
    truth = (found.argmax(2) == test[1]).double().mean(1)
    return Board(found, test[1], truth)


def tasks(of: Board, seed: int, count: int = 12, each: int = 20) -> Tensor:
    """``[systems, tasks]``, more is better."""
    order = torch.randperm(len(of.labels), generator=torch.Generator().manual_seed(seed + 1000))
    columns = []
    for index, part in enumerate(order[: count * each].split(each)):
        chance = of.right[:, part]
        accuracy = (of.logs[:, part].argmax(2) == of.labels[part]).double().mean(1)
        odds = chance - torch.log1p(-chance.exp().clamp(max=1 - 1e-9))
        columns.append((accuracy, chance.mean(1), odds.mean(1))[index % 3])
    return torch.stack(columns, 1)


def standardised(scores: Tensor) -> Tensor:
    """Every task with mean 0 and spread 1 over the systems that have a score; missing ones stay so."""
    there = ~scores.isnan()
    count = there.double().sum(0)
    mean = scores.nansum(0) / count
    spread = ((scores - mean).square().nansum(0) / count).sqrt()
    return (scores - mean) / torch.where(spread > 0, spread, 1.0)


def points(report: object, word: str, systems: int) -> Tensor:
    """A column of a ranking by the systems' order in the table that went in."""
    rows = {row["system"]: row[word] for row in report.table}  # type: ignore[attr-defined]
    return torch.tensor([rows[str(index)] for index in range(systems)], dtype=torch.float64)
