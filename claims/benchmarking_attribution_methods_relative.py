"""Do plain input gradients tell a model of things from a model of scenes better than integrated gradients do?

The paper finds the plain gradient ahead of integrated gradients and of gradient times input. Here digits, twice
enlarged, are pasted onto clothes; one network names the digit and one the garment. The score is how much more of the
attribution (sizes brought to [0, 1]) the digit's place has under the first.
"""

import torch
from _digits import _digits
from _fashion import cnn, split, train
from torch import Tensor, nn

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import (
    deeplift,
    input_gradients,
    integrated_gradients,
    pasted,
    relative_importance,
)

CLAIM = Claim(
    key="benchmarking-attribution-methods-relative",
    statement="plain input gradients have a higher model contrast score than integrated gradients",
    method="model contrast, gradient",
    baseline="model contrast, integrated gradients",
    seeds=(0, 1, 2, 3),
    needs=("sklearn",),
)
TRAINING, TEST = 5000, 300


def things(seed: int, count: int, test: bool) -> tuple[Tensor, Tensor]:
    """Digits ``[n, 1, 16, 16]`` drawn with replacement, from other digits for the test."""
    images, labels = _digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pool = order[1200:] if test else order[:1200]
    rows = pool[torch.randint(len(pool), (count,), generator=torch.Generator().manual_seed(seed + 1))]
    large = images[rows].reshape(-1, 1, 8, 8).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return large, labels[rows]


METHODS = {
    "gradient": lambda model, x, y: input_gradients(model, x, target=y),
    "gradient x input": lambda model, x, y: x * input_gradients(model, x, target=y),
    "integrated gradients": lambda model, x, y: integrated_gradients(model, x, target=y, steps=16).values,
    "DeepLIFT": lambda model, x, y: deeplift(model, x, target=y).values,
    "input alone": lambda model, x, y: x,
}


def measure(seed: int) -> dict[str, float]:
    """Scores of several methods."""
    clothes, test_clothes = split(seed, [TRAINING, TEST])
    digits, test_digits = things(seed, TRAINING, False), things(seed, TEST, True)
    pictures, _ = pasted(digits[0], clothes[0], seed=seed)
    models: list[nn.Module] = []
    for labels in (digits[1], clothes[1]):
        # Scenes alone are among the pictures of both, so that the second can name a scene without a thing.
        model = cnn(seed)
        both = torch.cat([pictures, clothes[0]]) if labels is clothes[1] else pictures
        train(
            model, (both, torch.cat([labels, labels])[: len(both)]), epochs=2 if len(both) > TRAINING else 4, seed=seed
        )
        models.append(model)
    found: dict[str, float] = {}
    for name, attribute in METHODS.items():
        report = relative_importance(attribute, models[0], models[1], test_digits, test_clothes, seed=seed)
        found[f"model contrast, {name}"] = report["model contrast"]
        found[f"input dependence, {name}"] = report["input dependence"]
        found[f"input independence, {name}"] = report["input independence"]
        found["pictures"] = report["pictures"]
    return found
