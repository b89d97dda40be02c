"""Is bi-level pruning as accurate at 95 % as iterative magnitude pruning, in a third of its steps?

A trained perceptron of 128 hidden units on digits. Iterative pruning takes 13 rounds of 12 epochs, each after a fifth
of every matrix has gone; the bi-level way has 26 epochs with a step on the weights and one on the mask for every batch.
Learning rates of weights are chosen by 300 validation digits for every way; that of scores is 0.1, as in the
authors' settings.

Gamma is the default, 1. It was 100 at first, on a seed that is not among these, where that was worse by a point.
"""

from _pruned_and_retrained import figures_of

from weightsmith.claims import Claim

CLAIM = Claim(
    key="advancing-model-pruning-bi-level",
    statement="at 95 % bi-level pruning is at least as accurate as iterative magnitude pruning with three times its "
    "steps",
    method="bi-level",
    baseline="iterative",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Test accuracies."""
    return figures_of(seed, ("bi-level", "iterative", "one shot"))
