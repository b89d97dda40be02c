"""Does a random mask, kept while training, lose less to the dense network the wider the network is?

Networks of two hidden layers of 32, 128 and 512 units learn digits: dense, and with 90 % of their weights left out by
lot from the start, in shares by layer that are uniform or those of Erdős and Rényi. After one seed had been seen, 25
epochs at a learning rate of 1e-3 became 12 at 3e-3, to save time.
"""

from _digits import accuracy, mlp, split, train
from torch import nn, optim

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="random-pruning",
    statement="with a random mask of 90 % kept from the start, a network of width 512 loses less to its dense twin "
    "than one of width 32 does",
    method="lost at width 32",
    baseline="lost at width 512",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
WIDTHS, SPARSITY = (32, 128, 512), 0.9


def measure(seed: int) -> dict[str, float]:
    """Test accuracies, and what is lost to the dense network."""
    data, test = split(seed, [1200])
    figures: dict[str, float] = {}
    for width in WIDTHS:
        start = mlp(seed, width)
        shares = {
            "dense": dict.fromkeys(ws.prune.prunable(ws.open(start)), 0.0),
            "erk": ws.prune.allocation.erk(start, SPARSITY),
            "uniform": ws.prune.allocation.uniform(start, SPARSITY),
        }
        for name, share in shares.items():
            model = mlp(seed, width)
            mask = ws.prune.random(model, share, seed=seed, action="mask")
            figures[f"{name}, width {width}"] = trained(model, mask, data, test, seed)
        figures[f"lost at width {width}"] = figures[f"dense, width {width}"] - figures[f"erk, width {width}"]
    figures["erk minus uniform"] = sum(figures[f"erk, width {w}"] - figures[f"uniform, width {w}"] for w in WIDTHS) / 3
    return figures


def trained(model: nn.Module, mask, data, test, seed: int) -> float:
    """Test accuracy after training with the mask kept."""
    with ws.prune.holding(model, mask):
        train(model, data, optim.Adam(model.parameters(), lr=3e-3), epochs=12, seed=seed, rate=lambda t: 1 - t)
    return accuracy(model, test)
