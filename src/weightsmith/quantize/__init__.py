"""Fewer bits a weight: codes on a grid, and what turns them back into numbers.

The signature of the room: ``(weight [out, in], gram [in, in], *, grid, **options) -> Coded`` on tensors, lifted to
``(weights, *, stats, bits, group, grid, **options) -> Weights`` in which ``layer.weight`` has become
``layer.weight_packed`` and what its grid stores. `dequantize` leads back. The points that codes stand for are in
``quantize.grids``, what is done to weights before in ``quantize.transforms``, what other programs read in
``quantize.formats``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weightsmith.card import table
from weightsmith.quantize import (
    _adaround,
    _billm,
    _bitmod,
    _descent,
    _flexround,
    _gptq,
    _lean,
    _nupes,
    _rtn,
    _two_four,
    formats,
)
from weightsmith.quantize._auto import RECIPES, Recipe, auto
from weightsmith.quantize._coded import Coded, coded, fitted, output_error
from weightsmith.quantize._described import Code, codes
from weightsmith.quantize._end_to_end import end_to_end
from weightsmith.quantize._frontier import frontier
from weightsmith.quantize._guided import guidedquant
from weightsmith.quantize._layout import dequantize
from weightsmith.quantize._low_precision import low_precision
from weightsmith.quantize._one_shot import one_shot, with_embeddings
from weightsmith.quantize._outliers import without_outliers
from weightsmith.quantize._reconstruct import reconstruct
from weightsmith.quantize._rsq import rsq
from weightsmith.quantize._sensitive import damage, requant, with_kept
from weightsmith.quantize._sequential import sequential
from weightsmith.quantize.room import Quantize, lift

if TYPE_CHECKING:
    from weightsmith.quantize import budget, codecs, grids, spiking, training, transforms

adaround: Quantize = lift(_adaround.adaround)
billm: Quantize = lift(_billm.billm)
bitmod: Quantize = lift(_bitmod.bitmod)
coordinate_descent: Quantize = lift(_descent.coordinate_descent)
flexround: Quantize = lift(_flexround.flexround)
gptq: Quantize = lift(_gptq.gptq)
leanquant: Quantize = lift(_lean.leanquant)
lnq: Quantize = lift(_descent.lnq)
nupes: Quantize = lift(_nupes.nupes)
rtn: Quantize = lift(_rtn.rtn)
two_four: Quantize = lift(_two_four.two_four)

METHODS = table(
    adaround,
    auto,
    billm,
    bitmod,
    coordinate_descent,
    damage,
    end_to_end,
    flexround,
    frontier,
    gptq,
    guidedquant,
    leanquant,
    lnq,
    low_precision,
    nupes,
    one_shot,
    reconstruct,
    requant,
    rsq,
    rtn,
    sequential,
    two_four,
    without_outliers,
)

__all__ = [
    "METHODS",
    "RECIPES",
    "Code",
    "Coded",
    "Quantize",
    "Recipe",
    "adaround",
    "auto",
    "billm",
    "bitmod",
    "budget",
    "codecs",
    "coded",
    "codes",
    "coordinate_descent",
    "damage",
    "dequantize",
    "end_to_end",
    "fitted",
    "flexround",
    "formats",
    "frontier",
    "gptq",
    "grids",
    "guidedquant",
    "leanquant",
    "lift",
    "lnq",
    "low_precision",
    "nupes",
    "one_shot",
    "output_error",
    "reconstruct",
    "requant",
    "rsq",
    "rtn",
    "sequential",
    "spiking",
    "training",
    "transforms",
    "two_four",
    "with_embeddings",
    "with_kept",
    "without_outliers",
]

_ROOMS = ("budget", "codecs", "grids", "spiking", "training", "transforms")


def __getattr__(name: str) -> Any:
    """The rooms inside come when they are asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
