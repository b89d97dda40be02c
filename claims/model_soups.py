"""Is the average of fine-tunes as good as the best of them?

A small network is trained on a third of the digits and fine-tuned eight times on another third, with
learning rate, length and weight decay drawn at random, as in the paper's sweep. The best single
fine-tune is the one with the highest accuracy on 300 validation digits; the test digits choose nothing.
"""

import copy
import random

import torch
from _digits import accuracy, mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="model-soups",
    statement="the uniform soup of eight fine-tunes is at least as accurate on test data as the fine-tune that is "
    "best on validation data",
    method="uniform soup",
    baseline="best single",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119),
    needs=("sklearn",),
)
FINE_TUNES = 8


def measure(seed: int) -> dict[str, float]:
    """Test accuracies."""
    first, second, validation, test = split(seed, [500, 500, 300])
    base = mlp(seed)
    train(base, first, torch.optim.Adam(base.parameters(), lr=1e-3), epochs=30, seed=seed)
    runs = [fine_tuned(base, second, random.Random(100 * seed + number)) for number in range(FINE_TUNES)]
    scratch = copy.deepcopy(base)

    def scored(weights: ws.Weights, data=test) -> float:
        weights.load_into(scratch)
        return accuracy(scratch, data)

    models = [ws.open(run) for run in runs]
    best = max(models, key=lambda model: scored(model, validation))
    singles = [scored(model) for model in models]
    return {
        "uniform soup": scored(ws.merge.mean(models)),
        "greedy soup": scored(ws.merge.greedy_soup(models, lambda weights: scored(weights, validation))),
        "best single": scored(best),
        "mean single": sum(singles) / len(singles),
        "before fine-tuning": accuracy(base, test),
    }


def fine_tuned(base: torch.nn.Module, data, chance: random.Random) -> torch.nn.Module:
    """One run of the sweep."""
    model = copy.deepcopy(base)
    rate, decay = 10 ** chance.uniform(-3.5, -2), 10 ** chance.uniform(-4, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    train(model, data, optimizer, epochs=chance.randint(5, 20), seed=chance.randrange(2**31))
    return model
