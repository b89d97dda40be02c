"""Routers are trained on what the whole module answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.merge._coefficients import Objective, Values, asked_of, descend
from weightsmith.stats.room import Batch, Forward, Loss, restored


@dataclass(frozen=True)
class Routing:
    """What a person wants to see of a step."""

    number: int
    """From 1."""
    losses: tuple[float, ...]
    """Of each task, on its batch, before the step."""


def train_routers(
    method: str,
    whole: nn.Module,
    data: Sequence[Iterable[Batch]],
    loss: Objective | Loss,
    ways: Sequence[Forward],
    *,
    steps: int,
    rate: float,
    seed: int,
    on_step: Callable[[Routing], None] | None,
) -> None:
    """Train, in place, those parameters of ``whole`` that want a gradient: no others than its routers'."""
    begin = {name: parameter.detach() for name, parameter in whole.named_parameters() if parameter.requires_grad}

    def slope(values: Values, task: int, batch: Batch) -> Tensor:
        def model(*inputs: Any, **named: Any) -> Any:
            return functional_call(whole, dict(values), inputs, named)

        return asked_of(model, batch, loss, ways[task])

    def tell(number: int, losses: tuple[float, ...], values: Values) -> None:
        if on_step is not None:
            on_step(Routing(number, losses))

    with restored(whole):
        found = descend(method, begin, data, slope, steps=steps, rate=rate, seed=seed, tell=tell)
    with torch.no_grad():
        for name, value in found.items():
            whole.get_parameter(name).copy_(value)
