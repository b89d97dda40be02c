"""Does a combination found on held-out digits generalize better than the best plain average found there?

A small network learns digits, a fifth of them with a wrong label, at a learning rate that stays; its
last ten epochs are the checkpoints. On 400 other digits the search is given 100 evaluations. The
baseline chooses on the same digits among the last checkpoint, every single one, their mean and
exponential averages of four lengths. All are compared by their loss on digits that choose nothing.
Two defaults of the search were chosen with digits as well, on other seeds than these.
"""

import copy

import torch
from _digits import Data, accuracy, loss, mlp, split, train

import weightsmith as ws
from weightsmith.average._lcsc import starts
from weightsmith.average._parts import combination
from weightsmith.claims import Claim

CLAIM = Claim(
    key="lcsc",
    statement="the combination of ten checkpoints that a search of 100 evaluations finds has a lower loss on test "
    "digits than the best of the last, every single one, their mean and exponential averages, chosen on the same data",
    method="combination",
    baseline="best average",
    higher_is_better=False,
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109),
    needs=("sklearn",),
)
EPOCHS, KEPT, WRONG = 20, 10, 0.2


def measure(seed: int) -> dict[str, float]:
    """Test losses in nats, and what was found."""
    training, validation, test = split(seed, [800, 400])
    model = mlp(seed)
    checkpoints: list[ws.Weights] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    keep = lambda epoch: checkpoints.append(ws.open(copy.deepcopy(model)))  # noqa: E731
    train(model, mislabelled(training, seed), optimizer, EPOCHS, seed, after_epoch=keep)
    run = checkpoints[-KEPT:]

    def scored(weights: ws.Weights, data: Data = test, figure=loss) -> float:
        weights.load_into(model)
        return figure(model, data)

    averages = [combination(run, coefficients, "average", {}) for coefficients in starts(KEPT)]
    best = min(averages, key=lambda weights: scored(weights, validation))
    found = ws.average.lcsc(run, lambda weights: -scored(weights, validation), seed=seed)
    return {
        "combination": scored(found),
        "best average": scored(best),
        "last": scored(run[-1]),
        "mean": scored(ws.average.lawa(run, last=KEPT)),
        "combination, accuracy": scored(found, figure=accuracy),
        "best average, accuracy": scored(best, figure=accuracy),
        "smallest coefficient": min(found.lineage.options["coefficients"]),
    }


def mislabelled(data: Data, seed: int) -> Data:
    """The same images; a fifth of them with another label than their own."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: int(WRONG * len(labels))]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return images, labels
