"""Is a mask that may invert constants better than one that may only hide them, at 95 %?

A perceptron of 256 hidden units with ELU and no biases has signed constants for weights. A signed mask (kept, hidden or
inverted) or a plain one (kept or hidden) of the same constants learns digits for 40 epochs with Adam; exactly 95 % of
every matrix are hidden at any time. Both begin at random, and the learning rate of each is chosen from two by 300
validation digits.
"""

from functools import partial

import torch
from _digits import accuracy
from _searches import best, learning, parts, perceptron, train
from torch import nn

from weightsmith.adapt import fold
from weightsmith.claims import Claim
from weightsmith.prune.sparse import advance, packed, score_masks, signed_supermask

CLAIM = Claim(
    key="signing-the-supermask",
    statement="at 95 % a signed mask of constants is more accurate than an unsigned one of the same constants",
    method="signed",
    baseline="unsigned",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
RATES = (0.01, 0.03)


def measure(seed: int) -> dict[str, float]:
    """Test accuracies, of all weights trained too, and the bytes of the signed network."""
    training, validation, test = parts(seed)
    signed, unsigned = [], []
    for rate in RATES:
        model = perceptron(seed, 256, nn.ELU, bias=False)
        signed_supermask(model, sparsity=0.95, seed=seed)
        train(model, training, torch.optim.Adam(learning(model), lr=rate), 40, seed, batch=100)
        bytes_written = packed(model).nbytes
        fold(model)
        signed.append(model)
        model = perceptron(seed, 256, nn.ELU, bias=False)
        signed_supermask(model, above=-10.0, below=-10.0, seed=seed)  # all constants are kept
        fold(model)
        score_masks(model, 0.95, start="random", restriction=None, seed=seed)
        train(
            model,
            training,
            torch.optim.Adam(learning(model), lr=rate),
            40,
            seed,
            batch=100,
            after_step=partial(advance, model),
        )
        fold(model)
        unsigned.append(model)
    whole = perceptron(seed, 256, nn.ELU, bias=False)
    train(whole, training, torch.optim.Adam(whole.parameters(), lr=1e-3), 40, seed, batch=100)
    chosen = best(signed, validation)
    return {
        "signed": accuracy(chosen, test),
        "unsigned": accuracy(best(unsigned, validation), test),
        "trained weights": accuracy(whole, test),
        "inverted, share of the kept": inverted(chosen, seed),
        "kilobytes": bytes_written / 1024,
        "kilobytes in float32": 4 * sum(p.numel() for p in whole.parameters()) / 1024,
    }


def inverted(model: nn.Module, seed: int) -> float:
    """How many of the weights that are left have the sign that their constant does not."""
    constants = perceptron(seed, 256, nn.ELU, bias=False)
    signed_supermask(constants, above=-10.0, below=-10.0, seed=seed)
    found, start = ([m.weight for m in net.modules() if isinstance(m, nn.Linear)] for net in (model, constants))
    turned = sum(int((weight * constant < 0).sum()) for weight, constant in zip(found, start, strict=True))
    return turned / sum(int((weight != 0).sum()) for weight in found)
