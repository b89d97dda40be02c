"""Quantizing while training: the network learns to live with the points that it will be stored as.

The signature of the room: ``(module, **options) -> {name: parametrization}`` puts a parametrization on the weights of a
module in memory; any optimizer trains it, `coded` gives what to store, and ``weightsmith.adapt.fold`` leaves a plain
module with the same outputs. Beside them stand penalties ``(module) -> number`` and losses for one batch.
"""

from weightsmith.card import table
from weightsmith.quantize.training._distillation import distilled, divergence
from weightsmith.quantize.training._elastic import (
    Elastic,
    configure,
    elastic,
    elastics,
    evolve,
    linear_predictor,
    sandwich,
)
from weightsmith.quantize.training._fake import Fake, coded, codes, fake
from weightsmith.quantize.training._inputs import InputGrid, calibrating, fake_inputs, without_inputs
from weightsmith.quantize.training._levels import LearnedLevels, bits_by_gradient, learned_levels
from weightsmith.quantize.training._oscillation import JointScores, Oscillations, calm, joint_scores, statistical
from weightsmith.quantize.training._penalties import moments, span, to_points
from weightsmith.quantize.training._self_compressing import (
    Compressing,
    dead_units,
    self_compressing,
    size,
    without_dead,
)

METHODS = table(
    calm,
    distilled,
    elastic,
    evolve,
    fake,
    fake_inputs,
    joint_scores,
    learned_levels,
    moments,
    sandwich,
    self_compressing,
    span,
    statistical,
    to_points,
)

__all__ = [
    "METHODS",
    "Compressing",
    "Elastic",
    "Fake",
    "InputGrid",
    "JointScores",
    "LearnedLevels",
    "Oscillations",
    "bits_by_gradient",
    "calibrating",
    "calm",
    "coded",
    "codes",
    "configure",
    "dead_units",
    "distilled",
    "divergence",
    "elastic",
    "elastics",
    "evolve",
    "fake",
    "fake_inputs",
    "joint_scores",
    "learned_levels",
    "linear_predictor",
    "moments",
    "sandwich",
    "self_compressing",
    "size",
    "span",
    "statistical",
    "to_points",
    "without_dead",
    "without_inputs",
]
