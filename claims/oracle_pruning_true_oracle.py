"""Does the loss right after pruning say less of the loss after retraining where the task is harder?

A small network learns digits, once with their own labels and once with 40 % of the training labels drawn anew. On each,
60 random masks that remove half of the weights are measured on the training data, retrained for a few epochs with the
mask kept, and measured on clean test data.
"""

import torch
from _digits import Data, loss, mlp, split, train
from torch import nn, optim

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="oracle-pruning-true-oracle",
    statement="Kendall's correlation of the training loss after pruning with the test loss after retraining is lower "
    "with noisy labels than with clean ones",
    method="Kendall, clean",
    baseline="Kendall, noisy",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
MASKS, SPARSITY, NOISE = 60, 0.5, 0.4


def measure(seed: int) -> dict[str, float]:
    """Correlations, and how often a mask ends better than the one that began best."""
    (images, labels), test = split(seed, [600])
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < NOISE
    noisy = torch.where(wrong, torch.randint(10, labels.shape, generator=generator), labels)
    figures: dict[str, float] = {}
    for name, data in {"clean": (images, labels), "noisy": (images, noisy)}.items():
        found = correlated(data, test, seed)
        for figure in ("Kendall", "Pearson", "Spearman", "anomalies"):
            figures[f"{figure}, {name}"] = found[figure]
    return figures


def correlated(data: Data, test: Data, seed: int) -> ws.inspect.Report:
    """The report of one task."""
    model = mlp(seed, width=16)
    train(model, data, optim.Adam(model.parameters(), lr=3e-3), epochs=30, seed=seed)

    def retrain(module: nn.Module, order: int) -> None:
        train(module, data, optim.Adam(module.parameters(), lr=1e-3), epochs=5, seed=order)

    masks = [ws.prune.random(model, SPARSITY, seed=1000 * seed + i, action="mask") for i in range(MASKS)]
    return ws.prune.oracle_correlation(
        model, masks, retrain, lambda module: loss(module, data), lambda module: loss(module, test), seed=seed
    )
