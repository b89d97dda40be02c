"""Do a soft reset and rectified potentials keep more of what spiking neurons are told?

A network of two layers of 48 leaky neurons sees 600 digits for 4 moments each and learns for 30 epochs: with hard
resets and potentials as they are, and with soft resets, with and without the rectifier.
"""

from _digits import accuracy
from _spiking import distance, parts, trained

from weightsmith.claims import Claim

CLAIM = Claim(
    key="reducing-information-loss-spiking",
    statement="a spiking network with soft resets and rectified potentials is more accurate than one with hard resets",
    method="accuracy, soft and rectified",
    baseline="accuracy, hard",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Test accuracies, and the mean distance of what is compared with the threshold to the spikes."""
    training, test = parts(seed)
    hard = trained(seed, training, reset="hard")
    soft = trained(seed, training, reset="soft")
    both = trained(seed, training, reset="soft", rectify=True)
    return {
        "accuracy, soft and rectified": accuracy(both, test),
        "accuracy, soft": accuracy(soft, test),
        "accuracy, hard": accuracy(hard, test),
        "distance, soft and rectified": distance(both, test),
        "distance, soft": distance(soft, test),
        "distance, hard": distance(hard, test),
    }
