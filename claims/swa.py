"""Is the mean of the last positions of a run better than a run that slows down at the end?

One digit in five of the training data has a wrong label. Both runs have the same length and the same
learning rate at first; one keeps it and is averaged over its second half, the other lets it fall to
zero along a cosine, which is what one would do without averaging.
"""

import copy
import math

import torch
from _digits import Data, accuracy, mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="swa",
    statement="with a fifth of the labels wrong, the average over the second half of a run at a constant learning "
    "rate is at least as accurate as a run of the same length whose learning rate decays",
    method="average",
    baseline="decayed",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119),
    needs=("sklearn",),
)
EPOCHS = 60
WRONG = 0.2


def measure(seed: int) -> dict[str, float]:
    """Test accuracies."""
    training, test = split(seed, [1000])
    training = mislabelled(training, seed)
    constant, decayed = mlp(seed), mlp(seed)
    average = ws.average.swa()

    def collect(epoch: int) -> None:
        if epoch >= EPOCHS // 2:
            average.update(constant)

    train(constant, training, optimizer(constant), EPOCHS, seed, after_epoch=collect)
    train(decayed, training, optimizer(decayed), EPOCHS, seed, rate=lambda done: 0.5 + 0.5 * math.cos(math.pi * done))
    averaged = copy.deepcopy(constant)
    average.weights().load_into(averaged)
    return {
        "average": accuracy(averaged, test),
        "decayed": accuracy(decayed, test),
        "last of the constant run": accuracy(constant, test),
    }


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def mislabelled(data: Data, seed: int) -> Data:
    """The same images; a fifth of them with another label than their own."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: int(WRONG * len(labels))]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return images, labels
