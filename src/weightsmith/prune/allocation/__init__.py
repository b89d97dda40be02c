"""How much each tensor loses.

The signature of the room: ``(weights or measured curves, sparsity, ...) -> {tensor: share removed}``, which every
method of ``prune`` takes as its ``sparsity``. The shares remove ``sparsity`` of all elements together; a method then
rounds to whole elements, so that what is removed may differ by half an element for each tensor (with ``scope="row"``,
for each row).
"""

from weightsmith.card import table
from weightsmith.prune.allocation._curves import LEVELS, Curves, gram_curves, measured, output_energy
from weightsmith.prune.allocation._distortion import distortion, lagrangian
from weightsmith.prune.allocation._owl import owl
from weightsmith.prune.allocation._parts import layer_of
from weightsmith.prune.allocation._scores import from_scores, global_magnitude, lamp
from weightsmith.prune.allocation._shapes import erk, uniform
from weightsmith.prune.allocation._sweep import knee, sweep

METHODS = table(
    distortion,
    erk,
    from_scores,
    global_magnitude,
    gram_curves,
    lagrangian,
    lamp,
    measured,
    owl,
    sweep,
    uniform,
)

__all__ = [
    "LEVELS",
    "METHODS",
    "Curves",
    "distortion",
    "erk",
    "from_scores",
    "global_magnitude",
    "gram_curves",
    "knee",
    "lagrangian",
    "lamp",
    "layer_of",
    "measured",
    "output_energy",
    "owl",
    "sweep",
    "uniform",
]
