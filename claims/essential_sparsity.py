"""Is there a knee: a share of the weights that can go at once for little, after which the loss climbs?

A trained network is pruned once, by magnitude and without any repair, to ever higher sparsities. The
knee is the point of the loss curve that lies furthest below the straight line between its ends.
"""

import copy

import torch
from _digits import accuracy, loss, mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="essential-sparsity",
    statement="after the knee of one-shot magnitude pruning the test loss rises at least 5 times as fast as before it",
    method="slope after the knee",
    baseline="5 x slope before the knee",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
SPARSITIES = tuple(step / 20 for step in range(20))  # 0 to 95 %


def measure(seed: int) -> dict[str, float]:
    """Slopes in nats per unit of sparsity, the knee, and accuracies there."""
    training, test = split(seed, [1200])
    model = mlp(seed, width=128)
    train(model, training, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=30, seed=seed)
    scratch = copy.deepcopy(model)

    def pruned(sparsity: float) -> torch.nn.Module:
        ws.prune.magnitude(model, sparsity=sparsity, scope="global").load_into(scratch)
        return scratch

    losses = [loss(pruned(sparsity), test) for sparsity in SPARSITIES]
    knee = knee_of(losses)
    last = len(losses) - 1
    before = (losses[knee] - losses[0]) / (SPARSITIES[knee] - SPARSITIES[0])
    after = (losses[last] - losses[knee]) / (SPARSITIES[last] - SPARSITIES[knee])
    return {
        "slope after the knee": after,
        "5 x slope before the knee": 5 * before,
        "knee": SPARSITIES[knee],
        "accuracy, whole": accuracy(pruned(0), test),
        "accuracy at the knee": accuracy(pruned(SPARSITIES[knee]), test),
        "accuracy at 95 %": accuracy(pruned(SPARSITIES[last]), test),
        "accuracy at 2:4": accuracy(patterned(model), test),
        "accuracy at 50 %": accuracy(pruned(0.5), test),
    }


def knee_of(losses: list[float]) -> int:
    """The inner point furthest below the line between the first and the last."""
    last = len(losses) - 1
    below = [losses[0] + (losses[last] - losses[0]) * i / last - losses[i] for i in range(1, last)]
    return 1 + below.index(max(below))


def patterned(model: torch.nn.Module) -> torch.nn.Module:
    """Two of every four weights kept."""
    made = copy.deepcopy(model)
    ws.prune.magnitude(model, sparsity="2:4").load_into(made)
    return made
