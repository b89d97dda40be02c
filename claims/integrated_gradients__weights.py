"""Do path attributions say which tensors fine-tuning gained by, better than slopes at its two ends?

The truth is taken to be each tensor's Shapley value: what the test loss gains when the tensor is taken from the
fine-tuned network, averaged over all orders of taking them, from all 64 mixtures of the six tensors. The baseline is
the mean of the slopes at both ends times the difference (the trapezoid rule with two points), the best that two
gradients give.
"""

import copy

import torch
from _digits import loss, mlp, split, train

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import path_attribution, shapley, swapped

CLAIM = Claim(
    key="integrated-gradients",
    variant="weights",
    statement="path attributions of tensors are nearer to their exact Shapley values than slopes at both ends are",
    method="error of path attributions",
    baseline="error of slopes at both ends",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Distances from the Shapley values, as shares of their norm."""
    first, second, test = split(seed, [300, 900])
    base = mlp(seed)
    train(base, first, torch.optim.Adam(base.parameters(), lr=1e-3), epochs=10, seed=seed)
    tuned, scratch = copy.deepcopy(base), copy.deepcopy(base)
    train(tuned, second, torch.optim.Adam(tuned.parameters(), lr=1e-3), epochs=10, seed=seed)

    def evaluate(weights) -> float:
        weights.load_into(scratch)
        return loss(scratch, test)

    path = path_attribution(base, base, tuned, [test], steps=16)
    ends = path_attribution(base, base, tuned, [test], steps=2, rule="trapezoid")
    names = path["tensor"]
    exact = shapley(swapped(base, tuned, {name: name for name in names}, evaluate), names).values
    errors = [float((torch.tensor(found["part"]) - exact).norm() / exact.norm()) for found in (path, ends)]
    return {
        "error of path attributions": errors[0],
        "error of slopes at both ends": errors[1],
        "change of the loss": path["change"],
        "gap of path attributions": path["gap"],
        "gap of slopes at both ends": ends["gap"],
    }
