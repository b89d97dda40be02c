"""Does momentum know better than chance where weights are wanted?

A network of handwritten digits is trained with 3 % of its weights from the first step on. After each epoch half of
them, later fewer, are dropped, the smallest first, and as many come back: at random places of the same layer (SET), or
where sparse momentum wants them, in the layers and at the places with the largest momentum. Beside that: a mask that
stays, growth by gradients (RigL), and the dense network. All begin with the same random masks, in which small layers
keep more, run for 40 epochs at the same learning rate and exchange the same shares at the same steps. First weights are
so much larger that values stay as large as in a dense network: chosen after one seed (100, not among those below), in
which the fixed mask without that learnt next to nothing and random growth too little to be a fair opponent.
"""

from _digits import accuracy, loss, split
from _sparse_training import EPOCHS, epoch_steps, scored, trained

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="sparse-networks-from-scratch",
    statement="with 3 % of the weights from the start, a network of digits is at least as accurate on test data when "
    "weights grow where the momentum is largest as when they grow at random",
    method="sparse momentum",
    baseline="random growth",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
SPARSITY = 0.97


def measure(seed: int) -> dict[str, float]:
    """Accuracies and losses on test digits."""
    data, test = split(seed, [1200])
    steps = epoch_steps(data)
    sparse, when = ws.prune.sparse, {"every": steps, "stop": steps * EPOCHS * 3 // 4}
    rules = {
        "sparse momentum": sparse.sparse_momentum(SPARSITY, fraction=0.5, **when),
        "random growth": sparse.Rule("set", SPARSITY, None, steps, 0, when["stop"], fraction=0.5),
        "gradient growth": sparse.rigl(SPARSITY, fraction=0.5, **when),
        "fixed mask": sparse.static(SPARSITY),
    }
    figures: dict[str, float] = {}
    for name, rule in rules.items():
        figures[name], figures[f"loss, {name}"], figures[f"sparsity, {name}"] = scored(data, test, seed, rule)
    dense, _ = trained(data, seed, lambda model, optimizer: None)
    return figures | {"dense": accuracy(dense, test), "loss, dense": loss(dense, test)}
