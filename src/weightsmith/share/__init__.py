"""Weights as fewer bytes: what they share is told once.

The signature of the room: ``encode(weights) -> Weights`` in which a tensor has become what stands for it, and
``decode(weights) -> Weights``, lazily the way back, whichever function encoded them. `encode` loses nothing: exponents
in codes of unequal length. `grouped_codebooks` keeps an index a weight into a few small codebooks.

What is encoded is for disks and wires; it is decoded, a run at a time, before it is used.
"""

from weightsmith.card import table
from weightsmith.share import _grouped_codebooks
from weightsmith.share.room import METADATA, decode, encode, lift, sizes

grouped_codebooks = lift(_grouped_codebooks.grouped_codebooks)

METHODS = table(encode, grouped_codebooks)

__all__ = ["METADATA", "METHODS", "decode", "encode", "grouped_codebooks", "lift", "sizes"]
