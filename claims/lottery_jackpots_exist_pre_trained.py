"""Does a search over frozen trained weights find a better mask from their magnitudes than from random scores?

A perceptron of 128 hidden units learns digits for 30 epochs and is frozen; 5 % of every matrix may stay. Scores learn
for 40 epochs with Adam: from magnitudes with the restriction on swaps, from magnitudes without it, and from random
numbers. The learning rate of each is chosen from three, in steps of about three, by 300 validation digits. The mask of
magnitudes stands beside them without a search.
"""

import copy
from functools import partial

import torch
from _digits import accuracy
from _searches import best, learning, parts, perceptron, train

from weightsmith.adapt import fold
from weightsmith.claims import Claim
from weightsmith.prune.sparse import advance, score_masks

CLAIM = Claim(
    key="lottery-jackpots-exist-pre-trained",
    statement="at 95 % of every matrix, a mask searched from magnitudes over frozen weights is more accurate than one "
    "searched from random scores in as many steps",
    method="from magnitudes",
    baseline="from random scores",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
STARTS = {
    "from magnitudes": {"start": "magnitude"},
    "from magnitudes, not restricted": {"start": "magnitude", "restriction": None},
    "from random scores": {"start": "random", "restriction": None},
}
RATES = (0.003, 0.01, 0.03)


def measure(seed: int) -> dict[str, float]:
    """Test accuracies, and how much of the mask of magnitudes is in the one that was found."""
    training, validation, test = parts(seed)
    whole = perceptron(seed)
    train(whole, training, torch.optim.Adam(whole.parameters(), lr=1e-3), 30, seed)
    largest = copy.deepcopy(whole)
    score_masks(largest, 0.95)
    fold(largest)
    figures = {"whole": accuracy(whole, test), "mask of magnitudes": accuracy(largest, test)}
    for name, settings in STARTS.items():
        models = []
        for rate in RATES:
            model = copy.deepcopy(whole)
            score_masks(model, 0.95, seed=seed, **settings)
            optimizer = torch.optim.Adam(learning(model), lr=rate)
            train(model, training, optimizer, 40, seed, batch=100, after_step=partial(advance, model))
            fold(model)
            models.append(model)
        found = best(models, validation)
        figures[name] = accuracy(found, test)
        own, magnitude = (dict(net.named_parameters()) for net in (found, largest))
        places = [place for place in magnitude if place.endswith("weight")]
        same = sum(int(((own[place] != 0) & (magnitude[place] != 0)).sum()) for place in places)
        figures[f"{name}, overlap"] = same / sum(int((magnitude[place] != 0).sum()) for place in places)
    return figures
