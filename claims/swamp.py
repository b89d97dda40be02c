"""Is iterative magnitude pruning better when each round prunes and rewinds the average of four runs?

A small network learns digits; six rounds each remove half of what is left, down to 1.6 %, rewinding to the moment after
one epoch. All runs are trained alike; what differs between the four is the order of the examples. Beside it stands
iterative pruning whose every training is four times as long, which costs as much.
"""

from _digits import accuracy, mlp, split, train
from torch import nn, optim

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="swamp",
    statement="after six halvings, averaging four runs in each round is at least as accurate on test data as iterative "
    "magnitude pruning with one run a round",
    method="SWAMP",
    baseline="iterative magnitude pruning",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
ROUNDS, PARTICLES, EPOCHS = 6, 4, 6


def measure(seed: int) -> dict[str, float]:
    """Test accuracies at the last sparsity."""
    data, test = split(seed, [1200])

    def training(epochs: int):
        def run(module: nn.Module, order: int) -> None:
            optimizer = optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
            train(module, data, optimizer, epochs=epochs, seed=order % 2**31, rate=lambda done: 1 - done)

        return run

    common = {"sparsity": 1 - 0.5**ROUNDS, "rounds": ROUNDS, "warm_up": training(1), "seed": seed}
    start = mlp(seed)
    sparse = ws.prune.sparse
    averaged = sparse.swamp(start, training(EPOCHS), particles=PARTICLES, **common)
    alone = sparse.iterative_magnitude(start, training(EPOCHS), **common)
    longer = sparse.iterative_magnitude(start, training(EPOCHS * PARTICLES), **common)
    return {
        "SWAMP": accuracy(averaged.module, test),
        "iterative magnitude pruning": accuracy(alone.module, test),
        "iterative, four times as long": accuracy(longer.module, test),
        "sparsity": averaged.rounds[-1].sparsity,
    }
