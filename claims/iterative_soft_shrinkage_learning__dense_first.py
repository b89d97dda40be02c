"""Does shrinking from the start end as well as dense training, pruning and training on?

The network, the data and the steps are those of the first claim on this paper. The baseline is what pruning usually is,
by magnitude once after half of the steps, and so sees a dense network for as long.
"""

from _digits import split
from _super_resolution import compared, steps_of

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="iterative-soft-shrinkage-learning",
    variant="dense first",
    statement="a super-resolution network that learns with 90 % of its weights shrinking a little each step restores "
    "test digits at least as well as one that is trained dense, pruned by magnitude and trained on in as many steps",
    method="soft shrinkage",
    baseline="dense, pruned, trained on",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
SPARSITY = 0.9


def measure(seed: int) -> dict[str, float]:
    """Peak signal-to-noise ratios in decibels."""
    data, test = split(seed, [1200])
    half = steps_of(data) // 2
    rules = {
        "soft shrinkage": ws.prune.sparse.soft_shrinkage(SPARSITY, stop=half * 3 // 2),
        "dense, pruned, trained on": ws.prune.sparse.gmp(SPARSITY, every=1, start=half, stop=half + 1),
    }
    return compared(data, test, seed, rules)
