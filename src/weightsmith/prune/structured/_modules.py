"""Modules: a copy with other units, a copy with fresh weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.graph import UnitGraph
from weightsmith.prune._autograd import cuda_devices
from weightsmith.solve import seed_for

Initialise = Callable[[nn.Module], Any]
"""Gives a whole module fresh weights, in place, from the random state that it finds."""


def cut_module(model: nn.Module, graph: UnitGraph, index: Mapping[str, Any]) -> nn.Module:
    """A copy of a module with other units; see `weightsmith.graph.take_`."""
    from weightsmith.graph import take_

    made = copy.deepcopy(model)
    take_(made, graph, dict(index))
    return made


def reinitialised(model: nn.Module, seed: int = 0, initialise: Initialise | None = None) -> nn.Module:
    """A copy with the same shapes and fresh weights, which are never those that the model itself began with.

    Args:
        model: left as it is.
        seed: of the fresh weights, through `weightsmith.solve.seed_for`: a model that was built after
            ``torch.manual_seed(seed)`` gets others. The global random state is left as it was.
        initialise: ``(module) -> None``; by default the module's own way, see `weightsmith.start.fresh`.

    Returns:
        The copy. Buffers of parts that reset themselves (running means) are fresh as well.

    Raises:
        Error: parameters that no part knows how to draw.

    >>> layer = torch.nn.Linear(2, 2)
    >>> one, other, again = (reinitialised(layer, seed) for seed in (0, 1, 0))
    >>> bool((one.weight == again.weight).all()), bool((one.weight == other.weight).all())
    (True, False)
    """
    from weightsmith.start import fresh

    seed = seed_for(seed, "fresh weights")
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        torch.manual_seed(seed)
        if initialise is not None:
            initialise(made)
            return made
        try:
            drawn = fresh(made, seed=seed)
        except Error as error:
            raise Error(f"{error}; or give initialise=(module) -> None") from None
        drawn.load_into(made)
    return made
