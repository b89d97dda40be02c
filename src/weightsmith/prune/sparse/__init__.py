"""Sparsity along training: masks that move, penalties and parametrizations that make weights removable.

The signature of the room: a *rule* ``(step, weights, gradients, momenta, masks, generator) -> masks`` and a controller
that puts it on any optimizer; a *penalty* ``(weights) -> number``; a parametrization with ``fold``; or a training
driver ``(module, train, ...) -> module`` where ``train(module)`` is yours.
"""

from weightsmith.card import table
from weightsmith.prune.sparse import _callbacks as callbacks
from weightsmith.prune.sparse._bilevel import bilevel, bilevel_step, implicit_gradient
from weightsmith.prune.sparse._controller import Controller, Info, control
from weightsmith.prune.sparse._exchange import apportioned, highest
from weightsmith.prune.sparse._hypersparse import Press, adaptive_training, hypersparse, press_step
from weightsmith.prune.sparse._irrelevant import exponential_gate, irrelevant_decay, linear_gate, threshold_within
from weightsmith.prune.sparse._iso_flop import IsoFlop, iso_flop
from weightsmith.prune.sparse._lottery import Round, Ticket, iterative_magnitude, sparse_soups, swamp
from weightsmith.prune.sparse._nm_decay import NMDecay, nm_decay
from weightsmith.prune.sparse._on_the_fly import Sphere, bimodal, on_sphere, refilled
from weightsmith.prune.sparse._parametrizations import advance, weights_of
from weightsmith.prune.sparse._plasticity import Plasticity, plasticity
from weightsmith.prune.sparse._rules import (
    Moment,
    Rule,
    gmp,
    granet,
    rigl,
    soft_shrinkage,
    sparse_evolutionary,
    sparse_momentum,
    static,
    updated,
)
from weightsmith.prune.sparse._schedules import cosine, cubic
from weightsmith.prune.sparse._score_masks import Scored, score_masks
from weightsmith.prune.sparse._supermask import SignedMask, packed, signed_supermask, unpacked

METHODS = table(
    adaptive_training,
    bilevel,
    gmp,
    granet,
    hypersparse,
    irrelevant_decay,
    iso_flop,
    iterative_magnitude,
    nm_decay,
    on_sphere,
    plasticity,
    rigl,
    score_masks,
    signed_supermask,
    soft_shrinkage,
    sparse_evolutionary,
    sparse_momentum,
    sparse_soups,
    static,
    swamp,
    threshold_within,
)

__all__ = [
    "Controller",
    "Info",
    "IsoFlop",
    "METHODS",
    "Moment",
    "NMDecay",
    "Plasticity",
    "Press",
    "Round",
    "Rule",
    "Scored",
    "SignedMask",
    "Sphere",
    "Ticket",
    "adaptive_training",
    "advance",
    "apportioned",
    "bilevel",
    "bilevel_step",
    "bimodal",
    "callbacks",
    "control",
    "cosine",
    "cubic",
    "exponential_gate",
    "gmp",
    "granet",
    "highest",
    "hypersparse",
    "implicit_gradient",
    "irrelevant_decay",
    "iso_flop",
    "iterative_magnitude",
    "linear_gate",
    "nm_decay",
    "on_sphere",
    "packed",
    "plasticity",
    "press_step",
    "refilled",
    "rigl",
    "score_masks",
    "signed_supermask",
    "soft_shrinkage",
    "sparse_evolutionary",
    "sparse_momentum",
    "sparse_soups",
    "static",
    "swamp",
    "threshold_within",
    "unpacked",
    "updated",
    "weights_of",
]
