"""Does gradual pruning end better if it regrows as it prunes?

A network of handwritten digits loses 97 % of its weights along the same cubic schedule in two ways: by magnitude among
all layers alone (gradual magnitude pruning), or with a share of what is left exchanged each time for places where the
gradient is largest (GraNet, dense to sparse). Beside that: GraNet from half of the weights (sparse to sparse), the
trained network pruned at once, the same with as much training after it, and the dense network. Pruning ends after
three quarters of the 40 epochs; all have the same learning rate.
"""

import copy

from _digits import accuracy, loss, split
from _sparse_training import EPOCHS, epoch_steps, scored, trained
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="granet",
    statement="pruned gradually to 3 % of the weights, a network of digits is at least as accurate on test data with "
    "regrowth at each pruning as without",
    method="GraNet",
    baseline="gradual magnitude pruning",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
SPARSITY = 0.97


def measure(seed: int) -> dict[str, float]:
    """Accuracies and losses on test digits."""
    data, test = split(seed, [1200])
    steps = epoch_steps(data)
    sparse, when = ws.prune.sparse, {"every": steps // 2, "stop": steps * EPOCHS * 3 // 4}
    rules = {
        "GraNet": sparse.granet(SPARSITY, initial=0.0, **when),
        "GraNet, sparse to sparse": sparse.granet(SPARSITY, initial=0.5, **when),
        "gradual magnitude pruning": sparse.gmp(SPARSITY, scope="global", **when),
    }
    figures: dict[str, float] = {}
    for name, rule in rules.items():
        figures[name], figures[f"loss, {name}"], figures[f"sparsity, {name}"] = scored(data, test, seed, rule)
    dense, _ = trained(data, seed, lambda model, optimizer: None)
    figures |= {"dense": accuracy(dense, test), "loss, dense": loss(dense, test)}
    pruned: nn.Module = copy.deepcopy(dense)
    weights = ws.prune.magnitude(dense, SPARSITY, scope="global", pattern="*.weight")
    weights.load_into(pruned)
    figures["at once"] = accuracy(pruned, test)
    masks = ws.prune.mask_of(weights, pattern="*.weight")
    tuned, _ = trained(
        data,
        seed,
        lambda model, optimizer: sparse.control(model, optimizer, sparse.static(), masks=masks),
        start=pruned,
    )
    return figures | {"at once and trained as long again": accuracy(tuned, test)}
