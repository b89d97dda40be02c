"""Does a mask that fades in train better into 1:8 and 1:16 than one that is hard from the start, with SR-STE?

A perceptron of 128 hidden units learns digits for 40 epochs with Adam, all three layers in the pattern. The decay
(linear or exponential) and the strength of SR-STE (2e-4 as in its paper, or ten times that) are chosen by 300
validation digits, for each pattern and seed. Hard masks without SR-STE and the decay of the structure stand beside
them. The figures are means over both patterns.
"""

from functools import partial

import torch
from _digits import accuracy
from _searches import best, parts, perceptron, train

from weightsmith.adapt import fold
from weightsmith.claims import Claim
from weightsmith.prune.sparse import advance, nm_decay

CLAIM = Claim(
    key="nm-mask-decay",
    statement="over 1:8 and 1:16 a perceptron trained with a decaying mask is more accurate than with SR-STE",
    method="mask decay",
    baseline="SR-STE",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
WAYS = {
    "mask decay": [{"decay": "linear"}, {"decay": "exponential"}],
    "SR-STE": [{"decay": "hard", "pull": 2e-4}, {"decay": "hard", "pull": 2e-3}],
    "hard mask": [{"decay": "hard"}],
    "structure decay": [{"decay": "structure"}],
}
PATTERNS = ("1:8", "1:16")


def measure(seed: int) -> dict[str, float]:
    """Test accuracies, by pattern and in the mean."""
    training, validation, test = parts(seed)
    figures: dict[str, float] = {}
    for pattern in PATTERNS:
        for way, settings in WAYS.items():
            models = []
            for setting in settings:
                model = perceptron(seed)
                nm_decay(model, pattern, **setting)
                optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
                follow = partial(advance, model)
                train(model, training, optimizer, 40, seed, batch=100, after_step=follow)
                fold(model)
                models.append(model)
            figures[f"{way}, {pattern}"] = accuracy(best(models, validation), test)
    for way in WAYS:
        figures[way] = sum(figures[f"{way}, {pattern}"] for pattern in PATTERNS) / len(PATTERNS)
    return figures
