"""Pruned weights as fewer bytes on disk, and back.

The signature of the room: ``pack(weights, format=) -> Weights`` in which a pruned tensor has become its values, a bit
an entry and its shape; ``unpack(weights) -> Weights`` makes it dense again; ``sizes(packed) -> Report`` says what it
brings.
"""

from weightsmith.prune.formats._packed import Format, pack, sizes, unpack

__all__ = ["Format", "pack", "sizes", "unpack"]
