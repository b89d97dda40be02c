"""Is the mean of the latest six epochs better than any of them, in the middle of a run?

A small convolutional network with batch norm learns 1,500 images of clothes for 40 epochs, its learning
rate falling along a cosine. After half of them the run is asked for a model: the latest checkpoint, the
best of the latest six by 1,000 validation images, or their mean. Test images choose nothing.
"""

import contextlib
import copy

import torch
from _fashion import Data, accuracy, cnn, held_out, split, train
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="lawa",
    statement="half-way through a run, the mean of the latest six epochs' checkpoints is at least as accurate on test "
    "images as the one of the six that is best on validation images",
    method="mean of six",
    baseline="best of six",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107),
)
EPOCHS, ASKED, LAST = 40, 20, 6


class Asked(Exception):
    """Half of the run is enough."""


def measure(seed: int) -> dict[str, float]:
    """Test accuracies."""
    training, validation = split(seed, [1500, 1000])
    test = held_out(seed)
    model = cnn(seed)
    checkpoints: list[ws.Weights] = []

    def collect(epoch: int) -> None:
        checkpoints.append(ws.open(copy.deepcopy(model)))
        if len(checkpoints) == ASKED:
            raise Asked

    with contextlib.suppress(Asked):
        train(model, training, EPOCHS, seed, after_epoch=collect)
    scratch = copy.deepcopy(model)

    def scored(weights: ws.Weights, data: Data = test) -> float:
        weights.load_into(scratch)
        return accuracy(scratch, data)

    latest = checkpoints[-LAST:]
    singles = [scored(checkpoint) for checkpoint in latest]
    mean = scored(ws.average.lawa(checkpoints, last=LAST))  # and leaves it in scratch
    measured_anew(scratch, training)
    return {
        "mean of six": mean,
        "mean of six, statistics measured anew": accuracy(scratch, test),
        "best of six": scored(max(latest, key=lambda weights: scored(weights, validation))),
        "latest": singles[-1],
        "best of six on the test images": max(singles),
    }


@torch.no_grad()
def measured_anew(model: nn.Module, data: Data) -> None:
    """Batch norms with the mean and variance that these weights have, not the mean of those that others had."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for images in data[0].split(250):
        model(images)
    model.eval()
