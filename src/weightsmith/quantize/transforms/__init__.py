"""The same function in other weights, which are easier to round.

The signature: ``(weights, batches or statistics, graph, **options) -> Weights`` that compute what the given ones do (in
exact arithmetic). What comes out is an ordinary checkpoint, for any rounding of ``quantize`` or of another program.
Where something can be rescaled is told by `places`, for every architecture from its graph of units.
"""

from weightsmith.card import table
from weightsmith.quantize.transforms._awq import awq
from weightsmith.quantize.transforms._hadamard import hadamard, hadamard_transform, keeping_mean, random_orthogonal
from weightsmith.quantize.transforms._places import Place, Side, places, scaled
from weightsmith.quantize.transforms._qllm import Channels, assembled, disassembled, qllm, rechannelled
from weightsmith.quantize.transforms._rotations import karhunen_loeve, mambaquant, rotate
from weightsmith.quantize.transforms._smoothquant import smoothquant, smoothquant_plus

METHODS = table(awq, mambaquant, qllm, rotate, smoothquant, smoothquant_plus)

__all__ = [
    "METHODS",
    "Channels",
    "Place",
    "Side",
    "assembled",
    "awq",
    "disassembled",
    "hadamard",
    "hadamard_transform",
    "karhunen_loeve",
    "keeping_mean",
    "mambaquant",
    "places",
    "qllm",
    "random_orthogonal",
    "rechannelled",
    "rotate",
    "scaled",
    "smoothquant",
    "smoothquant_plus",
]
