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
from weightsmith.prune import _gradients, _lamp, _magnitude, _random, _surgeon, _wanda
from weightsmith.prune._blocks import block_taylor, lpvit
from weightsmith.prune._controls import controls, oracle_correlation, shuffled
from weightsmith.prune._execution import break_even, execute, to_semi_structured
from weightsmith.prune._flow import grasp, synflow
from weightsmith.prune._holding import holding
from weightsmith.prune._movement import Movement, movement
from weightsmith.prune._one_shot import one_shot
from weightsmith.prune._refine import refine
from weightsmith.prune._sequential import sequential
from weightsmith.prune.room import Prune, apply_mask, by_score, lift, mask_of, prunable, sparsity_of

if TYPE_CHECKING:
    from weightsmith.prune import allocation, formats, repair, sparse, structured

lamp: Prune = lift(_lamp.lamp)
magnitude: Prune = lift(_magnitude.magnitude)
obd: Prune = lift(_gradients.obd)
obs: Prune = lift(_surgeon.obs, scope="row")
random: Prune = lift(_random.random)
snip: Prune = lift(_gradients.snip)
taylor: Prune = lift(_gradients.taylor)
wanda: Prune = lift(_wanda.wanda, scope="row")

METHODS = table(
    block_taylor,
    controls,
    execute,
    grasp,
    lamp,
    lpvit,
    magnitude,
    movement,
    obd,
    obs,
    one_shot,
    oracle_correlation,
    random,
    refine,
    sequential,
    snip,
    synflow,
    taylor,
    to_semi_structured,
    wanda,
)

__all__ = [
    "METHODS",
    "Movement",
    "Prune",
    "allocation",
    "apply_mask",
    "block_taylor",
    "break_even",
    "by_score",
    "controls",
    "execute",
    "formats",
    "grasp",
    "holding",
    "lamp",
    "lift",
    "lpvit",
    "magnitude",
    "mask_of",
    "movement",
    "obd",
    "obs",
    "one_shot",
    "oracle_correlation",
    "prunable",
    "random",
    "refine",
    "repair",
    "sequential",
    "shuffled",
    "snip",
    "sparse",
    "sparsity_of",
    "structured",
    "synflow",
    "taylor",
    "to_semi_structured",
    "wanda",
]

_ROOMS = ("allocation", "formats", "repair", "sparse", "structured")


def __getattr__(name: str) -> Any:
    """The rooms inside come when they are asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
