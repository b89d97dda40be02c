"""A small language model to quantize, and how far what comes out says other things than it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from _digits import one_thread
from _small_language import Language, batches, data, language, loss_of, train
from torch import Tensor
from torch.nn import functional

MATRICES = [
    f"blocks.{index}.{layer}.weight" for index in range(4) for layer in ("q", "k", "v", "o", "gate", "up", "down")
]


def prepared(seed: int) -> tuple[Language, list[Tensor], Tensor]:
    """A trained model, 16 batches of 8 pieces of its training text, and held-out text of other files."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 200, seed))
    assert isinstance(model, Language)
    return model, [batch[0] for batch in batches(training, 16, seed + 1000, size=8)], held_out


@one_thread()
@torch.no_grad()
def divergence(model: Language, other: Callable[[Tensor], Tensor], held_out: Tensor) -> float:
    """Of what another says from what the model says, in nats a word."""
    words = held_out[:, :-1]
    said, told = (one(words).log_softmax(-1).flatten(0, 1) for one in (other, model))
    return float(functional.kl_div(said, told, log_target=True, reduction="batchmean"))


def figures_of(model: Language, made: Mapping[str, Any], held_out: Tensor) -> dict[str, float]:
    """The divergence of each of some weights; beside it the loss of the whole model."""
    import copy

    other = copy.deepcopy(model)
    figures = {"whole, nats a word": loss_of(model, held_out)}
    for name, weights in made.items():
        weights.load_into(other)
        figures[name] = divergence(model, other, held_out)
    return figures
