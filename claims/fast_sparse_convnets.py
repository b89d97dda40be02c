"""Is a pruned layer faster than the dense one when its zeros are skipped?

A product of a 2048 x 2048 matrix, 99 % of it zero at random places, with 1, 8 and 64 columns (tokens, or positions of
an image), on one thread, against PyTorch's dense product of the same matrix. Timings alternate, and a speed-up is the
median of the ratios of neighbours; the figure is the geometric mean over the three batches. Weights are random: time
depends on where zeros lie, not on values. The paper's kernels are for the processors of phones; these are PyTorch's.
"""

from statistics import geometric_mean

from _digits import one_thread

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="fast-sparse-convnets",
    statement="at 99 % scattered zeros a sparse product is faster than the dense one, over batches of 1, 8 and 64",
    method="speed-up at 99 %",
    baseline="dense",
)
BATCHES = (1, 8, 64)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Dense time over sparse time, by share of zeros and batch."""
    report = ws.prune.break_even(
        sparsities=(0.8, 0.9, 0.95, 0.99), batches=BATCHES, layouts=("scattered",), repeats=15, seed=seed
    )
    if max(report["difference"]) > 1e-5:
        raise AssertionError(f"sparse and dense outputs differ by {max(report['difference']):g} of the largest")
    found = {(row["sparsity"], row["batch"]): row["speed-up"] for row in report.table}
    figures = {"speed-up at 99 %": geometric_mean([found[0.99, batch] for batch in BATCHES]), "dense": 1.0}
    for sparsity in (0.8, 0.9, 0.95, 0.99):
        for batch in BATCHES:
            figures[f"{sparsity:.0%}, batch {batch}"] = found[sparsity, batch]
    return figures
