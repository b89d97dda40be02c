"""A perceptron cut by magnitude without retraining, after several kinds of training."""

from __future__ import annotations

import torch
from _digits import Data, accuracy
from _searches import loaded, parts, perceptron, train
from torch import Tensor

import weightsmith as ws
from weightsmith.adapt import fold
from weightsmith.prune.sparse import bimodal, on_sphere, refilled, weights_of

SPARSITY = 0.9
STRENGTHS = {"sphere and penalty": (0.1, 0.3, 1.0, 3.0), "L1": (1e-4, 3e-4, 1e-3, 3e-3), "plain": (0.0,)}


def figures_of(seed: int, ways: tuple[str, ...]) -> dict[str, float]:
    """Test accuracies after the cut, filled with zeros and with means."""
    training, validation, test = parts(seed)
    figures: dict[str, float] = {}
    for name in ways:
        found = []
        for strength in STRENGTHS[name]:
            model = trained(seed, name, strength, training)
            for scope in ("row", "tensor", "global"):
                masks = ws.prune.magnitude(model, sparsity=SPARSITY, scope=scope, action="mask")
                cut = {fill: loaded(model, refilled(model, masks, fill=fill).to_dict()) for fill in ("zero", "mean")}
                found.append((accuracy(cut["zero"], validation), strength, model, cut))
        _, strength, model, cut = max(found, key=lambda one: one[0])
        figures[name] = accuracy(cut["zero"], test)
        figures[f"{name}, means filled in"] = accuracy(cut["mean"], test)
        figures[f"{name}, before the cut"] = accuracy(model, test)
        figures[f"{name}, strength"] = strength
    return figures


def trained(seed: int, name: str, strength: float, training: Data) -> torch.nn.Module:
    """A perceptron, plain again."""
    model = perceptron(seed)
    weights = list(weights_of(model).values())
    if name == "sphere and penalty":
        on_sphere(model)

    def penalty(epoch: int) -> Tensor | float:
        if name == "plain":
            return 0.0
        if name == "L1":
            return strength * torch.stack([weight.abs().sum() for weight in weights]).sum()
        return strength * bimodal(weights, SPARSITY)

    train(model, training, torch.optim.Adam(model.parameters(), lr=1e-3), 40, seed, penalty=penalty)
    fold(model)
    return model
