"""The small language model and the gains of its norms, for transforms: what claims on these measure with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from _small_language import batches, data, language, loss_of, train
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.graph import UnitGraph

BLOCKS = [f"blocks.*.{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@functools.cache
def trained(seed: int, steps: int = 200) -> tuple[nn.Module, list[Tensor], Tensor]:
    """A model, 4,096 words of its training text to calibrate on, and held-out text."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, steps, seed))
    return model, [batch[0] for batch in batches(training, 4, seed + 1000)], held_out


def graph_of(model: nn.Module, words: Tensor) -> UnitGraph:
    """The units, found from the operators."""
    return ws.graph.trace(model, words, verify=False)


def gains(layers: int = 4) -> dict[str, list[str]]:
    """Gain of a norm -> all that reads what it puts out."""
    found = {"norm.weight": ["head.weight"]}
    for block in (f"blocks.{number}" for number in range(layers)):
        found[f"{block}.first.weight"] = [f"{block}.{name}.weight" for name in "qkv"]
        found[f"{block}.second.weight"] = [f"{block}.{name}.weight" for name in ("gate", "up")]
    return found


def losses(model: nn.Module, every: dict[str, Any], held_out: Tensor) -> dict[str, float]:
    """Nats a word on held-out text with each of some weights."""
    scratch, found = copy.deepcopy(model), {"whole": loss_of(model, held_out)}
    for name, weights in every.items():
        weights.load_into(scratch)
        found[name] = loss_of(scratch, held_out)
    return found


@torch.no_grad()
def given(model: torch.nn.Module, words: Tensor, names: list[str]) -> dict[str, Tensor]:
    """``[rows, in]``: what each layer is given."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: found.update({name: args[0].flatten(0, -2)})

    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    model(words)
    for hook in hooks:
        hook.remove()
    return found
