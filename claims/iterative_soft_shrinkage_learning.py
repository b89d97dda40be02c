"""Is it better to shrink the smallest weights a little at each step than to zero them?

A small convolutional network learns to make 8 x 8 digits of 4 x 4 ones. From random weights, at every one of the first
three quarters of its steps, the smallest 90 % of each layer are shrunk by a twentieth (ISS-P), or set to zero, free to
come back with the next step (iterative hard thresholding); then the mask stays and the rest is trained on. Beside it
stands what pruning usually is: dense training for half of the steps, pruning by magnitude and training on, with as many
steps in all, which the second claim on this paper is about. Quality is the peak signal-to-noise ratio on test digits.
How many places change between being shrunk and not is told for the first and the last quarter of the shrinking.
"""

from _digits import split
from _super_resolution import compared, steps_of

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="iterative-soft-shrinkage-learning",
    statement="a super-resolution network that learns with 90 % of its weights shrinking a little each step restores "
    "test digits at least as well as one in which they are set to zero each step",
    method="soft shrinkage",
    baseline="hard thresholding",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
SPARSITY = 0.9


def measure(seed: int) -> dict[str, float]:
    """Peak signal-to-noise ratios in decibels, and places that change a step."""
    data, test = split(seed, [1200])
    steps = steps_of(data)
    sparse = ws.prune.sparse
    rules = {
        "soft shrinkage": sparse.soft_shrinkage(SPARSITY, stop=steps * 3 // 4),
        "hard thresholding": sparse.soft_shrinkage(SPARSITY, stop=steps * 3 // 4, amount=1.0),
        "dense, pruned, trained on": sparse.gmp(SPARSITY, every=1, start=steps // 2, stop=steps // 2 + 1),
        "gradual magnitude pruning": sparse.gmp(SPARSITY, every=steps // 40, stop=steps * 3 // 4),
        "dense": None,
    }
    return compared(data, test, seed, rules)
