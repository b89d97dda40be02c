"""Do the shares that measured distortions ask for prune better than one threshold, or than the same share everywhere?

A small convolutional network with batch norm learns clothes. How much its outputs move when one layer alone is pruned
is measured on 300 training images; dynamic programming makes shares of the curves. Pruned by magnitude within layers
and not trained again, it is compared at 60, 70 and 80 % with the better one, each time, of uniform shares and of one
threshold for all layers. LAMP, ERK and one multiplier stand beside them and decide nothing; so does the correlation of
the predicted with the true distortion over random shares.
"""

import copy

import torch
from _fashion import accuracy, cnn, held_out, split, train
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="efficient-joint-optimization-layer-adaptive",
    statement="pruned without retraining to 60, 70 and 80 %, a network is on average more accurate with shares from "
    "measured distortions than with the better of uniform shares and one global threshold",
    method="measured distortions",
    baseline="better of uniform and global",
    seeds=(0, 1, 2, 3, 4),
)
SPARSITIES = (0.6, 0.7, 0.8)


def measure(seed: int) -> dict[str, float]:
    """Test accuracies, means over sparsities; and how well single layers' distortions add up."""
    (data,) = split(seed, [5000])
    test = held_out(seed)
    model = cnn(seed)
    train(model, data, epochs=3, seed=seed)
    calibration = data[0][:300]
    curves = ws.prune.allocation.measured(model, [calibration], [step / 20 for step in range(1, 20)])

    def pruned(shares: dict[str, float]) -> nn.Module:
        made = copy.deepcopy(model)
        ws.prune.magnitude(model, shares).load_into(made)
        return made.eval()

    figures: dict[str, float] = {"whole": accuracy(model, test)}
    allocate = ws.prune.allocation
    arms = {
        "measured distortions": lambda s: allocate.distortion(curves, s),
        "one multiplier": lambda s: allocate.lagrangian(curves, s),
        "uniform": lambda s: allocate.uniform(model, s),
        "global": lambda s: allocate.global_magnitude(model, s),
        "lamp": lambda s: allocate.lamp(model, s),
        "erk": lambda s: allocate.erk(model, s),
    }
    found = {arm: [accuracy(pruned(shares(s)), test) for s in SPARSITIES] for arm, shares in arms.items()}
    figures |= {arm: sum(values) / len(values) for arm, values in found.items()}
    better = [max(pair) for pair in zip(found["uniform"], found["global"], strict=True)]
    figures["better of uniform and global"] = sum(better) / len(better)
    return figures | {"correlation of predicted and true": correlation(model, curves, calibration, pruned, seed)}


def correlation(model, curves, inputs, pruned, seed: int, count: int = 40) -> float:
    """Over random shares up to 70 % of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        whole = model(inputs)
        pairs = []
        for _ in range(count):
            drawn = (0.7 * torch.rand(len(curves.harms), generator=generator)).tolist()
            shares = dict(zip(curves.harms, drawn, strict=True))
            pairs.append((curves.at(shares), float((pruned(shares)(inputs) - whole).square().mean())))
    return float(torch.corrcoef(torch.tensor(pairs).T)[0, 1])
