"""Does an update that goes part of the way back turn fewer right answers wrong?

A small network is trained on 250 digits; then 250 more arrive and it is trained on, on all 500: the
paper's data update. The amount of the old network is chosen on 400 validation digits; the test digits
choose nothing. A negative flip is a test digit that the old network tells and the new one does not.
Beside the straight line: Fisher information of the old network on its 250 digits, and the mean of four updates.
"""

import copy

import torch
from _digits import accuracy, mlp, split, train
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="backward-compatible-interpolation",
    statement="the update with the largest share of the old model that loses no validation accuracy has fewer "
    "negative flips on test data than the new model",
    method="negative flips, interpolated",
    baseline="negative flips, new",
    higher_is_better=False,
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Shares of the test digits, and the amount of the old network that was chosen."""
    first, second, validation, test = split(seed, [250, 250, 400])
    old = mlp(seed)
    train(old, first, torch.optim.Adam(old.parameters(), lr=1e-3), epochs=40, seed=seed)
    both = (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    runs = []
    for number in range(4):
        run = copy.deepcopy(old)
        train(run, both, torch.optim.Adam(run.parameters(), lr=3e-3), epochs=30, seed=10 * seed + number)
        runs.append(run)
    scratch = copy.deepcopy(old)

    def scored(weights: ws.Weights) -> float:
        weights.load_into(scratch)
        return accuracy(scratch, validation)

    figures = {"accuracy, old": accuracy(old, test), "accuracy, new": accuracy(runs[0], test)}
    figures["negative flips, new"] = flips(old, runs[0], test)
    information = ws.stats.fisher(old, [first], at_once=125)
    for name, models, stats in (
        ("interpolated", runs[:1], None),
        ("interpolated soup", runs, None),
        ("interpolated with Fisher information", runs[:1], information),
    ):
        update = ws.merge.backward_compatible(models, old, scored, stats=stats)
        update.load_into(scratch)
        figures[f"accuracy, {name}"] = accuracy(scratch, test)
        figures[f"negative flips, {name}"] = flips(old, scratch, test)
        figures[f"amount, {name}"] = float(update.lineage.options["amount"])
    return figures


@torch.no_grad()
def flips(old: nn.Module, new: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of the examples that the old network tells right and the new one wrong."""
    images, labels = data
    right = old(images).argmax(dim=1) == labels
    return float((right & (new(images).argmax(dim=1) != labels)).float().mean())
