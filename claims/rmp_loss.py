"""Are spiking networks better when their membrane potentials are drawn to the spikes that they become?

A network of two layers of 48 leaky neurons with soft resets sees 600 digits for 4 moments each and learns for 30
epochs, with and without the penalty on the squared distance of potentials to the nearest of 0 and 1. Its weight grows
to 0.1 by the middle of the training and falls again; 0.1 and that shape were set before the first run.
"""

import torch
from _digits import accuracy
from _spiking import distance, parts, trained
from torch import Tensor

from weightsmith.claims import Claim
from weightsmith.quantize.spiking import pull_to_levels

CLAIM = Claim(
    key="rmp-loss",
    statement="a spiking network whose potentials are drawn to 0 and 1 along training is more accurate than without",
    method="accuracy, drawn",
    baseline="accuracy, plain",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
MOST = 0.1


def measure(seed: int) -> dict[str, float]:
    """Test accuracies, and the mean distance of potentials to their spikes."""
    training, test = parts(seed)
    plain = trained(seed, training)
    drawn = trained(seed, training, _penalty)
    return {
        "accuracy, drawn": accuracy(drawn, test),
        "accuracy, plain": accuracy(plain, test),
        "distance, drawn": distance(drawn, test),
        "distance, plain": distance(plain, test),
    }


def _penalty(progress: float, found: list[Tensor]) -> Tensor:
    weight = MOST * 2 * min(progress, 1 - progress)
    return weight * torch.stack([pull_to_levels(one) for one in found]).mean()
