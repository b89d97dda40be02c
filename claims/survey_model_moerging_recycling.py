"""Do experts that are kept apart behind a router beat the uniform merge of them, when nobody says whose an input is?

A base knows digits turned by all angles a little; an adapter for each of four angles is a fine-tune of it, cut to rank
eight. The test stream mixes all angles. The merge takes the one coefficient that is best for the whole stream on
validation digits, which is stronger than the uniform merge of the statement; routers see no labels. Arrow reads the
adapters alone, the centroids the mean inputs of each task's training digits. Beside them stand the uniform merge,
a gate trained on labels, and the bound of an oracle that knows the angle.
"""

import copy

import torch
from _digits import Data, accuracy, mlp, split, train
from _rotations import turned

from weightsmith.claims import Claim
from weightsmith.merge import moe

CLAIM = Claim(
    key="survey-model-moerging-recycling",
    statement="routing by the nearest centroid is more accurate on a mixed stream than the best static merge",
    method="centroid",
    baseline="best single coefficient",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
RANK, ANGLES, BATCH = 8, 4, 32


def measure(seed: int) -> dict[str, float]:
    """Mean accuracy over the angles, on test digits that nothing was fitted to."""
    begin, learn, validation, test = split(seed, [200, 700, 300])
    base = mlp(seed, 128)
    mixed = [turned(begin, by) for by in range(ANGLES)]
    everything = torch.cat([images for images, _ in mixed]), torch.cat([labels for _, labels in mixed])
    train(base, everything, torch.optim.Adam(base.parameters(), lr=1e-3), epochs=10, seed=seed)
    tasks = [turned(learn, by) for by in range(ANGLES)]
    checks, tests = ([turned(part, by) for by in range(ANGLES)] for part in (validation, test))
    experts = []
    for task in tasks:
        model = copy.deepcopy(base)
        weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
        train(model, task, torch.optim.Adam(weights, lr=1e-3), epochs=15, seed=seed)
        experts.append(model)
    batches = [[(images[at : at + BATCH], labels[at : at + BATCH]) for at in range(0, len(labels), BATCH)]
               for images, labels in tasks]  # fmt: skip

    def made(router: moe.Router, **options) -> torch.nn.Module:
        return moe.routed(base, None, experts, "*", router, rank=RANK, **options)

    coefficients = [c / 20 for c in range(21)]
    static = {c: made("mean", weight=[c] * ANGLES) for c in coefficients}
    best = max(coefficients, key=lambda c: mean_accuracy(static[c], checks))
    routed = {
        "centroid": made("centroid", keep=1, data=batches),
        "centroid, soft": made("centroid", data=batches),
        "arrow": made("arrow"),
        "arrow, one": made("arrow", keep=1),
        "gate": made("gate", data=batches, steps=200, rate=3e-2, seed=seed),
        "uniform merge": static[1 / ANGLES],
        "best single coefficient": static[best],
    }
    figures = {name: mean_accuracy(model, tests) for name, model in routed.items()}
    oracle = [moe.fold(static[best], [float(at == by) for at in range(ANGLES)]) for by in range(ANGLES)]
    figures["oracle"] = sum(accuracy(model, part) for model, part in zip(oracle, tests, strict=True)) / ANGLES
    return figures | {"base": mean_accuracy(base, tests), "coefficient": best}


def mean_accuracy(model: torch.nn.Module, data: list[Data]) -> float:
    """One model on all angles."""
    return sum(accuracy(model, part) for part in data) / len(data)
