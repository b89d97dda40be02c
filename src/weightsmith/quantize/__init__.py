"""Fewer bits a weight: integer codes and the scales that turn them back into numbers.

The signature of the room: ``(weight [out, in], **options) -> (codes [out, in], scale [out, groups])``
on tensors, lifted to ``(weights, pattern=None, **options) -> Weights`` in which ``layer.weight`` has
become ``layer.weight_packed``, ``layer.weight_scale`` and ``layer.weight_shape``: the
``pack-quantized`` layout of compressed-tensors. `dequantize` leads back.
"""

from weightsmith.card import table
from weightsmith.quantize import _rtn
from weightsmith.quantize.room import Quantize, dequantize, lift

rtn: Quantize = lift(_rtn.rtn)

METHODS = table(rtn)

__all__ = ["METHODS", "Quantize", "dequantize", "lift", "rtn"]
