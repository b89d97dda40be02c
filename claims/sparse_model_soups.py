"""Is a soup of retrained networks better than the best of them, phase after phase of pruning?

A small network is pruned in three phases, each of which removes 60 % of what is left and retrains four copies with
the mask kept, with an order of examples and a weight decay of their own, as in the paper. The next phase starts from
the soup of the four; or, with the same four runs a phase, from the one that is best on 300 validation digits. The
test digits choose nothing. Beside that: the soup of the last phase against its own members, and pruning the soup of
four dense runs at once. Learning rates are the same in all runs: that was decided after a first protocol drew them from
one and a half decades, in which the worst members spoilt the mean.
"""

import copy
import random

import torch
from _digits import Data, accuracy, mlp, split, train
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="sparse-model-soups",
    statement="pruned in phases, each from the soup of four retrained networks, a network is at least as accurate on "
    "test data as with the one of four that is best on validation data",
    method="soups",
    baseline="best single",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115),
    needs=("sklearn",),
)
SPARSITIES, COPIES = (0.6, 0.84, 0.936), 4


def measure(seed: int) -> dict[str, float]:
    """Accuracies at 93.6 % sparsity."""
    data, validation, test = split(seed, [600, 300])
    parent = mlp(seed)
    train(parent, data, torch.optim.Adam(parent.parameters(), lr=1e-3), epochs=30, seed=seed)
    scratch = copy.deepcopy(parent)

    def scored(weights: ws.Weights, on: Data = test) -> float:
        weights.load_into(scratch)
        return accuracy(scratch, on)

    figures = {"dense": accuracy(parent, test)}
    start = {"soups": ws.open(parent), "best single": ws.open(parent)}
    for phase, sparsity in enumerate(SPARSITIES):
        for arm, before in start.items():
            pruned = ws.prune.magnitude(before, sparsity, scope="global")
            mask = ws.prune.mask_of(pruned)
            runs = [retrained(pruned, mask, data, random.Random(1000 * seed + 10 * phase + i)) for i in range(COPIES)]
            best = max(runs, key=lambda run: scored(run, validation))
            after = ws.merge.sparse_soup(runs, mask=mask) if arm == "soups" else best
            start[arm] = ws.Weights.of(after.to_dict())
            if arm == "soups":
                figures |= {"best member of the last soup": scored(best)}
                figures |= {"mean member of the last soup": sum(scored(run) for run in runs) / COPIES}
    figures |= {arm: scored(weights) for arm, weights in start.items()}
    figures["sparsity of the soup"] = ws.prune.sparsity_of(start["soups"])
    dense = [retrained(ws.open(parent), None, data, random.Random(1000 * seed + i)) for i in range(COPIES)]
    figures["pruned soup of dense runs"] = scored(
        ws.prune.magnitude(ws.merge.mean(dense), SPARSITIES[-1], scope="global")
    )
    return figures


def retrained(start: ws.Weights, mask: ws.Weights | None, data: Data, chance: random.Random) -> ws.Weights:
    """One run from a network, with its zeros kept."""
    model: nn.Module = mlp(0)
    start.load_into(model)
    for name, parameter in model.named_parameters():
        if mask is not None and name in mask:
            parameter.register_hook(lambda gradient, kept=mask[name]: gradient * kept)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=10 ** chance.uniform(-4, -1))
    train(model, data, optimizer, epochs=15, seed=chance.randrange(2**31), rate=lambda progress: 1 - progress)
    return ws.open(model)
