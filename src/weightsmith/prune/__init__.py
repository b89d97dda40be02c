"""Fewer weights: what to remove, how much of it where, and what to do with it.

The signature of the room is a chain: ``score -> allocate -> select -> act``. A method is a *score*
``(weight [out, ...]) -> [out, ...]`` (higher is more worth keeping); the room's loop lifts it to
``(weights, sparsity, scope=, pattern=, action=) -> Weights``. Masks are boolean `Weights`.
"""

from weightsmith.card import table
from weightsmith.prune import _magnitude
from weightsmith.prune.room import Prune, apply_mask, lift, mask_of, prunable, sparsity_of

magnitude: Prune = lift(_magnitude.magnitude)

METHODS = table(magnitude)

__all__ = ["METHODS", "Prune", "apply_mask", "lift", "magnitude", "mask_of", "prunable", "sparsity_of"]
