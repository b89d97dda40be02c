"""Cut without retraining: are filters on a sphere, with a penalty that parts their weights, better than plain ones?

A perceptron of 128 hidden units learns digits for 40 epochs with Adam: plainly; or with
filters on a sphere and the penalty on the angle to what the cut will leave, in four strengths. Then 90 % of the weights
are cut by magnitude, of each filter, of each matrix or of all together, and nothing is trained after that. Strength and
kind of cut are chosen by 300 validation digits. Filling the cut with the filter's mean instead of zeros stands beside
it, for the networks chosen with zeros.

Cuts of matrices and of all together were added after figures of a seed that is not among these.
"""

from _cut_untrained import figures_of

from weightsmith.claims import Claim

CLAIM = Claim(
    key="pruning-on-the-fly",
    statement="with 90 % of the weights cut and no retraining, a network trained on spheres with the penalty is more "
    "accurate than one trained plainly",
    method="sphere and penalty",
    baseline="plain",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Test accuracies after the cut, filled with zeros and with means."""
    return figures_of(seed, ("sphere and penalty", "plain"))
