"""A model that is lent: looked at, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.stats.room import restored
from weightsmith.weights import Pattern, matches


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, buffers, ``requires_grad`` and the random state are what they were."""
    needing = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in needing if p.device.type == "cuda"})
    with restored(model), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for parameter, needed in needing:
                parameter.requires_grad_(needed)


def parameters_of(model: nn.Module, pattern: Pattern) -> dict[str, nn.Parameter]:
    """The float parameters whose names fit, tied ones once.

    Raises:
        Error: there is none.
    """
    floating = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    chosen = {name: value for name, value in floating.items() if matches(pattern, name)}
    if not chosen:
        near = did_you_mean(str(pattern), floating)
        raise Error(f"no weight with floats fits {pattern!r}{near}; there are {listed(floating)}")
    return chosen
