"""One bit a number and moment: neurons that answer with spikes, and how less is lost when potentials become 0 or 1.

The signature of the room: ``(potential, ...) -> potential`` before it is rounded, or a penalty ``(values, levels) ->
number`` on what rounding will cost; `Neuron` is where both are used.
"""

from weightsmith.card import table
from weightsmith.quantize.spiking._neuron import Fire, Neuron, rectified
from weightsmith.quantize.spiking._pull import potentials, pull_to_levels

METHODS = table(pull_to_levels, rectified)

__all__ = ["METHODS", "Fire", "Neuron", "potentials", "pull_to_levels", "rectified"]
