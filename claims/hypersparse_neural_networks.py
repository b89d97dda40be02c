"""Does HyperSparse ready a network for a magnitude cut of 95 % better than L1 and L2, each at its best strength?

A perceptron of 128 hidden units learns digits for 10 epochs with Adam, then for 30 more with a penalty whose strength
grows by 5 % an epoch. Then 95 % of all weights together are cut by magnitude; nothing is trained after that. The first
strength of every penalty is chosen from a grid in steps of three, by 300 validation digits after the cut.

The grids were moved once, for all three, after the best of a seed that is not among these lay at their ends.
"""

import copy
from functools import partial

import torch
from _digits import accuracy
from _searches import best, loaded, parts, perceptron, train
from torch import Tensor

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.prune.sparse import hypersparse, weights_of

CLAIM = Claim(
    key="hypersparse-neural-networks",
    statement="right after 95 % of the weights are cut by magnitude, a network trained with HyperSparse is more "
    "accurate than one trained with L1",
    method="HyperSparse",
    baseline="L1",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
SPARSITY = 0.95


def lasso(weights: list[Tensor]) -> Tensor:
    """The sum of magnitudes."""
    return torch.stack([weight.abs().sum() for weight in weights]).sum()


def ridge(weights: list[Tensor]) -> Tensor:
    """Half the sum of squares."""
    return torch.stack([weight.square().sum() for weight in weights]).sum() / 2


PENALTIES = {
    "HyperSparse": (partial(hypersparse, sparsity=SPARSITY), (3e-4, 1e-3, 3e-3, 1e-2)),
    "L1": (lasso, (3e-4, 1e-3, 3e-3, 1e-2)),
    "L2": (ridge, (3e-3, 1e-2, 3e-2, 1e-1)),
    "no penalty": (lasso, (0.0,)),
}


def measure(seed: int) -> dict[str, float]:
    """Test accuracies after the cut, and before it."""
    training, validation, test = parts(seed)
    start = perceptron(seed)
    train(start, training, torch.optim.Adam(start.parameters(), lr=1e-3), 10, seed)
    figures: dict[str, float] = {}
    for name, (penalty, strengths) in PENALTIES.items():
        cut, whole = [], {}
        for strength in strengths:
            model = copy.deepcopy(start)
            weights = list(weights_of(model).values())
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

            def added(epoch: int, strength=strength, weights=weights, penalty=penalty) -> Tensor | float:
                return strength * 1.05**epoch * penalty(weights) if strength else 0.0

            train(model, training, optimizer, 30, seed, penalty=added)
            pruned = loaded(model, ws.prune.magnitude(model, sparsity=SPARSITY, scope="global").to_dict())
            cut.append(pruned)
            whole[id(pruned)] = (model, strength)
        chosen = best(cut, validation)
        figures[name] = accuracy(chosen, test)
        figures[f"{name}, before the cut"] = accuracy(whole[id(chosen)][0], test)
        figures[f"{name}, strength"] = whole[id(chosen)][1]
    return figures
