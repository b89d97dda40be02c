"""How far a language model's answers are from those of the whole one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.language import whole
from weightsmith.stats.room import default_forward, mapped
from weightsmith.weights import Weights

LEAST = float(torch.finfo(torch.float16).min)
"""Log-probabilities below this, of tokens that a model rules out, are told as this."""


def moved(batches: Sequence[Any], device: Any) -> list[Any]:
    """Batches on a device."""
    return [mapped(lambda value: value.to(device), batch) for batch in batches]


class Judge:
    """The answers of a whole model on batches, and the divergence of others from them.

    Holds one model, and ``tokens x vocabulary`` log-probabilities in half precision. Padded tokens (``attention_mask``
    0) do not count.
    """

    def __init__(self, weights: Weights, batches: Sequence[Any], dtype: str = "float32", device: str = "cpu"):
        if not batches:
            raise Error("judging needs at least one batch that was not calibrated on, got none")
        self.model = whole(weights, dtype, device)
        self.batches = moved(batches, device)
        self.whole = [self._answers(batch).to(torch.float16).cpu() for batch in self.batches]
        if not sum(map(len, self.whole)):
            raise Error("judging needs tokens that are not padding, got none")

    def __call__(self, weights: Weights) -> float:
        """Mean Kullback-Leibler divergence from the whole model, nats a token; ``weights`` are floats.

        Infinite for a model whose answers are no numbers.
        """
        weights.load_into(self.model)
        total, tokens = 0.0, 0
        for batch, answers in zip(self.batches, self.whole, strict=True):
            own = self._answers(batch)
            # Normed again: what was rounded is a distribution, and no other can be nearer to it than it is itself.
            known = answers.to(own.device).float().log_softmax(-1)
            total += float((known.exp() * (known - own)).sum(-1).double().sum())
            tokens += len(own)
        return total / tokens if math.isfinite(total) else math.inf

    def _answers(self, batch: Any) -> Tensor:
        """``[tokens, vocabulary]``, log-probabilities, none below `LEAST`."""
        with torch.no_grad():
            logits = default_forward(self.model, batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        logits = logits.flatten(0, -2) if mask is None else logits[mask.to(logits.device) != 0]
        return logits.float().log_softmax(-1).clamp(min=LEAST)
