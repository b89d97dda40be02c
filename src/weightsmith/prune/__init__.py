"""Fewer weights: what to remove, how much of it where, what to do with it, and how to repair what is left.

The signature of the room is a chain: ``score -> allocate -> select -> act``. A method is a *score*
``(weight [out, ...]) -> [out, ...]`` (higher is more worth keeping); the room's loop lifts it to
``(weights, sparsity, scope=, structure=, pattern=, action=) -> Weights``. Masks are boolean `Weights`. How much each
tensor loses is found in ``prune.allocation``, what is left is fitted again in ``prune.repair``, ``prune.sparse`` does
the same along training, and whole units (channels, heads, experts, layers) are cut in ``prune.structured``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weightsmith.card import table
from weightsmith.prune import _magnitude, _wanda
from weightsmith.prune.room import Prune, apply_mask, by_score, lift, mask_of, prunable, sparsity_of

if TYPE_CHECKING:
    from weightsmith.prune import allocation, repair, sparse, structured

magnitude: Prune = lift(_magnitude.magnitude)
wanda: Prune = lift(_wanda.wanda, scope="row")

METHODS = table(
    magnitude,
    wanda,
)

__all__ = [
    "METHODS",
    "Prune",
    "allocation",
    "apply_mask",
    "by_score",
    "lift",
    "magnitude",
    "mask_of",
    "prunable",
    "repair",
    "sparse",
    "sparsity_of",
    "structured",
    "wanda",
]

_ROOMS = ("allocation", "repair", "sparse", "structured")


def __getattr__(name: str) -> Any:
    """The rooms inside come when they are asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
