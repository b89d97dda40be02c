"""How many bits each tensor gets.

The signature of the room: ``curves``, the error of each tensor at several widths, ``-> {tensor: bits}``, which goes
into ``bits=`` of any rounding.
"""

from weightsmith.card import table
from weightsmith.quantize.budget._curves import Curves, Level, curves
from weightsmith.quantize.budget._mixed import mixed

METHODS = table(curves, mixed)

__all__ = ["METHODS", "Curves", "Level", "curves", "mixed"]
